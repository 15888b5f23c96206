"""The closed vocabulary of the procedural videos, and what one of them holds.

Lengths are in heights of the picture, with the origin in its middle, x to the right and y down; times in seconds.
Nothing here depends on a resolution: the same scene can be drawn at any size, frame rate and length.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import product

Colour = tuple[float, float, float]  # red, green, blue in [0, 1]

COLOURS: dict[str, Colour] = {
    "red": (0.88, 0.08, 0.10),
    "orange": (1.00, 0.50, 0.02),
    "yellow": (0.98, 0.88, 0.08),
    "green": (0.10, 0.66, 0.18),
    "cyan": (0.05, 0.85, 0.88),
    "blue": (0.10, 0.20, 0.90),
    "purple": (0.52, 0.12, 0.78),
    "pink": (1.00, 0.50, 0.74),
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.06),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
TEXTURES = ("plain", "striped", "dotted", "checked")
DIRECTIONS = ("left", "right", "up", "down", "still", "rotates", "grows", "shrinks")
SPEEDS = ("slowly", "quickly")
BACKGROUNDS = ("hill", "sea", "desert", "wall", "forest", "night", "plain", "page")
CAMERAS = ("static", "pans left", "pans right", "zooms in")

CLIP_SECONDS = 2.0  # subjects stay in the picture for this long; later they may leave it
ASPECT = 1.75  # width over height that the places are chosen for
TURNING_SHAPES = ("square", "triangle", "star", "cross")  # a turning circle looks like one that stays still

# Neighbours that are hard to distinguish when one is the subject and the other is behind it.
_CLOSE = {
    "red": ("orange", "pink"),
    "orange": ("red", "yellow"),
    "yellow": ("orange", "white"),
    "green": ("cyan",),
    "cyan": ("green", "blue", "white"),
    "blue": ("cyan", "purple"),
    "purple": ("blue", "pink"),
    "pink": ("red", "purple", "white"),
    "white": ("yellow", "cyan", "pink"),
    "black": (),
}
_HIDDEN_ON = {
    "hill": ("green", "cyan", "white"),
    "sea": ("blue", "cyan", "white"),
    "desert": ("yellow", "orange", "white", "cyan"),
    "wall": ("white", "black"),
    "forest": ("green", "black"),
    "night": ("black", "blue", "purple"),
    "page": ("white", "black", "yellow"),
}


@dataclass(frozen=True)
class Subject:
    """A moving thing: what its caption names, and the numbers that make it different from others."""

    colour: str
    shape: str
    texture: str
    direction: str
    speed: str
    x: float  # where it is in the middle of the clip
    y: float
    radius: float  # at the middle of the clip
    angle: float  # radians at the start
    texture_period: float
    texture_angle: float

    @property
    def triple(self) -> tuple[str, str, str]:
        """(colour, shape, direction), the combination that HELD_OUT is about."""
        return self.colour, self.shape, self.direction


@dataclass(frozen=True)
class Scene:
    """One procedural video: one or two subjects, a background, a camera; `seed` varies the background's details."""

    subjects: tuple[Subject, ...]
    background: str
    background_colour: str  # of a plain background, else ""
    camera: str
    seed: int


def contrasts(colour: str, background: str, background_colour: str = "") -> bool:
    """Whether a subject of this colour stands out from the background."""
    if background == "plain":
        return colour != background_colour and colour not in _CLOSE[background_colour]
    return colour not in _HIDDEN_ON[background]


def possible(shape: str, direction: str) -> bool:
    """Whether the motion can be seen on the shape."""
    return direction != "rotates" or shape in TURNING_SHAPES


def _bucket(triple: tuple[str, str, str]) -> int:
    return zlib.crc32(" ".join(triple).encode()) % 12


# About one twelfth of all combinations, that of the best-known prompt among them; training never sees them.
HELD_OUT: frozenset[tuple[str, str, str]] = frozenset(
    triple
    for triple in product(COLOURS, SHAPES, DIRECTIONS)
    if possible(triple[1], triple[2]) and _bucket(triple) == _bucket(("red", "circle", "left"))
)
