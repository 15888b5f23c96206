"""A folder of real videos with captions as training data: clip.mp4 and, beside it, clip.txt (UTF-8).

Clips are cut at random times and places, at the wanted rate and size, and depend on nothing but the files, the seed
and the index. Every tenth video, chosen by its name, is kept for validation. A video that is smaller than the clips, or
that can't be read, as its caption, is left out: a warning names the file, and training goes on.
"""

from __future__ import annotations

import hashlib
import logging
import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..video_files import colour_matrix, quarter_turns, upright_pixels
from .errors import TrainingError
from .rendering import FRAME_RATE

VIDEO_ENDINGS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")
HELD_OUT = 10  # one video of so many is never learnt from
_EPSILON = 1e-4  # seconds: containers round times

_log = logging.getLogger(__name__)


class UnusableVideo(ValueError):
    """A video that no clip can be cut from; the message says why, without the file's name."""


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
        if not self.folder.is_dir():
            raise TrainingError(f"{self.folder}: there is no such folder of videos.")
        videos = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in VIDEO_ENDINGS)
        self._captions = {path: text for path in videos if (text := self._read_caption(path)) is not None}
        if not self._captions:
            raise TrainingError(self._nothing_left())
        self._videos = self._of_split()

    @property
    def skipped(self) -> int:
        """How many videos were left out so far; `problems` says which, and why."""
        return len(self.problems)

    @property
    def digest(self) -> str:
        """A hash of what clips are cut from: the videos' names, sizes and times of change, and their captions."""
        files = [(self._name(path), path.stat(), self._captions[path]) for path in self._videos]
        content = [(name, stat.st_size, stat.st_mtime_ns, caption) for name, stat, caption in files]
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def _name(self, video: Path) -> str:
        return video.relative_to(self.folder).as_posix()

    def _of_split(self) -> list[Path]:
        """The videos of a split, in the order of their names."""
        videos = list(self._captions)
        if len(videos) == 1:
            if self.split != "train":
                _log.warning("%s holds a single video: it is learnt from, and judged by, too.", self.folder)
            return videos
        shuffled = sorted(videos, key=lambda path: hashlib.sha256(self._name(path).encode()).digest())
        held_out = set(shuffled[: -(-len(videos) // HELD_OUT)])
        return [path for path in videos if (path in held_out) == (self.split != "train")]

    def sample(self, index: int) -> tuple[Tensor, str]:
        """Clip `index`, [3, T, H, W] in [-1, 1], and its caption."""
        draw = random.Random(f"{self.seed} {index}")
        while True:
            # Drawn from all videos, broken ones too: a clip doesn't depend on which of them were found broken before.
            path = draw.choice(self._videos)
            when, across, down = draw.random(), draw.random(), draw.random()
            if path in self.problems:
                continue
            try:
                pictures = read_clip(path, self.frames, self.rate, when)
                self._check_size(*pictures.shape[1:3])
            except UnusableVideo as problem:
                self._leave_out(path, str(problem))
                if all(video in self.problems for video in self._videos):
                    raise TrainingError(self._nothing_left()) from problem
                continue
            return _fit(pictures, self.height, self.width, across, down), self._captions[path]

    def _check_size(self, rows: int, columns: int) -> None:
        if rows < self.height or columns < self.width:
            size = f"{columns}x{rows} of {self.width}x{self.height}"
            raise UnusableVideo(f"it is smaller than the clips ({size}), and would teach soft pictures")

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

    def _nothing_left(self) -> str:
        if not self.problems:
            return f"{self.folder} holds no videos ({', '.join(VIDEO_ENDINGS)})."
        path, why = list(self.problems.items())[-1]
        which = f"of its {len(self.problems)} videos"
        if path in self._captions and self.split != "train":
            which = f"of the {len(self._videos)} videos that it keeps for validation (one of {HELD_OUT}, by name)"
        return f"{self.folder}: none {which} can be used; {path.name}: {why}."


def read_clip(path: Path, frames: int, rate: float, when: float = 0.0) -> np.ndarray:
    """`frames` frames at `rate` a second, uint8 [T, H, W, 3]; `when` in [0, 1] is from the earliest to the latest.

    At each moment the frame that is shown then. Raises UnusableVideo for what isn't a video, is damaged or too short.
    """
    try:
        # A title in a Western or Japanese Windows's characters is no reason to leave a video out.
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise UnusableVideo("it holds no pictures")
            return _decode(container, frames, rate, when)
    except (av.FFmpegError, OSError) as problem:
        raise UnusableVideo(f"it can't be read as a video ({problem.strerror or problem})") from problem


def _decode(container: av.container.InputContainer, frames: int, rate: float, when: float) -> np.ndarray:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    frame_time = 1 / float(stream.average_rate or rate)
    needed = (frames - 1) / rate + frame_time
    length = _length(container, stream)
    if length is not None and length + _EPSILON < needed:
        raise UnusableVideo(f"it is too short: {length:.2f} s of {needed:.2f} s")
    origin = float((stream.start_time or 0) * stream.time_base)
    start = when * max(0.0, (length or needed) - needed)
    if start > 0:
        container.seek(int((origin + start) / stream.time_base), stream=stream)
    kept: list[np.ndarray] = []
    shown, shown_at = None, 0.0
    for frame in container.decode(stream):
        at = (frame.time or 0.0) - origin
        while shown is not None and len(kept) < frames and at > start + len(kept) / rate + _EPSILON:
            kept.append(_pixels(shown))
        if len(kept) == frames:
            break
        shown, shown_at = frame, at
    # The last frame stays for its own time.
    while shown is not None and len(kept) < frames and shown_at + frame_time >= start + len(kept) / rate - _EPSILON:
        kept.append(_pixels(shown))
    if len(kept) < frames:
        raise UnusableVideo(f"it ends after {len(kept)} of {frames} frames")
    if len({pixels.shape for pixels in kept}) > 1:
        raise UnusableVideo("its pictures change their size")
    return np.stack(kept)


def _pixels(frame: av.VideoFrame) -> np.ndarray:
    return upright_pixels(frame, colour_matrix(frame), quarter_turns(frame))


def _length(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    """Seconds, as far as the file says."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return float(Fraction(container.duration, av.time_base)) if container.duration else None


def _fit(pictures: np.ndarray, height: int, width: int, across: float, down: float) -> Tensor:
    """[T, H, W, 3] uint8 -> [3, T, height, width] in [-1, 1]: the largest part of that shape, then made as large."""
    rows, columns = pictures.shape[1:3]
    scale = min(rows / height, columns / width)
    tall, wide = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = round(down * (rows - tall)), round(across * (columns - wide))
    part = torch.from_numpy(np.ascontiguousarray(pictures[:, top : top + tall, left : left + wide]))
    part = part.permute(0, 3, 1, 2).float() / 127.5 - 1
    part = F.interpolate(part, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return part.clamp(-1, 1).transpose(0, 1).contiguous()
