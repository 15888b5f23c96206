"""Smooth camera motion over a flat picture: pans, zooms and turns of a chosen speed, and where each moment looks.

Lengths are in heights of the clip's picture. The point (x, y), from the picture's middle, shows the photograph at
centre + zoom * turned(x, y). A pan of 0.5 moves the picture's content by half its height a second.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

KINDS = ("pan", "zoom", "turn", "all")
_FINEST_STEPS = 32  # a frame, in which motion is added up
_WIDEST_ZOOM = math.log(3.0)  # from a clip's first frame to its last
_WIDEST_TURN = math.radians(120)
_EDGE = 0.5  # heights from the middle: where the speed of zooms and turns is measured
_BEND = math.radians(70)  # a pan's direction changes by at most so much, to either side
_SWELL = 0.35  # by how much of its mean a speed rises and falls
FASTEST = 1 + _SWELL  # times its mean


@dataclass(frozen=True)
class Motion:
    """How a camera moves. Speeds are means over the clip, in picture heights a second."""

    pan: float  # everywhere
    zoom: float  # of the middle of the upper and lower edge; above 0 away from the picture, below 0 towards it
    turn: float  # of the same places; above 0 clockwise
    direction: float  # radians
    bend: float  # radians by which the direction turns in the clip
    swell: float  # phase of the speed's rise and fall

    def scaled(self, factor: float) -> Motion:
        """The same motion at `factor` times the speed."""
        return replace(self, pan=self.pan * factor, zoom=self.zoom * factor, turn=self.turn * factor)

    def farther(self, nearness: float) -> Motion:
        """The motion of a layer that is farther away: its pan and zoom are `nearness` (0 to 1) as fast."""
        return replace(self, pan=self.pan * nearness, zoom=self.zoom * nearness)


@dataclass(frozen=True)
class Path:
    """Where the camera looks at each moment."""

    centre: Tensor  # [N, 2], x and y
    zoom: Tensor  # [N]: heights of the photograph that a height of the picture shows; 1 at the closest moment
    angle: Tensor  # [N], radians

    def corners(self, aspect: float) -> Tensor:
        """Positions of the picture's corners on the photograph at each moment, [N, 4, 2]; `aspect`: width by height."""
        signs = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]])
        return self.places(signs * torch.tensor([aspect / 2, 0.5]))

    def places(self, seen: Tensor) -> Tensor:
        """Positions on the photograph of places [M, 2] in the picture, at each moment, [N, M, 2]."""
        return torch.einsum("nij,mj->nmi", self.turns(), seen) + self.centre[:, None]

    def turns(self) -> Tensor:
        """Matrices that turn and enlarge places in the picture at each moment, [N, 2, 2]."""
        cos, sin = self.angle.cos() * self.zoom, self.angle.sin() * self.zoom
        return torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), dim=-2)


def random_motion(draw: random.Random, speed: float, seconds: float) -> Motion:
    """Motion of a random kind, at a speed in picture heights a second.

    Zooms and turns are slower if otherwise a clip of `seconds` would end with almost nothing of its first frame.
    """
    kind = draw.choices(KINDS, weights=(4, 2, 1, 3))[0]
    shares = {"pan": (1.0, 0.0, 0.0), "zoom": (0.0, 1.0, 0.0), "turn": (0.0, 0.0, 1.0)}.get(kind)
    if shares is None:
        shares = tuple(draw.uniform(0.2, 1) for _ in range(3))
        shares = tuple(share / math.hypot(*shares) for share in shares)
    pan, zoom, turn = (share * speed for share in shares)
    return Motion(
        pan=pan,
        zoom=min(zoom, _EDGE * _WIDEST_ZOOM / seconds) * draw.choice((-1, 1)),
        turn=min(turn, _EDGE * _WIDEST_TURN / seconds) * draw.choice((-1, 1)),
        direction=draw.uniform(-math.pi, math.pi),
        bend=draw.uniform(-_BEND, _BEND),
        swell=draw.uniform(0, 2 * math.pi),
    )


def follow(motion: Motion, times: Tensor, frame: float) -> Path:
    """The path of a camera with this motion at `times` [N] in seconds, from 0 on; `frame` is a frame's time."""
    end = max(float(times.max()), frame)
    steps = max(2, math.ceil(end / frame * _FINEST_STEPS))
    step = end / steps
    middle = (torch.arange(steps, dtype=torch.float64) + 0.5) * step
    phase = 2 * math.pi * middle / end
    pace = 1 + _SWELL * torch.sin(phase + motion.swell)  # its mean is 1
    log_zoom = _summed(pace * motion.zoom / _EDGE, step)
    angle = _summed(pace * motion.turn / _EDGE, step)
    log_zoom = log_zoom - log_zoom.min()
    zoom = log_zoom.exp()
    # The picture moves by the pan's speed: on the photograph, that is more where the camera shows more of it.
    direction = motion.direction + motion.bend * (middle / end - 0.5) + _between(angle)
    stride = pace * motion.pan * _between(zoom)
    centre = torch.stack((_summed(stride * direction.cos(), step), _summed(stride * direction.sin(), step)), -1)
    grid = torch.arange(steps + 1, dtype=torch.float64) * step
    return Path(*(_at(times.double(), grid, values).float() for values in (centre, zoom, angle)))


def _summed(rates: Tensor, step: float) -> Tensor:
    """Rates in the middle of each step, [N] -> their sums from 0 on, [N + 1]."""
    return torch.cat((torch.zeros(1, dtype=rates.dtype), rates.cumsum(0) * step))


def _between(values: Tensor) -> Tensor:
    return (values[1:] + values[:-1]) / 2


def _at(times: Tensor, grid: Tensor, values: Tensor) -> Tensor:
    """Values [G] or [G, 2] on an even grid, interpolated linearly at times [N]."""
    place = (times / (grid[1] - grid[0])).clamp(0, len(grid) - 1)
    index = place.long().clamp(max=len(grid) - 2)
    share = place - index
    if values.dim() > 1:
        share = share[:, None]
    return values[index] * (1 - share) + values[index + 1] * share
