"""The networks' inputs from the model options of a command: data types, model files, and the encoded prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..devices import main_memory
from ..errors import CommandError
from ..nano import nano_state
from ..t5 import T5Encoder, T5Tokens, contexts, load_encoder
from .options import DTYPES, ModelOptions, existing_file

BUILT_IN = "nano"  # in place of a file's identity
KEPT_SHARE = 0.3  # of main memory, for a text encoder between prompts: other networks lie there, too


def dtypes(name: str | None, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Data types of the transformers and of the VAE: the chosen one, or those that suit the device."""
    if name:
        return DTYPES[name], DTYPES[name]
    return (torch.float32, torch.float32) if device.type == "cpu" else (torch.bfloat16, torch.float16)


def model_file(path: Path | None, part: str) -> Any:
    """The chosen file, or the built-in weights of `part`. Raises CommandError if there is no such file."""
    return nano_state(part) if path is None else existing_file(path)


class TextEncoder:
    """What encodes prompts. With `keep` the network stays in main memory between them, if that has room for it."""

    def __init__(self, options: ModelOptions, device: torch.device, *, keep: bool = False) -> None:
        """Nothing is loaded before the first prompt."""
        self.options, self.device, self.keep = options, device, keep
        self._kept: T5Encoder | None = None

    def __call__(self, text: str, text_dim: int) -> Tensor:
        """A text's encoding [1, 226, text_dim], in main memory. Raises CommandError."""
        options = self.options
        if options.text_encoder is None and options.model is not None:
            raise CommandError("A prompt needs --text-encoder FILE, T5-XXL (t5xxl_fp16.safetensors).")
        tokens = T5Tokens(options.tokenizer)
        encoder = self._kept.to(self.device) if self._kept else self._load()
        try:
            context = contexts(encoder, tokens, [text]).cpu()
        finally:  # also where the card's memory isn't enough: other networks need it next
            if self.keep and sum(weight.nbytes for weight in encoder.parameters()) < KEPT_SHARE * main_memory():
                self._kept = encoder.to("cpu")
        if context.shape[2] != text_dim:
            raise CommandError(
                f"The text encoder gives {context.shape[2]} numbers per token and the model takes {text_dim}: "
                "they don't belong together."
            )
        return context

    def _load(self) -> T5Encoder:
        source = model_file(self.options.text_encoder, "text_encoder")
        dtype = torch.float32 if self.options.text_encoder is None else torch.bfloat16  # as in the official script
        return load_encoder(source, self.device, dtype)
