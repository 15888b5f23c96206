"""Stage II with absolute sinusoidal positions instead of rotary ones, as CogVideoX-2B has them (FlashVideo figure 8).

For comparison only: parameter names and sizes are those of `FlashVideoDiT`, so that both are trained and saved alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...config import DiTConfig
from ...dit import FlashVideoDiT, PatchEmbed, sinusoid
from ...dit.rope import per_token, rope_axes


def sinusoidal_positions(frames: int, rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Embedding of every video token's frame, row and column, in the tokens' order: [frames * rows * columns, width].

    The width is shared among the axes as rotary positions share a head's: a quarter for time, the rest for rows and
    columns. Positions are plain integers. Raises ValueError if `width` is no multiple of 16.
    """
    sizes = zip((frames, rows, columns), rope_axes(width), strict=True)
    return per_token(*(sinusoid(torch.arange(length, device=device), part) for length, part in sizes))


class AbsolutePatchEmbed(PatchEmbed):
    """Patches and text as one sequence, each video token with its position added."""

    def forward(self, latent: Tensor, context: Tensor) -> Tensor:
        """[B, C, T, H, W] and [B, L, text_dim] -> [B, L + T * H/2 * W/2, hidden]."""
        tokens = super().forward(latent, context)
        patch = self.proj.stride[0]
        frames, rows, columns = latent.shape[2], latent.shape[3] // patch, latent.shape[4] // patch
        positions = sinusoidal_positions(frames, rows, columns, tokens.shape[-1], latent.device)
        text, video = tokens.tensor_split((context.shape[1],), dim=1)
        return torch.cat((text, video + positions.to(video.dtype)), dim=1)


class AbsolutePositionsDiT(FlashVideoDiT):
    """A FlashVideo network that knows where a token is by what is added to it; nothing is rotated."""

    def __init__(self, config: DiTConfig, **factory: Any) -> None:
        super().__init__(config, **factory)
        layers = {"operations": torch.nn, **{name: value for name, value in factory.items() if value is not None}}
        self.patch_embed = AbsolutePatchEmbed(config, **layers)

    def rope(self, frames: int, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Turn by no angle: ones and zeros, [frames * rows * columns, head_dim / 2]."""
        shape = frames * rows * columns, self.config.head_dim // 2
        return torch.ones(shape, device=device), torch.zeros(shape, device=device)
