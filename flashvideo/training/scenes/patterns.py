"""Patterns in the plane at any resolution, each averaged over a pixel: shapes, stripes, dots, checks, noise, print.

Coordinates are in heights of the picture, `pixel` is the side of one. Averaging is exact where the pattern is a product
of square waves; tables are averaged over two's powers of their cells. So detail finer than a pixel vanishes as it does
for a camera, instead of aliasing, and a small picture of a scene is what remains of the large one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

TABLE_SIDE = 256  # cells of a table; one cell is 1 / 256 of the picture's height
_SQRT3 = math.sqrt(3)


def coverage(distance: Tensor, pixel: float | Tensor) -> Tensor:
    """How much of a pixel is inside, in [0, 1], from the signed distance of its middle (negative inside)."""
    return (0.5 - distance / pixel).clamp(0, 1)


def pulse(position: Tensor, duty: float, width: float | Tensor) -> Tensor:
    """A wave of period 1 that is 1 for the first `duty` of it, else 0, averaged over `width` periods; in [0, 1]."""

    def integral(at: Tensor) -> Tensor:
        whole = at.floor()
        return whole * duty + (at - whole).clamp(max=duty)

    return (integral(position + width / 2) - integral(position - width / 2)) / width


def dots(x: Tensor, y: Tensor, period: float, pixel: float | Tensor) -> Tensor:
    """Round dots on a square grid, a third of the plane; in [0, 1]."""
    x, y = x / period, y / period
    distance = torch.hypot(x - x.floor() - 0.5, y - y.floor() - 0.5)
    return coverage((distance - 0.33) * period, pixel)


def checks(x: Tensor, y: Tensor, period: float, pixel: float | Tensor) -> Tensor:
    """A chessboard with fields of half a period; in [0, 1]."""
    along, across = (2 * pulse(axis / period, 0.5, pixel / period) - 1 for axis in (x, y))
    return 0.5 + 0.5 * along * across


# Signed distances of shapes of about the same area, in radii; near enough to Euclidean at the edge to smooth it there.


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.92


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.8


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    lower = y - 0.25
    return torch.maximum((_SQRT3 * x.abs() - lower) / 2 - 0.55, lower - 0.55)


def _star(x: Tensor, y: Tensor) -> Tensor:
    # Folded into one tenth: from a point (angle 0, radius 1.12) to the next inner corner (36 degrees, radius 0.45).
    angle = torch.atan2(x, -y)
    sector = 2 * math.pi / 5
    folded = (angle - sector * (angle / sector).round()).abs()
    radius = torch.hypot(x, y)
    u, v = radius * folded.cos(), radius * folded.sin()
    inner = (0.45 * math.cos(sector / 2), 0.45 * math.sin(sector / 2))
    edge = (inner[0] - 1.12, inner[1])
    length = math.hypot(*edge)
    return ((u - 1.12) * edge[1] - v * edge[0]) / length


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.75).abs() - 0.25


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - 0.95, y - 0.32), torch.maximum(x - 0.32, y - 0.95))


SHAPE_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
SHAPE_REACH = 1.2  # no shape is larger, in radii


def table_lookup(name: str, x: Tensor, y: Tensor, pixel: float) -> Tensor:
    """A table's value at places [T, H, W] (x and y may be broadcast), repeated over the plane, averaged over a pixel.

    `name` is "grain" (independent cells in [-1, 1]), "leaves" (tones in [0, 1]) or "print" (1 is ink).
    """
    level = max(0, round(math.log2(pixel * TABLE_SIDE)))
    table = _mip(name, min(level, 7), str(x.device))
    side = table.shape[-1] - 1
    # A cell's value stands for its middle, hence the half.
    places = [(axis * (TABLE_SIDE / 2**level) - 0.5).remainder(side) * (2 / side) - 1 for axis in (x, y)]
    grid = torch.stack(torch.broadcast_tensors(*places), -1)  # [T, H, W, 2]
    table = table.expand(grid.shape[0], 1, -1, -1)
    return F.grid_sample(table, grid, mode="bilinear", padding_mode="border", align_corners=True)[:, 0]


def table_cells(x: Tensor, y: Tensor) -> Tensor:
    """A number in [-1, 1] for each pair of whole numbers: the same one for every place in a brick, for example."""
    table = _mip("grain", 0, str(x.device))[0, 0]
    return table[y.long().remainder(TABLE_SIDE), x.long().remainder(TABLE_SIDE)]


@lru_cache(maxsize=64)
def _mip(name: str, level: int, device: str) -> Tensor:
    table = _TABLES[name]()[None, None]
    if level:
        table = F.avg_pool2d(table, 2**level)
    # One more row and column, so that reading between the last cell and the first is reading inside the table.
    return F.pad(table, (0, 1, 0, 1), mode="circular").to(device)


def _grain() -> Tensor:
    return 2 * torch.rand(TABLE_SIDE, TABLE_SIDE, generator=torch.Generator().manual_seed(1)) - 1


def _leaves() -> Tensor:
    """Layers of leaves, one in each cell of a jittered grid, the upper ones in front and lighter."""
    generator = torch.Generator().manual_seed(2)
    rows, columns = torch.meshgrid(*(torch.arange(float(TABLE_SIDE)),) * 2, indexing="ij")
    tones = torch.full_like(rows, 0.1)
    spacing, layers = 8, 5
    cells = TABLE_SIDE // spacing
    for layer in range(layers):
        shift_x, shift_y, turn, tone = torch.rand(4, cells, cells, generator=generator)
        for near_y in (-1, 0, 1):
            for near_x in (-1, 0, 1):
                cell_y, cell_x = rows.div(spacing).floor() + near_y, columns.div(spacing).floor() + near_x
                index = cell_y.long().remainder(cells), cell_x.long().remainder(cells)
                dx = columns - (cell_x + shift_x[index]) * spacing
                dy = rows - (cell_y + shift_y[index]) * spacing
                angle = turn[index] * math.pi
                along, across = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
                inside = coverage(torch.hypot(along / 4.5, across / 2.2) - 1, 0.4)
                tones = torch.lerp(tones, (layer + 1 + 1.5 * tone[index]) / (layers + 1.5), inside)
    return tones


def _print() -> Tensor:
    """Rows of words in an alphabet of 24 random letters, 3 x 5 strokes of 2 cells each."""
    generator = torch.Generator().manual_seed(3)
    alphabet = (torch.rand(24, 5, 3, generator=generator) < 0.55).float()
    alphabet[:, :, 0] = alphabet[:, :, 0].maximum((torch.rand(24, 1, generator=generator) < 0.6).float())
    table = torch.zeros(TABLE_SIDE, TABLE_SIDE)
    for row in range(0, TABLE_SIDE, 16):
        for column in range(0, TABLE_SIDE, 8):
            letter, space = torch.rand(2, generator=generator).tolist()
            if space > 0.2:
                glyph = alphabet[int(letter * 24)].repeat_interleave(2, 0).repeat_interleave(2, 1)
                table[row + 3 : row + 13, column : column + 6] = glyph
    return table


_TABLES: dict[str, Callable[[], Tensor]] = {"grain": _grain, "leaves": _leaves, "print": _print}
