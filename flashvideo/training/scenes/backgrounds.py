"""Backgrounds of procedural scenes: functions of place and time, with detail of 3 to 8 pixels at 256 rows.

Every painter takes a View and the scene, and returns [3, T, H, W] in [0, 1] (T may be 1 where nothing moves).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .patterns import coverage, pulse, table_cells, table_lookup
from .vocabulary import COLOURS, Colour, Scene

_SKY = ((0.42, 0.64, 0.92), (0.66, 0.82, 0.95))  # above, at the horizon


@dataclass(frozen=True)
class View:
    """The places of a picture's pixels: x [T, 1, W] and y [T, H, 1] in heights, time [T, 1, 1] in seconds."""

    x: Tensor
    y: Tensor
    time: Tensor
    pixel: float

    def shifted(self, scene: Scene) -> View:
        """The view that starts at a random place of the scene's world, so that tables look different each time."""
        draw = random.Random(f"place {scene.seed}")
        return View(self.x + draw.uniform(0, 50), self.y + draw.uniform(0, 50), self.time, self.pixel)


def paint(colour: Colour, like: Tensor) -> Tensor:
    """The colour as [3, 1, 1, 1]."""
    return torch.tensor(colour, device=like.device).view(3, 1, 1, 1)


def blend(below: Tensor, above: Tensor, amount: Tensor) -> Tensor:
    """Pictures [3, T, H, W] mixed by [T, H, W] in [0, 1]."""
    return torch.lerp(below, above, amount.expand(torch.broadcast_shapes(amount.shape, below.shape[1:]))[None])


def draw_background(scene: Scene, view: View) -> Tensor:
    """The scene's background, [3, T, H, W] in about [0, 1]."""
    return _PAINTERS[scene.background](scene, view)


def _between(colours: tuple[Colour, Colour], amount: Tensor) -> Tensor:
    first, second = (paint(colour, amount) for colour in colours)
    return first + (second - first) * amount.clamp(0, 1)[None]


def _sky(view: View) -> Tensor:
    return _between(_SKY, (view.y + 0.5) * 1.6)


def _hill(scene: Scene, view: View) -> Tensor:
    draw = random.Random(f"hill {scene.seed}")
    horizon = draw.uniform(-0.18, -0.02) + draw.uniform(0.05, 0.11) * torch.cos(
        draw.uniform(1.5, 3.0) * view.x + draw.uniform(0, 2 * math.pi)
    )
    grass = _between(((0.34, 0.64, 0.20), (0.16, 0.44, 0.10)), (view.y - horizon) * 1.3)
    at = view.shifted(scene)
    # Blades: grain three times as high as it is wide.
    blades = table_lookup("grain", at.x * 0.4, at.y * 0.13, view.pixel * 0.25)
    grass = grass * (1 + 0.22 * blades)[None]
    return blend(_sky(view), grass, coverage(horizon - view.y, view.pixel))


def _sea(scene: Scene, view: View) -> Tensor:
    draw = random.Random(f"sea {scene.seed}")
    horizon = draw.uniform(-0.3, -0.15)
    depth = (view.y - horizon).clamp(min=1e-3)
    water = _between(((0.22, 0.50, 0.78), (0.03, 0.20, 0.48)), depth * 1.5)
    # Rows of waves get closer towards the horizon; they roll towards the viewer.
    flow = 0.5 * view.time
    rows = 7 * torch.log(depth + 0.08)
    swell = 0.35 * torch.sin(9 * view.x / (depth + 0.4) + 3 * rows + flow)
    width = 7 * view.pixel / (depth + 0.08)
    crests = pulse(rows + swell - flow + draw.random(), 0.22, width)
    ripples = pulse(3.4 * (rows + 0.5 * swell) - 1.5 * flow, 0.5, 3.4 * width)
    water = water * (0.9 + 0.2 * ripples)[None]
    water = blend(water, paint((0.74, 0.88, 0.95), water), 0.75 * crests)
    return blend(_sky(view), water, coverage(horizon - view.y, view.pixel))


def _desert(scene: Scene, view: View) -> Tensor:
    draw = random.Random(f"desert {scene.seed}")
    picture = _sky(view)
    far = (-0.12, ((0.90, 0.76, 0.42), (0.82, 0.64, 0.32)))
    near = (0.12, ((0.86, 0.70, 0.36), (0.72, 0.52, 0.24)))
    for level, tones in (far, near):
        wave = draw.uniform(1.5, 3.5) * view.x + draw.uniform(0, 2 * math.pi)
        crest = level + draw.uniform(0.04, 0.09) * torch.sin(wave)
        below = view.y - crest
        # Ripples of the wind follow the dune's crest, 6 pixels at 256.
        bend = 0.012 * torch.sin(17 * view.x + 40 * level)
        ripples = pulse((below + bend) * 42, 0.5, 42 * view.pixel)
        sand = _between(tones, below * 2.2) * (0.92 + 0.14 * ripples)[None]
        picture = blend(picture, sand, coverage(-below, view.pixel))
    return picture


