"""The networks' inputs from the model options of a command: data types, model files, and the encoded prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CommandError
from ..nano import nano_state
from ..t5 import T5Tokens, contexts, load_encoder
from .options import DTYPES, ModelOptions, existing_file

BUILT_IN = "nano"  # in place of a file's identity


def dtypes(name: str | None, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Data types of the transformers and of the VAE: the chosen one, or those that suit the device."""
    if name:
        return DTYPES[name], DTYPES[name]
    return (torch.float32, torch.float32) if device.type == "cpu" else (torch.bfloat16, torch.float16)


def model_file(path: Path | None, part: str) -> Any:
    """The chosen file, or the built-in weights of `part`. Raises CommandError if there is no such file."""
    return nano_state(part) if path is None else existing_file(path)


def encode_prompt(text: str, options: ModelOptions, text_dim: int, device: torch.device) -> Tensor:
    """A text's encoding [1, 226, text_dim] by the chosen encoder. Raises CommandError."""
    if options.text_encoder is None and options.model is not None:
        raise CommandError("A prompt needs --text-encoder FILE, T5-XXL (t5xxl_fp16.safetensors).")
    source = model_file(options.text_encoder, "text_encoder")
    tokens = T5Tokens(options.tokenizer)
    dtype = torch.float32 if options.text_encoder is None else torch.bfloat16  # as in the official script
    context = contexts(load_encoder(source, device, dtype), tokens, [text])
    if context.shape[2] != text_dim:
        raise CommandError(
            f"The text encoder gives {context.shape[2]} numbers per token and the model takes {text_dim}: "
            "they don't belong together."
        )
    return context
