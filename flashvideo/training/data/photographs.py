"""Moving photographs: a camera pans, zooms and turns over them, and their layers move at different speeds.

Each picture averages moments of about half a frame's time, as a camera's shutter does. They are averaged in linear
light, not in the file's levels (a square approximates the display's curve).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TrainingError
from ..randomness import generator_for
from ..scenes.rendering import FRAME_RATE
from .camera import FASTEST, Motion, Path, follow, random_motion
from .clip_library import Clip, ClipLibrary, digest_of
from .held_out import TRAIN, VALIDATION

VERSION = 1  # goes up whenever the same seed gives another clip: latents made before count no more
SPEEDS = (0.05, 1.0)  # picture heights a second
SHUTTER = (0.35, 0.65)  # of a frame's time; 0.5 is cinema's half-turn shutter
_LAYERS = (5, 3, 2)  # weights of one layer, two and three
_NEARNESS = (0.25, 0.75)  # how fast the next layer behind moves, against the one before it
_STEP = 1.0  # pixels between the moments that are averaged, at most: at 2 a thin line leaves a comb
_MOST_MOMENTS = 64
_AT_ONCE = 8  # moments: as many as stay in a processor's cache
_NEAREST_FROM = 6  # moments: so many nearest samples together are as good as bilinear ones, and faster
_FINER = 2  # samples a pixel of what is looked up: bilinear between them hardly softens
_MOST_SHRINK = 4.0  # pixels of the photograph for one of the clip, at most; 1 at least
_ROOM = 2  # times the clip's height and width: photographs that are smaller are taken only if there is no such one
_SAME_PHOTOGRAPH = 0.5  # how often a layer is of the photograph before it
_TRIES, _ENOUGH = 3, 1.0  # positions and photographs are drawn again where neighbours differ less, in levels of 255
_SLOWER = (1.0, 0.7, 0.5, 0.35, 0.2, 0.1, 0.0)  # tried one after the other where a photograph has no room for a path
_COVER = (0.15, 0.45)  # of a layer, how much it covers
_BLOB = (0.35, 0.9)  # picture heights between the bulges of a layer's outline
_SOFT = (0.004, 0.05)  # picture heights from outside to inside of an outline


@dataclass(frozen=True)
class _Layer:
    """A piece of a photograph in linear light and its cover, at several resolutions, each half of the one before."""

    levels: tuple[Tensor, ...]  # each [3 or 4, h, w]: colours times cover, and the cover if not all of it is 1
    path: Path
    origin: Tensor  # [2], where the piece begins, in picture heights
    scale: float  # samples of the first level a picture height


class MovingPhotographs:
    """Clips of `frames` x `height` x `width` made of the stills of a library; a sample depends only on seed and index.
    `split`: "train", or another for the stills that are held out. Raises TrainingError if there are none.
    """

    def __init__(
        self,
        library: ClipLibrary,
        height: int,
        width: int,
        frames: int,
        seed: int,
        *,
        split: str = TRAIN,
        speeds: tuple[float, float] = SPEEDS,
        rate: float = FRAME_RATE,
    ) -> None:
        self.library, self.height, self.width, self.frames = library, height, width, frames
        self.seed, self.split, self.speeds, self.rate = seed, split, speeds, rate
        stills = [clip for clip in library.of_split(TRAIN if split == TRAIN else VALIDATION) if clip.frames == 1]
        stills = [clip for clip in stills if clip.height >= height and clip.width >= width]
        if not stills:
            what = "" if split == TRAIN else " that is held out"
            raise TrainingError(f"{library.folder} holds no photograph{what} of at least {width}x{height} pixels.")
        roomy = [clip for clip in stills if clip.height >= _ROOM * height and clip.width >= _ROOM * width]
        self.stills = roomy or stills

    @property
    def digest(self) -> str:
        """A hash of everything that samples depend on besides the settings."""
        return digest_of(self.stills, VERSION)

    def sample(self, index: int) -> tuple[Tensor, str]:
        """Clip `index`, [3, T, H, W] in [-1, 1], and the caption of its photograph."""
        draw = random.Random(f"{self.seed} {self.split} photograph {index}")
        speed = _log_uniform(draw, self.speeds)
        motion = random_motion(draw, speed, self.frames / self.rate)
        shutter = draw.uniform(*SHUTTER)
        depth = 1 + draw.choices(range(len(_LAYERS)), weights=_LAYERS)[0]
        times = self._moments(speed, shutter)
        nearness, still = 1.0, None
        layers = []
        for number in range(depth):  # the nearest first: it moves at the clip's speed
            again = still is not None and draw.random() < _SAME_PHOTOGRAPH
            candidates = [still if again else draw.choice(self.stills) for _ in range(_TRIES)]
            covers = number < depth - 1
            outline = generator_for(self.seed, self.split, "outline", index, number) if covers else None
            still, layer = self._layer(candidates, motion.farther(nearness), times, draw, outline)
            layers.append(layer)
            nearness *= draw.uniform(*_NEARNESS)
        video = self._exposed(layers[::-1], times.shape)
        return video * 2 - 1, still.caption

    def _moments(self, speed: float, shutter: float) -> Tensor:
        """[T, K] times that are averaged for each frame, in seconds."""
        pixels = speed * FASTEST * shutter / self.rate * self.height
        count = min(max(1, math.ceil(pixels / _STEP)), _MOST_MOMENTS)
        within = (torch.arange(count) + 0.5) / count * shutter
        return (torch.arange(self.frames)[:, None] + within) / self.rate

    def _layer(
        self,
        candidates: Sequence[Clip],
        motion: Motion,
        times: Tensor,
        draw: random.Random,
        outline: torch.Generator | None,
    ) -> tuple[Clip, _Layer]:
        """A layer of the first candidate that shows enough, or the last one; with a generator, it has an outline."""
        for still in candidates:
            path, piece, origin = self._placed(still, motion, times, draw)
            if _detail(piece) >= _ENOUGH:
                break
        height, width = piece.shape[1:]
        light = piece.square()
        if outline is not None:
            cover = _cover(outline, height, width, self.height, draw)
            light = torch.cat((light * cover, cover))
        levels = [light]
        for _ in range(math.ceil(math.log2(float(path.zoom.max())) - 1e-6)):
            sides = [max(2, side // 2) for side in levels[-1].shape[1:]]
            half = F.interpolate(levels[-1][None], sides, mode="bilinear", antialias=True, align_corners=False)
            levels.append(half[0])
        return still, _Layer(tuple(_enlarged(level) for level in levels), path, origin, float(self.height))

    def _placed(self, still: Clip, motion: Motion, times: Tensor, draw: random.Random) -> tuple[Path, Tensor, Tensor]:
        """Put a camera's path somewhere on a photograph, slower if it has no room.

        Returns the path; the part of the photograph that it sees, [3, h, w] in [0, 1], at the scale of the closest
        moment; and where that part begins.
        """
        for slower in _SLOWER:
            path = follow(motion.scaled(slower), times.flatten(), 1 / self.rate)
            corners = path.corners(self.width / self.height).flatten(0, 1)
            first, last = corners.amin(0), corners.amax(0)
            wide, tall = ((last - first) * self.height + 2).tolist()  # in the clip's pixels
            room = min(still.width / wide, still.height / tall)
            if room >= 1:
                break
        shrink = _log_uniform(draw, (1.0, min(max(1.0, room), _MOST_SHRINK)))
        columns, rows = min(math.ceil(wide * shrink), still.width), min(math.ceil(tall * shrink), still.height)
        top, left = draw.randint(0, still.height - rows), draw.randint(0, still.width - columns)
        pixels = self.library.frames(still)[0, top : top + rows, left : left + columns]
        part = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
        size = round(rows / shrink), round(columns / shrink)
        small = F.interpolate(part, size, mode="bicubic", antialias=True, align_corners=False)
        return path, small[0].float() / 255, first - 1 / self.height

    def _exposed(self, layers: Sequence[_Layer], shape: tuple[int, int]) -> Tensor:
        """Layers from the farthest to the nearest, seen at moments [T, K] -> [3, T, H, W] in [0, 1]."""
        frames, moments = shape
        pictures = []
        for frame in range(frames):
            total = torch.zeros(3, self.height, self.width)
            for first in range(frame * moments, (frame + 1) * moments, _AT_ONCE):
                span = slice(first, min(first + _AT_ONCE, (frame + 1) * moments))
                light = None
                for layer in layers:
                    colours = _seen(layer, span, self.height, self.width, fast=moments >= _NEAREST_FROM)
                    light = colours if light is None else light.mul_(1 - colours[:, 3:]).add_(colours[:, :3])
                total += light.sum(0)
            pictures.append((total / moments).clamp_(0, 1).sqrt_())
        return torch.stack(pictures, 1)


def _seen(layer: _Layer, span: slice, height: int, width: int, *, fast: bool) -> Tensor:
    """A layer as it is seen at some moments, [K, 3 or 4, height, width]."""
    path = Path(layer.path.centre[span], layer.path.zoom[span], layer.path.angle[span])
    octave = math.log2(max(1.0, float(path.zoom.mean())))
    level = min(int(octave), len(layer.levels) - 1)
    share = min(octave - level, 1.0) if level + 1 < len(layer.levels) else 0.0
    # Places of the picture's columns and rows on the layer, in grid_sample's units: -1 to 1 from edge to edge.
    units = 2 / torch.tensor([layer.levels[0].shape[2], layer.levels[0].shape[1]]) * _FINER * layer.scale  # a height
    turns, start = path.turns() * units[:, None], (path.centre - layer.origin) * units - 1
    columns = (torch.arange(width) + 0.5 - width / 2)[:, None] / height * turns[:, None, :, 0]  # [K, W, 2]
    rows = (torch.arange(height) + 0.5 - height / 2)[:, None] / height * turns[:, None, :, 1] + start[:, None]
    grid = rows[:, :, None] + columns[:, None]  # [K, H, W, 2]
    mode = "nearest" if fast else "bilinear"
    found = _sampled(layer.levels[level], grid, mode)
    return found if share < 0.01 else found.lerp_(_sampled(layer.levels[level + 1], grid, mode), share)


def _sampled(picture: Tensor, grid: Tensor, mode: str) -> Tensor:
    pictures = picture.expand(len(grid), -1, -1, -1)
    return F.grid_sample(pictures, grid, mode=mode, padding_mode="border", align_corners=False)


def _detail(piece: Tensor) -> float:
    """Mean difference of neighbouring pixels of [3, H, W] in [0, 1], in levels of 255."""
    return 255 * float(piece[1].diff(dim=-1).abs().mean())


def _log_uniform(draw: random.Random, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return math.exp(draw.uniform(math.log(low), math.log(high)))


def _enlarged(picture: Tensor) -> Tensor:
    finer = F.interpolate(picture[None], scale_factor=_FINER, mode="bicubic", align_corners=False)[0]
    return finer.clamp(0, 1)


def _cover(generator: torch.Generator, height: int, width: int, unit: int, draw: random.Random) -> Tensor:
    """Where a layer covers what is behind it: [1, height, width] in [0, 1], round patches with a soft outline.

    `unit` is a picture height in pixels.
    """
    blob, share = draw.uniform(*_BLOB), draw.uniform(*_COVER)
    soft = _log_uniform(draw, _SOFT)
    hills = torch.zeros(1, 1, height, width)
    for weight, cell in ((1.0, blob), (0.35, blob / 3)):
        rows, columns = (math.ceil(side / (cell * unit)) + 3 for side in (height, width))
        heights = torch.randn(1, 1, rows, columns, generator=generator)
        size = [round(count * cell * unit) for count in (rows, columns)]
        smooth = F.interpolate(heights, size, mode="bicubic", align_corners=False)
        hills += weight * smooth[..., :height, :width]
    level = hills.flatten()[:: max(1, hills.numel() // 4096)].quantile(1 - share)
    slope = hills.diff(dim=-1).abs().mean() + hills.diff(dim=-2).abs().mean()  # a pixel
    return torch.sigmoid((hills - level) / (slope * soft * unit / 2).clamp(min=1e-6))[0]
