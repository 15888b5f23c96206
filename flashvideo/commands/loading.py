"""Networks from the model options of a command: data types, model files, the encoded prompt, and the refiner's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import load_dit, load_vae, open_checkpoint
from ..config import TEXT_TOKENS, DiTConfig
from ..devices import main_memory, open_device
from ..errors import CommandError
from ..nano import NANO_NOTICE, latent_family, nano_is_trained, nano_state, pair_notice
from ..parallel import Ranks, agree
from ..parallel.sharding import shard_weights
from ..refiner.run import Networks
from ..t5 import T5Encoder, T5Tokens, contexts, load_encoder, with_motion
from ..vae.memory import STORE_SHARE, VAE_SHARE
from .chosen import ModelOptions, existing_file
from .terminal import say, warn

BUILT_IN = "nano"  # in place of a file's identity
KEPT_SHARE = 0.3  # of main memory, for a text encoder between prompts: other networks lie there, too


def dtypes(name: str | None, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Data types of the transformers and of the VAE: the chosen one, or those that suit the device."""
    if name:
        return getattr(torch, name), getattr(torch, name)
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


def load_refiner(models: ModelOptions, prompt: str | None, motion: str, ranks: Ranks | None) -> Networks:
    """Stage II and the VAE, and the encoded prompt. Raises CommandError and CheckpointError."""
    device = open_device(models.device)
    dit_dtype, vae_dtype = dtypes(models.dtype, device)
    if models.model is None and not nano_is_trained():
        say(NANO_NOTICE)
    dit = load_dit(model_file(models.model, models.built_in("stage2")), dtype=dit_dtype)
    if dit.config.stage != 2:
        raise CommandError(f"{models.model} is stage I, which makes drafts; the refiner is stage II.")
    if models.shard_weights:
        shard_weights(dit, dit.blocks, device)
    warn_of_pair(models.model or models.built_in("stage2"), dit.config, models.vae or models.built_in("vae"))
    vae = load_vae(model_file(models.vae, models.built_in("vae")), dtype=vae_dtype)
    context = encoded_prompt(prompt, motion, TextEncoder(models, device), dit.config.text_dim, ranks)
    store = None if device.type == "cpu" else STORE_SHARE * main_memory()
    return Networks(dit, vae, context, device, _vae_memory(models.vae_memory, device), store, ranks)


def warn_of_pair(model: Path | str, config: DiTConfig, vae: Path | str) -> None:
    """Warn where a model and a VAE, each a file or the name of a built-in part, don't belong together.

    `config` is the model's. Of the VAE's file only the shapes are read. Raises CheckpointError for one that is none.
    """
    vae_config = open_checkpoint(existing_file(vae), kind="vae").config if isinstance(vae, Path) else None
    notice = pair_notice(latent_family(model, config), latent_family(vae, vae_config))
    if notice is not None:
        warn(notice)


def encoded_prompt(prompt: str | None, motion: str, text: TextEncoder, text_dim: int, ranks: Ranks | None) -> Tensor:
    """The prompt's encoding for stage II, [1, 226, text_dim]; without a prompt zeros."""
    if prompt is None:
        return torch.zeros(1, TEXT_TOKENS, text_dim)  # as in the unconditional evaluation
    words = with_motion(prompt, motion)
    return agree(ranks, lambda: text(words, text_dim))


def _vae_memory(wanted: float | None, device: torch.device) -> float | None:
    """Bytes for the VAE; None for no limit."""
    if wanted is not None:
        return wanted
    return VAE_SHARE * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
