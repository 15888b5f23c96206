"""A folder of real videos with captions as training data: clip.mp4 and, beside it, clip.txt (UTF-8).

Pictures are clips of one frame, and animated ones are videos. Clips are cut at random times and positions, at the given
rate and size, and depend only on the files, the seed and the index. About every tenth video, chosen by its name, is for
validation. A video is left out if it is smaller or shorter than the clips, or if it or its caption can't be read.
Damaged parts are left out, too. A warning names the file, and training continues as long as another one is usable.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...video_files import colour_matrix, open_container, orientation_of, picture_track, upright_pixels
from ..errors import TrainingError
from ..scenes.rendering import FRAME_RATE
from .decoding import PICTURE_ENDINGS, UndecodableError, picture_count, picture_frames

VIDEO_ENDINGS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")
ENDINGS = VIDEO_ENDINGS + PICTURE_ENDINGS
HELD_OUT = 10  # one video of this many is never learnt from
_EPSILON = 1e-4  # seconds: containers round times
_DURATION = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")  # Matroska's tag of a stream, hours, minutes and seconds

_log = logging.getLogger(__name__)


class UnusableVideo(ValueError):
    """A video that no clip can be cut from; the message gives the reason, without the file's name."""


class UnusablePart(UnusableVideo):
    """A video that no clip can be cut from at this time; at other times perhaps."""


