"""Draw the pack's icon and banner, docs/icon.png and docs/banner.png: a draft that a flash turns into a sharp picture.

    python scripts/make_icon.py

Needs Pillow and NumPy, which ComfyUI brings.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

DOCS = Path(__file__).resolve().parents[1] / "docs"
ICON = (400, 400)
BANNER = (1260, 540)  # 21:9
SMOOTH = 3  # drawn so many times larger, then averaged

SKY = ((26, 22, 66), (120, 46, 112), (247, 131, 84), (255, 205, 130))  # from top to horizon
SUN = (255, 240, 200)
HILLS = ((94, 44, 104), (58, 30, 84), (24, 18, 50))  # from far to near
BOLT = (255, 255, 255)
INK = (18, 14, 40)

Size = tuple[int, int]


def scene(size: Size, sun: tuple[float, float]) -> Image.Image:
    """A sunset over hills; `sun` is its middle, as parts of the picture's width and height."""
    width, height = size
    y = np.linspace(0, 1.25, height)
    stops = np.linspace(0, 1, len(SKY))
    sky = np.stack([np.interp(y, stops, [colour[channel] for colour in SKY]) for channel in range(3)], axis=-1)
    picture = Image.fromarray(np.repeat(sky[:, None], width, axis=1).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    x, y_sun, radius = sun[0] * width, sun[1] * height, 0.17 * height
    draw.ellipse((x - radius, y_sun - radius, x + radius, y_sun + radius), fill=SUN)
    for index, colour in enumerate(HILLS):
        draw.polygon(ridge(size, index), fill=colour)
    return picture


def ridge(size: Size, index: int) -> list[tuple[float, float]]:
    """Outline of a row of hills, 0 the farthest; finer and higher the farther it is."""
    width, height = size
    x = np.linspace(0, width / height, width // 2)
    rough = np.random.default_rng(index)
    level = (
        0.62
        + 0.12 * index
        + sum(0.055 / n * np.sin(2 * np.pi * (0.9 * n * x + rough.random())) for n in (1, 2, 3, 5, 8, 13))
    )
    tops = list(zip(x * height, level * height, strict=True))
    return [*tops, (width, height), (0, height)]


def pixelated(picture: Image.Image, pixels: int) -> Image.Image:
    """The picture in squares, `pixels` of them from top to bottom, a little paler: the draft."""
    small = picture.resize((round(pixels * picture.width / picture.height), pixels), Image.Resampling.BOX)
    return Image.blend(small.resize(picture.size, Image.Resampling.NEAREST), Image.new("RGB", picture.size, INK), 0.22)


def bolt(size: Size, middle: float) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """A flash from top to bottom, and the part of the picture that lies right of it."""
    width, height = size
    right = [(0.20, 0.0), (0.05, 0.44), (0.20, 0.44), (-0.13, 1.0)]
    left = [(0.04, 0.0), (-0.15, 0.55), (0.0, 0.55), (-0.17, 1.0)]

    def place(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(middle * width + x * height, y * height) for x, y in points]

    return place(right) + place(left)[::-1], [*place(right), (width, height), (width, 0)]


def flash(size: Size, sun: tuple[float, float], middle: float, pixels: int) -> Image.Image:
    """The scene, a draft left of the flash and sharp right of it."""
    sharp = scene(size, sun)
    outline, right_of_it = bolt(size, middle)
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).polygon(right_of_it, fill=255)
    picture = Image.composite(sharp, pixelated(sharp, pixels), mask)
    ImageDraw.Draw(picture).polygon(outline, fill=BOLT)
    return picture


def draw_icon(size: Size) -> Image.Image:
    """The square icon, with round corners."""
    picture = flash(size, (0.5, 0.50), 0.5, 10)
    corners = Image.new("L", size, 0)
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), radius=size[0] // 6, fill=255)
    picture.putalpha(corners)
    return picture


def draw_banner(size: Size) -> Image.Image:
    """The wide banner: the name over the draft, the picture at its right."""
    picture = flash(size, (0.70, 0.50), 0.62, 18)
    draw = ImageDraw.Draw(picture)
    height = size[1]
    title, line = (ImageFont.load_default(size=height * part) for part in (0.19, 0.062))
    draw.text((0.13 * height, 0.15 * height), "FlashVideo", font=title, fill=BOLT)
    draw.text((0.14 * height, 0.38 * height), "for ComfyUI", font=line, fill=BOLT)
    draw.text((0.14 * height, 0.48 * height), "a fast draft, then real detail", font=line, fill=BOLT)
    return picture


def save(draw: Callable[[Size], Image.Image], size: Size, path: Path) -> None:
    """Draw large, average down."""
    large = draw((size[0] * SMOOTH, size[1] * SMOOTH))
    large.resize(size, Image.Resampling.BOX).save(path, optimize=True)


if __name__ == "__main__":
    save(draw_icon, ICON, DOCS / "icon.png")
    save(draw_banner, BANNER, DOCS / "banner.png")
