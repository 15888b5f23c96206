"""Frames of files that hold pictures: stills and animations through Pillow, videos through PyAV."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from ...video_files import VIDEO_ENDINGS as _VIDEO_FILES
from ...video_files import colour_matrix, open_container, orientation_of, upright_pixels
from ..errors import TrainingError

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
VIDEO_ENDINGS = tuple(ending for ending in _VIDEO_FILES if ending not in PICTURE_ENDINGS)
ENDINGS = PICTURE_ENDINGS + VIDEO_ENDINGS

_MATTE = (255, 255, 255)  # behind transparent pixels
_FALLBACK_RATE = 8.0  # frames a second, if a video has no rate
_FALLBACK_SECONDS = 0.1  # duration of a frame of an animation without one: as browsers do

# Errors of Pillow for damaged and mislabelled files: UnidentifiedImageError is an OSError.
_PILLOW_ERRORS = (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError)

_log = logging.getLogger(__name__)

# Transforms a frame [H, W, 3] uint8 before it is stored.
Fit = Callable[[np.ndarray], np.ndarray]


class UndecodableError(TrainingError):
    """A file that no frames can be read from; the message gives the reason, without the file's name."""


@dataclass(frozen=True)
class Decoded:
    """Frames [T, H, W, 3] uint8, and how many of them are shown a second; 0 for a still."""

    frames: np.ndarray
    rate: float


def decode(path: Path, longest: int, fit: Fit) -> Decoded:
    """At most `longest` frames of a file, from its middle, each transformed by `fit`.

    Raises UndecodableError if there are none.
    """
    if path.suffix.lower() in PICTURE_ENDINGS:
        return _decode_picture(path, longest, fit)
    return _decode_video(path, longest, fit)


def shrunk_to(side: int) -> Fit:
    """A transform that shrinks a frame's shorter side to `side` pixels, antialiased; smaller frames stay."""

    def fit(pixels: np.ndarray) -> np.ndarray:
        height, width = pixels.shape[:2]
        scale = side / min(height, width)
        if scale >= 1:
            return pixels
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))

    return fit


def _decode_picture(path: Path, longest: int, fit: Fit) -> Decoded:
    count = picture_count(path)
    first = max(0, (count - longest) // 2)
    frames, seconds = [], 0.0
    for index, (pixels, duration) in enumerate(picture_frames(path)):
        if index >= first:
            frames.append(fit(pixels))
            seconds += duration
        if len(frames) == longest:
            break
    return Decoded(np.stack(frames), len(frames) / seconds if len(frames) > 1 else 0.0)


def picture_count(path: Path) -> int:
    """How many frames a picture file has: 1 for a still. Raises UndecodableError."""
    with _opened_picture(path) as picture:
        return getattr(picture, "n_frames", 1)


def picture_frames(path: Path) -> Iterator[tuple[np.ndarray, float]]:
    """Each frame of a picture file, uint8 [H, W, 3], upright, and the seconds that it stays.

    Raises UndecodableError if the first can't be read; ends with a warning where a later one can't.
    """
    with _opened_picture(path) as picture:
        count = getattr(picture, "n_frames", 1)
        for index in range(count):
            try:
                picture.seek(index)
                pixels = _opaque(ImageOps.exif_transpose(picture) if count == 1 else picture)
            except _PILLOW_ERRORS as problem:
                if not index:
                    raise
                _log.warning("%s: only %d of its %d frames can be read (%s).", path, index, count, problem)
                return
            yield pixels, picture.info.get("duration", 0) / 1000 or _FALLBACK_SECONDS


@contextmanager
def _opened_picture(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as picture:
            yield picture
    except _PILLOW_ERRORS as problem:
        raise UndecodableError(f"it can't be read as a picture ({problem})") from problem


def _opaque(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I;16"):  # Pillow would clip it
        return np.repeat(np.uint8(np.asarray(picture) >> 8)[..., None], 3, axis=-1)
    if not picture.has_transparency_data:
        return np.asarray(picture.convert("RGB"))
    picture = picture.convert("RGBA")
    matte = Image.new("RGBA", picture.size, (*_MATTE, 255))
    return np.asarray(Image.alpha_composite(matte, picture).convert("RGB"))


def _decode_video(path: Path, longest: int, fit: Fit) -> Decoded:
    frames: list[np.ndarray] = []
    rate = _FALLBACK_RATE
    try:
        with open_container(path) as container:
            if not container.streams.video:
                raise UndecodableError("it holds no pictures")
            rate = float(container.streams.video[0].average_rate or rate)
            for pixels in _middle(container, rate, longest):
                kept = fit(pixels)
                if frames and kept.shape != frames[0].shape:
                    _log.warning("%s: its pictures change their size; the first %d are used.", path, len(frames))
                    break
                frames.append(kept)
    except (av.FFmpegError, OSError) as problem:
        reason = problem.strerror or problem
        if not frames:
            raise UndecodableError(f"it can't be read as a video ({reason})") from problem
        _log.warning("%s: only %d frames can be read (%s).", path, len(frames), reason)
    if not frames:
        raise UndecodableError("it holds no pictures")
    return Decoded(np.stack(frames), rate if len(frames) > 1 else 0.0)


def _middle(container: av.container.InputContainer, rate: float, longest: int) -> Iterator[np.ndarray]:
    """The frames in the middle of a video, at most `longest`, upright and uint8 [H, W, 3]."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    skipped = max(0.0, (_length(container, stream) - longest / rate) / 2)  # seconds
    origin = float((stream.start_time or 0) * Fraction(stream.time_base))
    if skipped:
        container.seek(int((origin + skipped) / Fraction(stream.time_base)), stream=stream)
    count = 0
    for frame in container.decode(stream):
        if skipped and (frame.time or 0.0) - origin < skipped:
            continue
        yield upright_pixels(frame, colour_matrix(frame), orientation_of(frame, stream.codec_context.name))
        count += 1
        if count == longest:
            return


def _length(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Seconds if the file has a duration, else 0."""
    if stream.duration:
        return float(stream.duration * Fraction(stream.time_base))
    return float(Fraction(container.duration, av.time_base)) if container.duration else 0.0