class VideoFolder:
    """Clips of `frames` x `height` x `width` at `rate` frames a second from a folder's videos, its subfolders' too.

    `split`: "train" or "validation", which share no video unless there is only one. Raises TrainingError if the folder
    is missing or holds no video with a readable caption, and from `sample` once no video is left that can be read.
    """

    def __init__(
        self,
        folder: Path | str,
        height: int,
        width: int,
        frames: int,
        seed: int,
        *,
        rate: float = FRAME_RATE,
        split: str = "train",
    ) -> None:
        self.folder = Path(folder)
        self.height, self.width, self.frames, self.rate = height, width, frames, rate
        self.seed, self.split = seed, split
        self.problems: dict[Path, str] = {}
        self._damaged: dict[Path, str] = {}
        if not self.folder.is_dir():
            raise TrainingError(f"{self.folder}: there is no such folder of videos.")
        videos = sorted(path for path in self.folder.rglob("*") if self._may_be_cut(path))
        self._captions = {path: text for path in videos if (text := self._read_caption(path)) is not None}
        if not self._captions:
            raise TrainingError(self._nothing_left())
        self._videos = self._of_split()

    @property
    def skipped(self) -> int:
        """How many videos were left out so far; `problems` has their reasons."""
        return len(self.problems)

    @property
    def digest(self) -> str:
        """A hash of what clips are cut from: the videos' names, sizes and times of change, and their captions."""
        files = [(self._name(path), path.stat(), self._captions[path]) for path in self._videos]
        content = [(name, stat.st_size, stat.st_mtime_ns, caption) for name, stat, caption in files]
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def _may_be_cut(self, path: Path) -> bool:
        """Whether a file is a video; for clips of one frame, a picture is enough."""
        ending = path.suffix.lower()
        if ending not in PICTURE_ENDINGS:
            return ending in VIDEO_ENDINGS
        try:
            return self.frames == 1 or picture_count(path) > 1
        except UndecodableError:
            return True  # reported later, with others that can't be read

    def _name(self, video: Path) -> str:
        return video.relative_to(self.folder).as_posix()

    def _of_split(self) -> list[Path]:
        """The videos of a split, in the order of their names."""
        videos = list(self._captions)
        if len(videos) == 1:
            if self.split != "train":
                _log.warning("%s holds a single video: it is learnt from, and judged by, too.", self.folder)
            return videos
        # By name, so that new files in a folder don't move videos from training to validation.
        numbers = {path: _name_number(self._name(path)) for path in videos}
        held_out = {path for path, number in numbers.items() if number % HELD_OUT == 0}
        if len(held_out) in (0, len(videos)):
            held_out = {min(videos, key=numbers.__getitem__)}
        return [path for path in videos if (path in held_out) == (self.split != "train")]

    def sample(self, index: int) -> tuple[Tensor, str]:
        """Clip `index`, [3, T, H, W] in [-1, 1], and its caption."""
        draw = random.Random(f"{self.seed} {index}")
        tried: set[Path] = set()
        while True:
            # Drawn from all videos, also broken ones, so that a clip doesn't depend on which were found broken before.
            path = draw.choice(self._videos)
            when, across, down = draw.random(), draw.random(), draw.random()
            if path not in self.problems:
                try:
                    fit = partial(self._fit, across=across, down=down)
                    pictures = read_clip(path, self.frames, self.rate, when, fit)
                    return torch.stack(pictures, 1), self._captions[path]
                except UnusablePart as problem:
                    self._report_damage(path, str(problem))
                except UnusableVideo as problem:
                    self._leave_out(path, str(problem))
            tried.add(path)
            if len(tried) == len(self._videos):
                raise TrainingError(self._nothing_left())

    def _fit(self, frame: np.ndarray, across: float, down: float) -> Tensor:
        """[H, W, 3] uint8 -> [3, height, width] in [-1, 1]: the largest part of that shape, resized."""
        rows, columns = frame.shape[:2]
        if rows < self.height or columns < self.width:
            size = f"{columns}x{rows} of {self.width}x{self.height}"
            raise UnusableVideo(f"it is smaller than the clips ({size}), and would teach soft pictures")
        scale = min(rows / self.height, columns / self.width)
        tall, wide = max(1, round(self.height * scale)), max(1, round(self.width * scale))
        top, left = round(down * (rows - tall)), round(across * (columns - wide))
        part = torch.from_numpy(np.array(frame[top : top + tall, left : left + wide]))
        part = part.permute(2, 0, 1)[None].float() / 127.5 - 1
        part = F.interpolate(part, (self.height, self.width), mode="bicubic", antialias=True, align_corners=False)
        return part[0].clamp(-1, 1)

    def _read_caption(self, video: Path) -> str | None:
        path = video.with_suffix(".txt")
        try:
            return " ".join(path.read_text(encoding="utf-8-sig").split())
        except FileNotFoundError:
            self._leave_out(video, f"its caption {path.name} is missing")
        except UnicodeDecodeError:
            self._leave_out(video, f"its caption {path.name} is not UTF-8 text")
        except OSError as problem:
            self._leave_out(video, f"its caption {path.name} can't be read ({problem.strerror})")
        return None

    def _leave_out(self, video: Path, why: str) -> None:
        self.problems[video] = why
        _log.warning("%s is left out: %s. (%d left out so far)", video, why, len(self.problems))

    def _report_damage(self, video: Path, why: str) -> None:
        if video not in self._damaged:
            _log.warning("%s: a clip can't be cut from a part of it: %s. Its other parts are used.", video, why)
        self._damaged[video] = why

    def _nothing_left(self) -> str:
        problems = {**self.problems, **self._damaged}
        if not problems:
            kind = "videos" if self.frames > 1 else "videos or pictures"
            return f"{self.folder} holds no {kind} ({', '.join(ENDINGS if self.frames == 1 else VIDEO_ENDINGS)})."
        path, why = list(problems.items())[-1]
        which = f"of its {len(problems)} videos"
        if path in self._captions and self.split != "train":
            which = f"of the {len(self._videos)} videos for validation (one of {HELD_OUT}, by name)"
        return f"{self.folder}: none {which} can be used; {path.name}: {why}."


def read_clip(
    path: Path,
    frames: int,
    rate: float,
    when: float = 0.0,
    fit: Callable[[np.ndarray], Any] = lambda pixels: pixels,
) -> list[Any]:
    """`frames` frames at `rate` a second, uint8 [H, W, 3]; `when` in [0, 1] is from the earliest to the latest.

    At each moment the frame that is shown then, as `fit` transforms it. Raises UnusableVideo for a file that isn't a
    video or is too short, and UnusablePart for one that is damaged at this time.
    """
    if path.suffix.lower() in PICTURE_ENDINGS:
        return _cut_pictures(path, frames, rate, when, fit)
    try:
        with open_container(path) as container:
            if picture_track(container) is None:
                raise UnusableVideo("it holds no pictures")
            return _cut(container, frames, rate, when, fit)
    except (av.FFmpegError, OSError) as problem:
        raise UnusableVideo(f"it can't be read as a video ({problem.strerror or problem})") from problem


