"""Reads and writes the demo's video files: a short clip from a longer one, and sheets to compare videos on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont

_BACKGROUND, _INK = (24, 24, 24), (235, 235, 235)
_COLUMNS, _CELL_WIDTH, _GAP, _LABEL_HEIGHT, _LABEL_SIZE = 6, 400, 8, 40, 22


@dataclass(frozen=True)
class Row:
    """One row of a contact sheet: what it is called and the video that it shows."""

    label: str
    video: Path


def read_frames(video: Path) -> list[Image.Image]:
    """All frames of a video, RGB. Raises RuntimeError if it has none."""
    with av.open(str(video)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    if not frames:
        raise RuntimeError(f"{video.name} holds no frames.")
    return frames


def cut_clip(source: Path, target: Path, *, first: int, count: int, size: tuple[int, int]) -> None:
    """Write frames `first` to `first + count` of `source`, scaled to `size` (width, height), at the source's speed."""
    with av.open(str(source)) as container:
        rate = container.streams.video[0].average_rate
    frames = read_frames(source)[first : first + count]
    if len(frames) < count:
        raise RuntimeError(f"{source.name} is too short: {count} frames from frame {first} on were wanted.")
    _write(target, (frame.resize(size, Image.Resampling.LANCZOS) for frame in frames), size, rate)


def resized(source: Path, target: Path, size: tuple[int, int]) -> None:
    """Write a video in another size (width, height) by bicubic interpolation, at its speed."""
    with av.open(str(source)) as container:
        rate = container.streams.video[0].average_rate
    _write(target, (frame.resize(size, Image.Resampling.BICUBIC) for frame in read_frames(source)), size, rate)


def _write(target: Path, frames: Iterable[Image.Image], size: tuple[int, int], rate: Fraction | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(target), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "10"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))


def side_by_side(rows: Sequence[Row], target: Path) -> None:
    """Write a picture with the middle frame of every video beside the next one's, pixel for pixel, below its label."""
    frames = [read_frames(row.video) for row in rows]
    middle = [each[len(each) // 2] for each in frames]
    height = max(frame.height for frame in middle)
    size = (sum(frame.width + _GAP for frame in middle) + _GAP, height + _LABEL_HEIGHT + _GAP)
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_LABEL_SIZE)
    left = _GAP
    for row, frame in zip(rows, middle, strict=True):
        draw.text((left, _GAP), row.label, fill=_INK, font=font)
        sheet.paste(frame, (left, _LABEL_HEIGHT))
        left += frame.width + _GAP
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target)


def describe(video: Path) -> str:
    """Size, length and speed in words: `448x192, 17 frames, 25 fps`."""
    with av.open(str(video)) as container:
        rate = container.streams.video[0].average_rate
    frames = read_frames(video)
    width, height = frames[0].size
    return f"{width}x{height}, {len(frames)} frames, {float(rate or 0):g} fps"


def contact_sheet(rows: Sequence[Row], target: Path, notes: Sequence[str] = ()) -> None:
    """Write a picture with one row per video: its label above six frames at even distances; below all, `notes`.

    Small videos are enlarged smoothly, as a player would show them, so that the rows compare.
    """
    shown = [(f"{row.label}: {describe(row.video)}", _evenly_spaced(read_frames(row.video))) for row in rows]
    heights = [round(_CELL_WIDTH * frames[0].height / frames[0].width) for _, frames in shown]
    columns = max(len(frames) for _, frames in shown)
    height = sum(heights) + len(rows) * (_LABEL_HEIGHT + _GAP) + len(notes) * _LABEL_HEIGHT
    size = (columns * (_CELL_WIDTH + _GAP) + _GAP, height)
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_LABEL_SIZE)
    top = 0
    for (label, frames), height in zip(shown, heights, strict=True):
        draw.text((_GAP, top + _GAP), label, fill=_INK, font=font)
        top += _LABEL_HEIGHT
        for column, frame in enumerate(frames):
            cell = frame.resize((_CELL_WIDTH, height), Image.Resampling.BICUBIC)
            sheet.paste(cell, (_GAP + column * (_CELL_WIDTH + _GAP), top))
        top += height + _GAP
    for note in notes:
        draw.text((_GAP, top + _GAP), note, fill=_INK, font=font)
        top += _LABEL_HEIGHT
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target)


def _evenly_spaced(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """At most six frames, the first and the last among them."""
    wanted = min(_COLUMNS, len(frames))
    if wanted == 1:
        return [frames[0]]
    return [frames[round(i * (len(frames) - 1) / (wanted - 1))] for i in range(wanted)]
