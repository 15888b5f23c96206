"""What an encode or decode of the VAE holds in memory at its peak, and the spatial tiles that fit into a budget.

Time passes in chunks, so the length hardly counts. At the peak a residual block holds its input, the normed copy and
a convolution's output, or its input and both of the second half; beside it lie the frames that every convolution
keeps for the next chunk, and the windows of time in which a large convolution runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .config import SPATIAL_FACTOR, TEMPORAL_FACTOR
from .vae import DECODE_CHUNK, ENCODE_CHUNK, Decoder, Encoder, Unit, VideoVAE
from .vae_layers import KERNEL_SIZE, WINDOW_ELEMENTS

LOOK_BACK = KERNEL_SIZE - 1  # frames that a convolution keeps
# Of a convolution too large for one go, pieces of WINDOW_ELEMENTS that live at once: a window with the frames before
# it, what it is joined from, its result. A smaller one copies its input once.
WINDOWS = 3
SMALLEST_TILE = 4  # latent pixels a side: 32 pixels


@dataclass(frozen=True)
class TilePlan:
    """How a half of the VAE runs in tiles: units that run together, and the longest side of a tile in latent pixels.

    Between two groups the whole picture is stored. `device_bytes` is what a tile holds at its peak, `stored_bytes`
    what is stored at once.
    """

    groups: tuple[tuple[Unit, ...], ...]
    side: int
    device_bytes: float
    stored_bytes: float


def decode_bytes(vae: VideoVAE, shape: Sequence[int], dtype: torch.dtype) -> float:
    """Bytes for decoding one latent of `shape` [B, 16, T, h, w] in one piece, the whole video included."""
    _, _, latents, rows, columns = shape
    frames = TEMPORAL_FACTOR * (latents - 1) + 1
    whole = vae.config.image_channels * frames * rows * columns * SPATIAL_FACTOR**2
    return (_elements(vae.decoder.units(), latents, rows * columns, DECODE_CHUNK + 1) + whole) * dtype.itemsize


def encode_bytes(vae: VideoVAE, shape: Sequence[int], dtype: torch.dtype) -> float:
    """Bytes for encoding one video of `shape` [B, 3, T, H, W] in one piece, the video included."""
    _, channels, frames, height, width = shape
    area = height * width / SPATIAL_FACTOR**2
    elements = _elements(vae.encoder.units(), _latents(frames), area, ENCODE_CHUNK // TEMPORAL_FACTOR + 1)
    return (elements + channels * frames * height * width) * dtype.itemsize


def plan_tiles(
    network: Encoder | Decoder,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    budget: float,
    store_budget: float,
    side: int | None = None,
) -> TilePlan:
    """The largest tiles for a latent size [T, h, w] that hold no more than `budget` bytes, or the smallest there are.

    Between groups of units at most `store_budget` bytes are stored, more often than that the work of a group is
    repeated for every norm in it. `side` asks for tiles no larger than that.
    """
    latents, rows, columns = size
    groups, stored = _groups(network.units(), latents, rows * columns, store_budget / dtype.itemsize)
    chunk = (DECODE_CHUNK if isinstance(network, Decoder) else ENCODE_CHUNK // TEMPORAL_FACTOR) + 1
    side = min(side or max(rows, columns), max(rows, columns))
    while True:
        held = max(_tile_elements(group, latents, (rows, columns), side, chunk) for group in groups) * dtype.itemsize
        if held <= budget or side <= SMALLEST_TILE:
            return TilePlan(groups, side, held, stored * dtype.itemsize)
        side = max(SMALLEST_TILE, (side + 1) // 2)


def reaches(units: Sequence[Unit]) -> list[int]:
    """How far beyond a tile each unit's input must reach, in latent pixels, for a right result of the last."""
    total, found = 0, []
    for unit in reversed(units):
        total += unit.reach
        found.append(-(-total // SPATIAL_FACTOR))
    return found[::-1]


def _groups(units: Sequence[Unit], latents: int, area: int, store: float) -> tuple[tuple[tuple[Unit, ...], ...], float]:
    """Cut wherever the result for the whole picture, beside another of its kind, is small enough to be stored."""
    groups, group, stored = [], [], 0.0
    for unit in units:
        group.append(unit)
        result = unit.channels * ((latents - 1) * unit.out_time + 1) * unit.out_scale**2 * area
        if 2 * result <= store:
            groups.append(tuple(group))
            group, stored = [], max(stored, 2 * result)
    if group:
        groups.append(tuple(group))
    return tuple(groups), stored


def _tile_elements(units: Sequence[Unit], latents: int, picture: tuple[int, int], side: int, chunk: int) -> float:
    reach = 0 if side >= max(picture) else 2 * reaches(units)[0]
    rows, columns = (min(length, side + reach) for length in picture)
    return _elements(units, latents, rows * columns, chunk)


def _elements(units: Sequence[Unit], latents: int, area: float, chunk: int) -> float:
    """Numbers held for chunks of `chunk` latent frames of `latents`, over `area` latent pixels."""
    peak = kept = largest = 0.0
    for unit in units:
        frames = (min(latents, chunk) - 1) * unit.time + 1
        positions = unit.scale**2 * area
        block = unit.inputs + max(unit.inputs + unit.channels, 2 * unit.channels)
        peak = max(peak, frames * positions * block)
        largest = max(largest, (frames + LOOK_BACK) * positions * max(unit.inputs, unit.channels))
        if latents > chunk:
            kept += LOOK_BACK * positions * (unit.inputs + (unit.channels if unit.norms > 1 else 0))
    return peak + kept + min(WINDOWS * WINDOW_ELEMENTS, largest)


def _latents(frames: int) -> int:
    return (frames - 1) // TEMPORAL_FACTOR + 1
