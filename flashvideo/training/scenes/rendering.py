"""Draws a procedural scene at any size and length: signed distances and averaged patterns, no supersampling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backgrounds import View, blend, draw_background, paint
from .patterns import SHAPE_DISTANCES, SHAPE_REACH, checks, coverage, dots, pulse
from .vocabulary import CLIP_SECONDS, COLOURS, Scene, Subject

FRAME_RATE = 8.0  # FlashVideo's own
_CHUNK_PIXELS = 2**17  # on a CPU as many as stay in its cache
_CHUNK_PIXELS_ACCELERATOR = 2**24

# Heights a second. Four frames share one latent: what moves further in them than the VAE sees leaves a ghost.
_SPEED = {"slowly": 0.13, "quickly": 0.24}
_TURN = {"slowly": math.radians(25), "quickly": math.radians(60)}  # radians a second
_GROWTH = {"slowly": 0.20, "quickly": 0.35}  # of the radius's logarithm, a second
_PAN = 0.12
_ZOOM = 0.10
_WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@torch.no_grad()
def render(
    scene: Scene,
    frames: int,
    height: int,
    width: int,
    *,
    rate: float = FRAME_RATE,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The scene's first `frames` frames at `rate` a second, [3, T, H, W] in [-1, 1], float32."""
    limit = _CHUNK_PIXELS if torch.device(device).type == "cpu" else _CHUNK_PIXELS_ACCELERATOR
    times = torch.arange(frames, device=device, dtype=torch.float32) / rate
    chunk = max(1, limit // (height * width))
    parts = [_draw(scene, part.view(-1, 1, 1), height, width) for part in times.split(chunk)]
    return torch.cat(parts, dim=1)


@torch.no_grad()
def subject_coverage(scene: Scene, frames: int, height: int, width: int, *, rate: float = FRAME_RATE) -> Tensor:
    """How much of each pixel of `render` the scene's subjects cover, [T, H, W] in [0, 1]."""
    time = (torch.arange(frames, dtype=torch.float32) / rate).view(-1, 1, 1)
    x, y, pixel = _plane(scene, time, height, width)
    covered = torch.zeros(frames, height, width)
    for subject in scene.subjects:
        u, v, unit = _seen_from(subject, x, y, time, pixel)
        covered = covered.maximum(coverage(SHAPE_DISTANCES[subject.shape](u, v), unit))
    return covered


def _plane(scene: Scene, time: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the camera sees the pixels' middles, x and y, and a pixel's side there."""
    pixel = 1 / height
    x = ((torch.arange(width, device=time.device) + 0.5 - width / 2) * pixel).view(1, 1, -1)
    y = ((torch.arange(height, device=time.device) + 0.5 - height / 2) * pixel).view(1, -1, 1)
    zoom = torch.exp(_ZOOM * (time - CLIP_SECONDS / 2)) if scene.camera == "zooms in" else torch.ones_like(time)
    return x / zoom, y / zoom, pixel / zoom


def _draw(scene: Scene, time: Tensor, height: int, width: int) -> Tensor:
    x, y, pixel = _plane(scene, time, height, width)
    # The camera follows its subject, so a pan moves only the background.
    pan = {"pans left": -_PAN, "pans right": _PAN}.get(scene.camera, 0.0) * time
    background = draw_background(scene, View(x + pan, y, time, 1 / height))
    picture = background.expand(3, time.shape[0], height, width).contiguous()
    for subject in scene.subjects:
        _draw_subject(picture, subject, x, y, time, pixel)
    return picture.mul_(2).sub_(1).clamp_(-1, 1)


def _draw_subject(picture: Tensor, subject: Subject, x: Tensor, y: Tensor, time: Tensor, pixel: Tensor) -> None:
    """Paints the subject over `picture`, only where it can be."""
    centre_x, centre_y, radius, _ = _pose(subject, time)
    reach = radius * SHAPE_REACH + pixel
    columns = _span((x - centre_x).abs() < reach)
    rows = _span((y - centre_y).abs() < reach)
    if columns is None or rows is None:
        return
    u, v, unit = _seen_from(subject, x[:, :, columns], y[:, rows], time, pixel)
    distance = SHAPE_DISTANCES[subject.shape](u, v)
    region = picture[:, :, rows, columns]
    region.copy_(blend(region, _surface(subject, u, v, unit, distance), coverage(distance, unit)))


def _seen_from(subject: Subject, x: Tensor, y: Tensor, time: Tensor, pixel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Places and a pixel's side in radii of the subject, from its middle, turning with it."""
    centre_x, centre_y, radius, angle = _pose(subject, time)
    x, y = (x - centre_x) / radius, (y - centre_y) / radius
    cos, sin = angle.cos(), angle.sin()
    return x * cos + y * sin, y * cos - x * sin, pixel / radius


def _span(inside: Tensor) -> slice | None:
    where = inside.flatten(1).any(0).nonzero()
    return slice(int(where[0]), int(where[-1]) + 1) if len(where) else None


def _pose(subject: Subject, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Middle, radius and angle at each time."""
    since_middle = time - CLIP_SECONDS / 2
    way_x, way_y = _WAYS.get(subject.direction, (0, 0))
    x = subject.x + way_x * _SPEED[subject.speed] * since_middle
    y = subject.y + way_y * _SPEED[subject.speed] * since_middle
    growth = {"grows": 1, "shrinks": -1}.get(subject.direction, 0) * _GROWTH[subject.speed]
    turn = _TURN[subject.speed] if subject.direction == "rotates" else 0.0
    return x, y, subject.radius * torch.exp(growth * since_middle), subject.angle + turn * time


def _surface(subject: Subject, u: Tensor, v: Tensor, unit: Tensor, distance: Tensor) -> Tensor:
    """The subject's own picture: its colour, texture, weave and rim."""
    colour = COLOURS[subject.colour]
    base = paint(colour, u)
    is_dark = max(colour) < 0.2
    shade = paint((0.34, 0.34, 0.36), u) if is_dark else base * 0.5
    cos, sin = math.cos(subject.texture_angle), math.sin(subject.texture_angle)
    s, t = u * cos + v * sin, v * cos - u * sin
    period = subject.texture_period
    if subject.texture == "plain":
        surface = base.expand(3, *u.shape)
    elif subject.texture == "striped":
        surface = blend(base, shade, pulse(s / period, 0.45, unit / period))
    else:
        pattern = {"dotted": dots, "checked": checks}[subject.texture]
        surface = blend(base, shade, pattern(s, t, period, unit))
    # A weave of 4 to 6 pixels at 256, across the texture, that a small draft can't hold.
    weave = pulse(t / 0.1, 0.5, unit / 0.1) * 2 - 1
    surface = surface + 0.05 * weave if is_dark else surface * (1 + 0.09 * weave)
    rim = paint((0.62, 0.62, 0.64) if is_dark else tuple(0.28 * value for value in colour), u)
    return blend(surface, rim, coverage(-distance - 0.05, unit))