def _cut_pictures(path: Path, frames: int, rate: float, when: float, fit: Callable[[np.ndarray], Any]) -> list[Any]:
    """`read_clip` for a picture or an animation."""
    try:
        shown = [(fit(pixels), seconds) for pixels, seconds in picture_frames(path)]
    except UndecodableError as problem:
        raise UnusableVideo(str(problem)) from problem
    ends = np.cumsum([seconds for _, seconds in shown])
    needed = (frames - 1) / rate + ends[-1] / len(shown)
    if ends[-1] + _EPSILON < needed:
        raise UnusableVideo(f"it is too short: {ends[-1]:.2f} s of {needed:.2f} s")
    moments = when * max(0.0, ends[-1] - needed) + np.arange(frames) / rate
    places = np.searchsorted(ends, moments + _EPSILON, side="right").clip(max=len(shown) - 1)
    return [shown[place][0] for place in places.tolist()]


def _cut(
    container: av.container.InputContainer, frames: int, rate: float, when: float, fit: Callable[[np.ndarray], Any]
) -> list[Any]:
    stream = picture_track(container)
    stream.thread_type = "AUTO"
    frame_time = 1 / float(stream.average_rate or rate)
    needed = (frames - 1) / rate + frame_time
    length = _length(container, stream)
    if length is not None and length + _EPSILON < needed:
        raise UnusableVideo(f"it is too short: {length:.2f} s of {needed:.2f} s")
    start = when * max(0.0, (length or needed) - needed)
    decode = partial(_decode, container, count=frames, rate=rate, frame_time=frame_time, fit=fit)
    kept = decode(start, seek=start > 0)
    if len(kept) < frames and start > 0:  # the pictures end before the file does, such as before its sound
        start = max(0.0, start - (frames - len(kept)) / rate)
        kept = decode(start, seek=True)
    if len(kept) < frames:
        kind = UnusablePart if start > 0 else UnusableVideo
        raise kind(f"it ends after {len(kept)} of {frames} frames")
    return kept


def _decode(
    container: av.container.InputContainer,
    start: float,
    *,
    seek: bool,
    count: int,
    rate: float,
    frame_time: float,
    fit: Callable[[np.ndarray], Any],
) -> list[Any]:
    """Up to `count` frames from `start` seconds on, each transformed by `fit`."""
    stream = picture_track(container)
    origin = float((stream.start_time or 0) * Fraction(stream.time_base))
    kept: list[Any] = []
    sizes: set[tuple[int, ...]] = set()

    def keep(frame: av.VideoFrame) -> None:
        pixels = upright_pixels(frame, colour_matrix(frame), orientation_of(frame, stream.codec_context.name))
        sizes.add(pixels.shape)
        if len(sizes) > 1:
            raise UnusablePart("its pictures change their size")
        kept.append(fit(pixels))

    shown, shown_at = None, 0.0
    try:
        if seek:
            container.seek(int((origin + start) / float(stream.time_base)), stream=stream)
        for frame in container.decode(stream):
            at = (frame.time or 0.0) - origin
            while shown is not None and len(kept) < count and at > start + len(kept) / rate + _EPSILON:
                keep(shown)
            if len(kept) == count:
                break
            shown, shown_at = frame, at
    except av.FFmpegError as problem:
        raise UnusablePart(f"it can't be decoded ({problem.strerror or problem})") from problem
    # The last frame is shown for its own duration.
    while shown is not None and len(kept) < count and shown_at + frame_time > start + len(kept) / rate + _EPSILON:
        keep(shown)
    return kept


def _length(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    """Seconds of the pictures if the file has their duration, else of the whole file."""
    if stream.duration:
        return float(stream.duration * Fraction(stream.time_base))
    if match := _DURATION.fullmatch(stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = match.groups()
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    return float(Fraction(container.duration, av.time_base)) if container.duration else None


def _name_number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
