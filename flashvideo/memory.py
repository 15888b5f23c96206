"""Bytes that the networks hold on a device: their weights, and what lives at once at the peak of a run.

What the VAE holds is in vae/memory.py.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from .config import TEXT_TOKENS, DiTConfig, T5Config, VAEConfig
from .dit import FlashVideoDiT, dit_tokens, tokens_per_chunk
from .t5 import t5_shapes
from .vae import VideoVAE

# What lives at once at the diffusion transformer's peak, in a layer, as tests/library/test_planner_costs.py measures:
# the tokens, their keys and values, and so many times the feed-forward activations of the piece that is worked on.
LAYER_SEQUENCES = 3
LAYER_EXPANDED = 1.75
# Latents in float32 that a sampler holds around the network: where it began, where it is, what the network is given,
# and the first of its two predictions.
SAMPLER_LATENTS = 4
FLOAT32_BYTES = 4


@lru_cache
def parameters(config: DiTConfig | VAEConfig | T5Config) -> int:
    """How many numbers the weights of a network are."""
    if isinstance(config, T5Config):
        return sum(math.prod(shape) for shape in t5_shapes(config).values())
    network = FlashVideoDiT(config, device="meta") if isinstance(config, DiTConfig) else vae_outline(config)
    return sum(weight.numel() for weight in network.parameters())


@lru_cache
def vae_outline(config: VAEConfig) -> VideoVAE:
    """The VAE without its numbers."""
    return VideoVAE(config, device="meta")


def dit_bytes(config: DiTConfig, shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cuda") -> float:
    """What one evaluation on one latent of `shape` (T, H, W) holds beside the weights and the latent.

    `device` is a device's type; a processor works in smaller pieces.
    """
    tokens = dit_tokens(config, shape) + TEXT_TOKENS
    piece = tokens_per_chunk(tokens, config.ff_dim, dtype.itemsize, device)
    layer = LAYER_SEQUENCES * tokens * config.hidden_size + LAYER_EXPANDED * piece * config.ff_dim
    rope = dit_tokens(config, shape) * config.head_dim * FLOAT32_BYTES  # a cosine and a sine for every second number
    return layer * dtype.itemsize + rope


def sampler_bytes(config: DiTConfig, shape: tuple[int, int, int]) -> float:
    """What a sampler holds around the evaluation, whose guided and unguided half run one after the other."""
    return SAMPLER_LATENTS * config.in_channels * math.prod(shape) * FLOAT32_BYTES


def t5_bytes(config: T5Config, dtype: torch.dtype, tokens: int = TEXT_TOKENS) -> float:
    """What encoding one prompt holds beside the weights: the gated halves of a layer, and the attention's scores."""
    layer = tokens * (3 * config.d_model + 2 * config.d_ff) * dtype.itemsize
    scores = 2 * config.num_heads * tokens**2 * FLOAT32_BYTES  # the position biases and one layer's scores
    return layer + scores
