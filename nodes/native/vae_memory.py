"""What an encode or decode of the VAE holds in memory at its peak, for ComfyUI to make room.

Time passes in chunks, so the length hardly counts. At the peak a residual block holds its input, the normed copy and
a convolution's output; beside it lie the frames that every convolution keeps for the next chunk, and the windows of
time in which a large convolution runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import comfy.model_management
import torch

from ...flashvideo.config import SPATIAL_FACTOR, TEMPORAL_FACTOR, VAEConfig
from ...flashvideo.vae import DECODE_CHUNK, ENCODE_CHUNK, LEVELS, TIME_LEVELS
from ...flashvideo.vae_layers import KERNEL_SIZE, WINDOW_ELEMENTS

LOOK_BACK = KERNEL_SIZE - 1  # frames that a convolution keeps
# Of a convolution too large for one go, pieces of WINDOW_ELEMENTS that live at once: a window with the frames before
# it, what it is joined from, its result. A smaller one copies its input once.
WINDOWS = 3


@dataclass(frozen=True)
class _Level:
    """One resolution of the network as a chunk passes it."""

    before: int  # channels that come in
    width: int
    blocks: int
    area: float  # positions to one pixel of the video
    frames: int


def decode_bytes(config: VAEConfig, shape: Sequence[int], dtype: torch.dtype) -> float:
    """Bytes for decoding one latent of `shape` [B, 16, T, h, w]."""
    _, _, latents, rows, columns = shape
    frames = min(latents, DECODE_CHUNK + 1)
    before = config.base_channels * config.channel_multipliers[-1]
    levels = []
    for index, multiplier in enumerate(reversed(config.channel_multipliers)):
        width = config.base_channels * multiplier
        levels.append(_Level(before, width, config.decoder_blocks, 4.0 ** (index + 1 - LEVELS), frames))
        frames = 2 * frames - 1 if index < TIME_LEVELS else frames
        before = width
    whole = config.image_channels * (TEMPORAL_FACTOR * (latents - 1) + 1)
    pixels = rows * columns * SPATIAL_FACTOR**2
    return _bytes(levels, whole, pixels, latents > DECODE_CHUNK + 1, dtype)


def encode_bytes(config: VAEConfig, shape: Sequence[int], dtype: torch.dtype) -> float:
    """Bytes for encoding one video of `shape` [B, 3, T, H, W]."""
    _, _, length, rows, columns = shape
    frames = min(length, ENCODE_CHUNK + 1)
    before = config.base_channels
    levels = []
    for index, multiplier in enumerate(config.channel_multipliers):
        width = config.base_channels * multiplier
        levels.append(_Level(before, width, config.encoder_blocks, 4.0**-index, frames))
        frames = (frames + 1) // 2 if index < TIME_LEVELS else frames
        before = width
    return _bytes(levels, config.image_channels * length, rows * columns, length > ENCODE_CHUNK + 1, dtype)


def _bytes(levels: Iterable[_Level], whole: int, pixels: int, chunked: bool, dtype: torch.dtype) -> float:
    """`whole`: elements a pixel of the complete video, which stays."""
    peaks, kept, inputs = [], 0.0, []
    for level in levels:
        # The first residual block: its input, the normed copy, a convolution's output. The others: the same three,
        # and the level's input, which lives as long as the level.
        first, others = 2 * level.before + level.width, level.before + 3 * level.width
        peaks.append(level.frames * (max(first, others) if level.blocks > 1 else first) * level.area)
        inputs.append((level.frames + LOOK_BACK) * level.before * level.area)
        if chunked:
            kept += LOOK_BACK * (level.before + (2 * level.blocks - 1) * level.width) * level.area
    windows = min(WINDOWS * WINDOW_ELEMENTS, max(inputs) * pixels)
    elements = (max(peaks) + kept + whole) * pixels + windows
    return elements * comfy.model_management.dtype_size(dtype)
