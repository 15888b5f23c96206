"""The procedural video set: endless, the same for a seed on every run, with combinations that training never sees.

A scene is chosen by `random_scene`, drawn by `render` and described by `caption`; `SceneStream` does all three.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from .captions import caption, parse_prompt
from .rendering import FRAME_RATE, render, subject_coverage
from .vocabulary import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    HELD_OUT,
    SHAPES,
    SPEEDS,
    TEXTURES,
    Scene,
    Subject,
    contrasts,
    possible,
)

__all__ = ["HELD_OUT", "SPLITS", "Scene", "SceneStream", "Subject", "caption", "parse_prompt", "random_scene", "render"]

VERSION = 2  # goes up whenever the same seed gives another picture or caption: latents made before count no more
SPLITS = ("train", "validation", "test")
_PAIRS = 0.1  # of the scenes have two subjects
_MOTION_PREFIXES = 0.5  # of the captions
_SIDEWAYS = ("left", "right")
_UPRIGHT = ("up", "down")
_DIRECTIONS = DIRECTIONS + _SIDEWAYS + _UPRIGHT  # plain motion twice as often as the rest


def random_scene(seed: int, split: str = "train") -> Scene:
    """The scene of a seed. The first subject of a "test" scene is in HELD_OUT; no subject of the other splits is.

    "validation" has scenes of the training's kind, but other ones.
    Raises ValueError for another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}.")
    draw = random.Random(f"{split} scene {seed}")
    while True:
        scene = _propose(draw)
        held_out = [subject.triple in HELD_OUT for subject in scene.subjects]
        if held_out[0] if split == "test" else not any(held_out):
            return scene


def _propose(draw: random.Random) -> Scene:
    background = draw.choice(BACKGROUNDS)
    background_colour = draw.choice(tuple(COLOURS)) if background == "plain" else ""
    colours = [colour for colour in COLOURS if contrasts(colour, background, background_colour)]
    subjects = _pair(draw, colours) if draw.random() < _PAIRS else (_single(draw, colours),)
    return Scene(subjects, background, background_colour, _camera(draw, subjects), draw.getrandbits(32))


def _single(draw: random.Random, colours: list[str]) -> Subject:
    direction = draw.choice(_DIRECTIONS)
    radius = draw.uniform(0.26, 0.32)
    if direction in _SIDEWAYS:
        place = draw.uniform(-0.06, 0.06), draw.uniform(-0.14, 0.14)
    elif direction in _UPRIGHT:
        place = draw.uniform(-0.45, 0.45), draw.uniform(-0.02, 0.02)
        radius = draw.uniform(0.24, 0.28)
    else:
        place = draw.uniform(-0.35, 0.35), draw.uniform(-0.08, 0.08)
    return _subject(draw, draw.choice(colours), direction, place, radius)


def _pair(draw: random.Random, colours: list[str]) -> tuple[Subject, Subject]:
    """Two subjects in a lane each: above each other where they move to the side, else beside each other."""
    first_colour, second_colour = draw.sample(colours, 2)
    first = draw.choice(_DIRECTIONS)
    if first in _SIDEWAYS:
        second = draw.choice(_SIDEWAYS)
        places = [(draw.uniform(-0.1, 0.1), -0.24), (draw.uniform(-0.1, 0.1), 0.24)]
    else:
        second = draw.choice([direction for direction in _DIRECTIONS if direction not in _SIDEWAYS])
        places = [(-0.42, draw.uniform(-0.02, 0.02)), (0.42, draw.uniform(-0.02, 0.02))]
    draw.shuffle(places)
    return (
        _subject(draw, first_colour, first, places[0], draw.uniform(0.16, 0.19)),
        _subject(draw, second_colour, second, places[1], draw.uniform(0.16, 0.19)),
    )


def _subject(draw: random.Random, colour: str, direction: str, place: tuple[float, float], radius: float) -> Subject:
    return Subject(
        colour=colour,
        shape=draw.choice([shape for shape in SHAPES if possible(shape, direction)]),
        texture=draw.choice(TEXTURES),
        direction=direction,
        speed=draw.choice(SPEEDS),
        x=place[0],
        y=place[1],
        radius=radius,
        angle=draw.uniform(-0.12, 0.12),
        texture_period=draw.uniform(0.36, 0.55),
        texture_angle=draw.choice((0.0, math.pi / 4, math.pi / 2, -math.pi / 4)),
    )


def _camera(draw: random.Random, subjects: tuple[Subject, ...]) -> str:
    """A camera whose motion leaves the captions true: pans follow a single subject, zooms spare growing ones."""
    directions = {subject.direction for subject in subjects}
    choice = draw.random()
    if choice < 0.25 and len(subjects) == 1 and directions <= set(_SIDEWAYS):
        return f"pans {subjects[0].direction}"
    if 0.25 <= choice < 0.4 and not directions & {"grows", "shrinks", "still"}:
        return "zooms in"
    return "static"


@dataclass(frozen=True)
class SceneStream:
    """Endless clips of `frames` x `height` x `width`; a sample depends on nothing but split, seed and index.

    `device` is where clips are drawn; those of different kinds of devices differ in their last bits.
    """

    split: str
    height: int
    width: int
    frames: int
    seed: int
    rate: float = FRAME_RATE
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {self.split!r}.")

    def scene(self, index: int) -> Scene:
        """What sample `index` shows; to draw it at another size, too."""
        return random_scene(self._number(index), self.split)

    def caption(self, index: int) -> str:
        """The caption of sample `index`; every other one has a motion prefix."""
        number = self._number(index)
        prefix = random.Random(f"prefix {number}").random() < _MOTION_PREFIXES
        return caption(self.scene(index), number, motion_prefix=prefix)

    def sample(self, index: int) -> tuple[Tensor, str]:
        """Clip `index`, [3, T, H, W] in [-1, 1], and its caption."""
        video = render(self.scene(index), self.frames, self.height, self.width, rate=self.rate, device=self.device)
        return video, self.caption(index)

    def layout(self, index: int, cells: int) -> Tensor:
        """How much of each square of `cells` pixels of clip `index` subjects cover, [T, H / cells, W / cells]."""
        size = self.height // cells, self.width // cells
        return subject_coverage(self.scene(index), self.frames, *size, rate=self.rate)

    def batch(self, first: int, count: int) -> tuple[Tensor, list[str]]:
        """Clips `first` to `first + count - 1`, [B, 3, T, H, W], and their captions."""
        videos, captions = zip(*(self.sample(index) for index in range(first, first + count)), strict=True)
        return torch.stack(videos), list(captions)

    def _number(self, index: int) -> int:
        return random.Random(f"{self.seed} {index}").getrandbits(48)