def _wall(scene: Scene, view: View) -> Tensor:
    at = view.shifted(scene)
    height, width, joint = 0.07, 0.16, 0.010  # 18 x 41 pixels at 256, joints of 2.5
    row = (at.y / height).floor()
    column = at.x / width + 0.5 * row.remainder(2)
    brick = pulse(column, 1 - joint / width, view.pixel / width)
    brick = brick * pulse(at.y / height, 1 - joint / height, view.pixel / height)
    tone = table_cells(*torch.broadcast_tensors(column.floor(), row))
    grain = table_lookup("grain", at.x * 0.5, at.y * 0.5, view.pixel * 0.5)
    stone = paint((0.45, 0.45, 0.47), at.x) * (1 + 0.2 * tone + 0.12 * grain)[None]
    return blend(paint((0.66, 0.66, 0.65), at.x), stone, brick)


def _forest(scene: Scene, view: View) -> Tensor:
    draw = random.Random(f"forest {scene.seed}")
    at = view.shifted(scene)
    tone = table_lookup("leaves", at.x, at.y, view.pixel)
    light = 0.85 + 0.15 * torch.sin(5 * view.x + draw.uniform(0, 6)) * torch.cos(6 * view.y + draw.uniform(0, 6))
    leaves = _between(((0.03, 0.10, 0.04), (0.36, 0.58, 0.16)), tone) * light[None]
    # Trunks stand where the leaves are dark.
    trunk = pulse(view.x / 0.45 + draw.random() + 0.02 * torch.sin(7 * view.y), 0.12, view.pixel / 0.45)
    bark = pulse(view.x / 0.016, 0.5, view.pixel / 0.016)
    wood = paint((0.26, 0.17, 0.10), at.x) * (0.8 + 0.4 * bark)[None]
    return blend(leaves, wood, trunk * coverage(tone - 0.62, 0.2))


def _night(scene: Scene, view: View) -> Tensor:
    at = view.shifted(scene)
    sky = _between(((0.02, 0.03, 0.10), (0.10, 0.10, 0.26)), view.y + 0.5)
    cell, radius = 0.075, 0.006  # stars of 3 pixels at 256
    column, row = torch.broadcast_tensors((at.x / cell).floor(), (at.y / cell).floor())
    shift_x, shift_y = table_cells(column, row), table_cells(column + 101, row + 57)
    distance = torch.hypot(at.x / cell - column - 0.5 - 0.3 * shift_x, at.y / cell - row - 0.5 - 0.3 * shift_y) * cell
    brightness = (table_cells(column + 31, row + 201) + 0.4).clamp(0, 1)
    # A star smaller than a pixel is dimmer, not larger.
    dimming = min(1.0, math.pi * radius**2 / view.pixel**2)
    star = coverage(distance - max(radius, view.pixel / 2), view.pixel) * brightness * dimming
    return blend(sky, paint((1.0, 0.97, 0.85), at.x), star)


def _plain(scene: Scene, view: View) -> Tensor:
    at = view.shifted(scene)
    # Softer than a subject of that colour, and woven: threads of 4 pixels at 256.
    colour = tuple(0.72 * value + 0.28 * 0.55 for value in COLOURS[scene.background_colour])
    period = 1 / 64
    threads = (2 * pulse(axis / period, 0.5, view.pixel / period) - 1 for axis in (at.x, at.y))
    weave = 0.05 * next(threads) + 0.05 * next(threads)
    light = 0.06 * torch.cos(2 * view.x) * torch.cos(2.5 * view.y)
    return paint(colour, at.x) * (1 + weave + light)[None]


def _page(scene: Scene, view: View) -> Tensor:
    at = view.shifted(scene)
    ink = table_lookup("print", at.x, at.y, view.pixel)
    return blend(paint((0.90, 0.87, 0.79), at.x), paint((0.24, 0.24, 0.30), at.x), 0.8 * ink)


_PAINTERS: dict[str, Callable[[Scene, View], Tensor]] = {
    "hill": _hill,
    "sea": _sea,
    "desert": _desert,
    "wall": _wall,
    "forest": _forest,
    "night": _night,
    "plain": _plain,
    "page": _page,
}
