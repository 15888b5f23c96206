"""Stage II over a large picture in tiles: less memory per evaluation, but the network never sees the whole picture.

An approximation that the user chooses. The network sees one tile at a time, with the tile's own positions, and the
velocities of overlapping tiles are averaged at every evaluation, as `windows` does over time (MultiDiffusion, arXiv
2302.08113). So no borders are visible, but the parts of things larger than a tile don't know each other.

Memory depends on the tile. Overlaps are computed twice, so the time falls only where attention dominates and the
picture is several tiles large: at 1072x1920x49 tiles of 768 take half of attention's operations and 1.7 times the
others, at 544x960 tiles of 512 take 1.5 and 3 times.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import PIXEL_MULTIPLE, SPATIAL_FACTOR
from ..samplers import Velocity
from .windows import Piece, blend

SMALLEST_TILE_PIXELS = 128  # pixels
OVERLAP_DIVISOR = 4  # neighbours share at least 1/4 of a tile's side


def plan_tiles(height: int, width: int, tile: int) -> list[Piece]:
    """Tiles of a latent of `height` x `width` latent pixels, both even.

    `tile` is the side of a square in video pixels, a multiple of 16; neighbours share a quarter of it or more. A side
    shorter than a tile isn't split. Raises ValueError for an invalid tile.
    """
    if tile < SMALLEST_TILE_PIXELS or tile % PIXEL_MULTIPLE:
        raise ValueError(f"a tile's side is a multiple of 16 pixels, at least {SMALLEST_TILE_PIXELS}; got {tile}.")
    rows, columns = (_cut(side, tile // SPATIAL_FACTOR) for side in (height, width))
    every = slice(None)
    return [
        Piece((every, every, every, down, across), row_weight[:, None] * column_weight)
        for down, row_weight in rows
        for across, column_weight in columns
    ]


def _cut(length: int, tile: int) -> list[tuple[slice, Tensor]]:
    """Slices of one side, evenly spread at even positions, and their weights: raised cosines over the overlaps."""
    step, tile = tile - math.ceil(tile / OVERLAP_DIVISOR), min(tile, length)
    count = 1 + math.ceil((length - tile) / step)
    starts = [2 * round(index * (length - tile) / max(count - 1, 1) / 2) for index in range(count)]
    shared = tile - max((after - before for before, after in zip(starts, starts[1:], strict=False)), default=tile)
    from_end = torch.minimum(torch.arange(tile), torch.arange(tile).flip(0)) + 1.0
    fade = torch.sin(math.pi / 2 * (from_end / (shared + 1)).clamp(max=1)).square()
    sums = torch.zeros(length)
    for start in starts:
        sums[start : start + tile] += fade
    return [(slice(start, start + tile), fade / sums[start : start + tile]) for start in starts]


def tiled_velocity(velocity: Velocity, tile: int) -> Velocity:
    """A velocity of the whole latent from a velocity of tiles of `tile` video pixels."""

    def tiled(latent: Tensor, time: Tensor) -> Tensor:
        pieces = plan_tiles(*latent.shape[3:], tile)
        if len(pieces) == 1:
            return velocity(latent, time)
        return blend(pieces, lambda piece: velocity(latent[piece.at], time), latent)

    return tiled
