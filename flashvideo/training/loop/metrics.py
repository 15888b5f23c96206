"""Metrics of a run: a line of numbers every few steps, their plot, and sheets of pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .checkpointing import write_whole

PANEL = (360, 150)  # width and height of one curve's plot, in pixels
MARGIN = 4
CAPTION_HEIGHT = 14
INK, PAPER, LINE = (30, 30, 30), (255, 255, 255), (20, 90, 200)


class MetricsFile:
    """Metrics as JSON lines, one object a line, each with its step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def truncate(self, step: int) -> None:
        """Drop what a run wrote after the checkpoint of `step`, from which it resumes."""
        kept = [row for row in self.rows() if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_whole(self.path, lambda file: file.write(text.encode()))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def rows(self) -> list[dict[str, float]]:
        """Read all lines; one that a crash cut off is left out."""
        if not self.path.is_file():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows


def psnr(video: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels of videos in [-1, 1], after clamping; infinity if they're equal."""
    error = torch.mean((video.clamp(-1, 1).float() - target.float()) ** 2).item()
    return math.inf if error == 0 else 10 * math.log10(4 / error)


def save_plot(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Draw every metric over the steps, a panel each; logarithmic where all values are positive and far apart."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "seconds") and math.isfinite(value):
                curves.setdefault(name, []).append((row["step"], value))
    panels = [_panel(name, points) for name, points in curves.items() if len(points) > 1]
    if panels:
        save_picture(path, _grid(panels, columns=2))


def _panel(name: str, points: Sequence[tuple[float, float]]) -> Image.Image:
    panel = Image.new("RGB", PANEL, PAPER)
    draw = ImageDraw.Draw(panel)
    steps, values = (np.array(axis, dtype=np.float64) for axis in zip(*points, strict=True))
    low, high = values.min(), values.max()
    logarithmic = low > 0 and high > 20 * low
    heights = np.log(values) if logarithmic else values
    unit = (heights - heights.min()) / max(float(np.ptp(heights)), 1e-12)
    along = (steps - steps.min()) / max(float(np.ptp(steps)), 1)
    top, bottom = CAPTION_HEIGHT + MARGIN, PANEL[1] - MARGIN
    x = MARGIN + along * (PANEL[0] - 2 * MARGIN)
    y = bottom - unit * (bottom - top)
    scale = ", log" if logarithmic else ""
    draw.text((MARGIN, 1), f"{name}{scale}: {low:.4g} to {high:.4g}, now {values[-1]:.4g}", fill=INK)
    draw.rectangle((MARGIN, top, PANEL[0] - MARGIN, bottom), outline=(210, 210, 210))
    draw.line(list(zip(x.tolist(), y.tolist(), strict=True)), fill=LINE)
    return panel


def _grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (width * min(columns, len(pictures)), height * rows), PAPER)
    for index, picture in enumerate(pictures):
        grid.paste(picture, (index % columns * width, index // columns * height))
    return grid


def sheet(rows: Sequence[tuple[str, Tensor]], frames: int = 4) -> Image.Image:
    """Stack labelled videos [3, T, H, W] in [-1, 1]: `frames` of each, evenly in time, side by side."""
    strips = []
    for label, video in rows:
        times = np.linspace(0, video.shape[1] - 1, min(frames, video.shape[1])).round().astype(int)
        picture = torch.cat([video[:, time] for time in times.tolist()], dim=2)
        pixels = ((picture.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        strip = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + CAPTION_HEIGHT), PAPER)
        ImageDraw.Draw(strip).text((2, 1), label, fill=INK)
        strip.paste(Image.fromarray(pixels), (0, CAPTION_HEIGHT))
        strips.append(strip)
    page = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), PAPER)
    top = 0
    for strip in strips:
        page.paste(strip, (0, top))
        top += strip.height
    return page


def text_page(lines: Sequence[str], width: int = 900) -> Image.Image:
    """Write lines of text on a page."""
    page = Image.new("RGB", (width, CAPTION_HEIGHT * max(1, len(lines)) + 2 * MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    for row, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + row * CAPTION_HEIGHT), line, fill=INK)
    return page


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG, whole or not at all."""
    write_whole(path, lambda file: picture.save(file, format="PNG"))
