"""Memory of the networks on a device: their weights, and all activations that exist at the peak of a run.

The VAE's activations are in vae/memory.py.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from .config import TEXT_TOKENS, DiTConfig, T5Config, VAEConfig
from .dit import FlashVideoDiT, dit_tokens
from .dit.token_chunks import tokens_per_chunk
from .t5 import t5_shapes
from .vae import VideoVAE

# Activations at the diffusion transformer's peak, in a layer, as tests/library/test_planner_costs.py measures: the
# tokens, their keys and values, and so many times the feed-forward activations of the current piece.
LAYER_SEQUENCES = 3
LAYER_EXPANDED = 1.75
# Latents in float32 that a sampler holds around the network: where it began, where it is, what the network is given,
# and the first of its two predictions.
SAMPLER_LATENTS = 4
FLOAT32_BYTES = 4


@lru_cache
def parameters(config: DiTConfig | VAEConfig | T5Config) -> int:
    """Number of parameters of a network."""
    if isinstance(config, T5Config):
        return sum(math.prod(shape) for shape in t5_shapes(config).values())
    network = FlashVideoDiT(config, device="meta") if isinstance(config, DiTConfig) else vae_outline(config)
    return sum(weight.numel() for weight in network.parameters())


@lru_cache
def vae_outline(config: VAEConfig) -> VideoVAE:
    """The VAE on the meta device: shapes without weights."""
    return VideoVAE(config, device="meta")


def dit_bytes(config: DiTConfig, shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cuda") -> float:
    """Bytes of one evaluation of one latent of `shape` (T, H, W), besides the weights and the latent.

    `device` is a device's type; a processor works in smaller pieces.
    """
    tokens = dit_tokens(config, shape) + TEXT_TOKENS
    piece = tokens_per_chunk(tokens, config.ff_dim, dtype.itemsize, device)
    layer = LAYER_SEQUENCES * tokens * config.hidden_size + LAYER_EXPANDED * piece * config.ff_dim
    rope = dit_tokens(config, shape) * config.head_dim * FLOAT32_BYTES  # a cosine and a sine for every second number
    return layer * dtype.itemsize + rope


def sampler_bytes(config: DiTConfig, shape: tuple[int, int, int]) -> float:
    """Bytes of a sampler's latents around the evaluation, if the guided and the unguided half run in turn."""
    return SAMPLER_LATENTS * config.in_channels * math.prod(shape) * FLOAT32_BYTES


def t5_bytes(config: T5Config, dtype: torch.dtype, tokens: int = TEXT_TOKENS) -> float:
    """Bytes of encoding one prompt besides the weights: a layer's gated halves, and the attention's scores."""
    layer = tokens * (3 * config.d_model + 2 * config.d_ff) * dtype.itemsize
    scores = 2 * config.num_heads * tokens**2 * FLOAT32_BYTES  # the position biases and one layer's scores
    return layer + scores
