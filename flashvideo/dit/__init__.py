"""The diffusion transformer: the network, its rotary positions, its work in pieces, and attention within tiles."""

from .network import (
    Attention,
    FlashVideoDiT,
    PatchEmbed,
    attention_sdpa,
    dit_tokens,
    sinusoid,
)

__all__ = [
    "Attention",
    "FlashVideoDiT",
    "PatchEmbed",
    "attention_sdpa",
    "dit_tokens",
    "sinusoid",
]
