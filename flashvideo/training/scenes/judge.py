"""Judges by rule whether a video shows the colour, shape and direction that a prompt in the scenes' words asks for.

The subject is the largest patch of the wanted colour that isn't background; its outline is compared with every
shape's in every position, its way with the eight directions. Made for procedural scenes and models trained on them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .patterns import SHAPE_DISTANCES
from .vocabulary import COLOURS

_ROWS = 64  # videos are judged at this height
_NEAR = 0.10  # Oklab distance up to which a pixel counts as of a colour
_SMALLEST, _LARGEST = 0.006, 0.35  # of the picture, for a subject
_MOVES, _GROWS, _TURNS = 0.11, 0.30, 0.17  # heights; logarithm of the area; part of the outline that changes
_SIDE = 40  # of outlines compared, in cells
_REACH = 1.8  # half an outline's side, in radii of the disc of the same area


@torch.no_grad()
def judge(video: Tensor, wanted: Mapping[str, str]) -> dict[str, bool]:
    """Whether video [3, T, H, W] in [-1, 1] shows the wanted "colour", "shape" and "direction"; one bool for each.

    `wanted` is what `parse_prompt` gives. Shape and direction are those of the thing of the wanted colour: without
    it, all three are False.
    """
    masks = _find(_small(video), wanted["colour"])
    seen = masks.flatten(1).any(1)
    if seen.float().mean() < 0.6:
        return {"colour": False, "shape": False, "direction": False}
    masks = masks[seen]
    return {
        "colour": True,
        "shape": _shape(masks) == wanted["shape"],
        "direction": _direction(masks) == wanted["direction"],
    }


def _small(video: Tensor) -> Tensor:
    """[3, T, H, W] in [-1, 1] -> [T, 3, 64, W'] in [0, 1]."""
    pictures = video.detach().float().cpu().transpose(0, 1) / 2 + 0.5
    columns = round(_ROWS * video.shape[-1] / video.shape[-2])
    return F.interpolate(pictures, (_ROWS, columns), mode="area").clamp(0, 1)


def _oklab(rgb: Tensor) -> Tensor:
    """sRGB [..., 3] -> Oklab [..., 3] (Björn Ottosson 2020)."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_cones = torch.tensor(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = torch.tensor(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return (linear @ to_cones.T).clamp(min=0) ** (1 / 3) @ to_lab.T


@lru_cache(maxsize=1)
def _tones() -> Tensor:
    """Oklab tones of each colour, from itself to the darkest that textures mix it with, [colours, tones, 3]."""
    tones = []
    for colour in COLOURS.values():
        base = torch.tensor(colour)
        shade = torch.full((3,), 0.30) if max(colour) < 0.2 else base * 0.5
        tones.append(torch.stack([torch.lerp(base, shade, amount / 4) for amount in range(5)]))
    return _oklab(torch.stack(tones))


def _find(pictures: Tensor, colour: str) -> Tensor:
    """The subject of that colour in each picture [T, 3, H, W], as bool [T, H, W]; empty where there is none."""
    pixels, tones = _oklab(pictures.movedim(1, -1)), _tones()
    # To every tone at once; not by a product of matrices, which loses digits.
    apart = torch.cdist(pixels.reshape(-1, 3), tones.view(-1, 3), compute_mode="donot_use_mm_for_euclid_dist")
    distance = apart.view(*pixels.shape[:-1], *tones.shape[:2]).amin(-1).movedim(-1, 0)  # [colours, T, H, W]
    mine = list(COLOURS).index(colour)
    mask = (distance.argmin(0) == mine) & (distance[mine] < _NEAR)
    # Closed: dark lines of a texture don't tear it apart.
    closed = -F.max_pool2d(-F.max_pool2d(mask.float()[:, None], 3, 1, 1), 3, 1, 1)
    return _largest_patch(closed[:, 0] > 0.5)


def _largest_patch(mask: Tensor) -> Tensor:
    """The largest connected part of each [T, H, W] that has the size of a subject."""
    frames, rows, columns = mask.shape
    inside = mask.float()
    # Every pixel takes the highest number in its patch.
    labels = inside * torch.arange(1, rows * columns + 1).view(1, rows, columns)
    while True:
        spread = F.max_pool2d(labels[:, None], 3, 1, 1)[:, 0] * inside
        if torch.equal(spread, labels):
            break
        labels = spread
    patches = torch.zeros_like(mask)
    for frame in range(frames):
        names, areas = labels[frame][mask[frame]].unique(return_counts=True)
        fits = (areas > _SMALLEST * rows * columns) & (areas < _LARGEST * rows * columns)
        if fits.any():
            patches[frame] = labels[frame] == names[(areas * fits).argmax()]
    return patches


def _measures(masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Middle (x, y) and area of each mask, in heights."""
    weights = masks.float()
    area = weights.sum((1, 2))
    y = (weights.sum(2) * torch.arange(masks.shape[1])).sum(1) / area
    x = (weights.sum(1) * torch.arange(masks.shape[2])).sum(1) / area
    return x / _ROWS, y / _ROWS, area / _ROWS**2


def _outlines(masks: Tensor) -> Tensor:
    """Masks moved to the middle and brought to the same area, [T, 40, 40] in [0, 1]."""
    x, y, area = _measures(masks)
    reach = _REACH * (area / math.pi).sqrt() * _ROWS
    steps = (torch.arange(_SIDE) + 0.5) / _SIDE * 2 - 1
    rows, columns = masks.shape[1:]
    across = ((x * _ROWS)[:, None] + steps * reach[:, None] + 0.5) / columns * 2 - 1
    down = ((y * _ROWS)[:, None] + steps * reach[:, None] + 0.5) / rows * 2 - 1
    grid = torch.stack((across[:, None, :].expand(-1, _SIDE, -1), down[:, :, None].expand(-1, -1, _SIDE)), -1)
    return F.grid_sample(masks.float()[:, None], grid, align_corners=False)[:, 0]


@lru_cache(maxsize=1)
def _templates() -> tuple[Tensor, list[str]]:
    """Outlines of every shape, turned by steps of 6 degrees, [N, 40, 40], and whose they are."""
    steps = torch.linspace(-1.3, 1.3, 2 * _SIDE)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    outlines, names = [], []
    for name, distance in SHAPE_DISTANCES.items():
        for angle in range(0, 120, 6):
            cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            outlines.append(distance(x * cos + y * sin, y * cos - x * sin) < 0)
            names.append(name)
    return _outlines(torch.stack(outlines)), names


def _overlap(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of outlines that broadcast."""
    return torch.minimum(first, second).sum((-1, -2)) / torch.maximum(first, second).sum((-1, -2))


def _shape(masks: Tensor) -> str:
    """The shape that most frames agree with best; frames in which the subject is cut off count less by themselves."""
    templates, names = _templates()
    overlaps = _overlap(_outlines(masks)[:, None], templates)  # [T, N]
    best = {name: overlaps[:, [other == name for other in names]].amax(1).mean().item() for name in SHAPE_DISTANCES}
    return max(best, key=best.__getitem__)


def _direction(masks: Tensor) -> str:
    x, y, area = _measures(masks)
    time = torch.linspace(-0.5, 0.5, len(masks))

    def change(values: Tensor) -> float:
        """From the first frame to the last, by linear regression."""
        return ((values * time).sum() / (time * time).sum()).item()

    right, down, growth = change(x), change(y), change(area.log())
    if max(abs(right), abs(down)) > _MOVES:
        if abs(right) > abs(down):
            return "right" if right > 0 else "left"
        return "down" if down > 0 else "up"
    if abs(growth) > _GROWS:
        return "grows" if growth > 0 else "shrinks"
    outlines = _outlines(masks)
    turned = 1 - _overlap(outlines[:, None], outlines).amin()
    return "rotates" if turned > _TURNS else "still"
