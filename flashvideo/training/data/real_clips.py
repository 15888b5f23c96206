"""Clips cut from a library of real ones, at random times, positions, sizes and rates."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..errors import TrainingError
from .clip_library import Clip, ClipLibrary, digest_of
from .held_out import TEST, TRAIN, VALIDATION

SHRINK = (1.0, 2.0)  # fetched clips are compressed: shrinking hides the artefacts
VERSION = 1  # goes up whenever the same seed gives another clip: latents cached before don't count any more
STRIDES = (1, 2)  # frames from one to the next, since clips have different rates
_SIDES = re.compile(r"\b(left|right|leftwards?|rightwards?|(anti|counter)?-?clockwise)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Cut:
    """How samples are cut from clips."""

    shrink: tuple[float, float] = SHRINK  # pixels of the clip for one of the sample
    strides: tuple[int, ...] = STRIDES
    across_cuts: bool = False  # whether samples may show two scenes; else only where a clip has nothing longer
    flip: bool = True  # half of them, except where the caption mentions left or right


class RealClips:
    """Samples of `frames` x `height` x `width` from the clips of a library that are long and large enough.

    A sample depends only on the library, seed and index. `split`: "train"; "validation", the clips that are
    held out, one after the other; or "test". Raises TrainingError if the split holds no such clip.
    """

    def __init__(
        self,
        library: ClipLibrary,
        height: int,
        width: int,
        frames: int,
        seed: int,
        *,
        split: str = TRAIN,
        cut: Cut | None = None,
    ) -> None:
        self.library, self.height, self.width, self.frames = library, height, width, frames
        self.seed, self.split, self.cut = seed, split, cut or Cut()
        clips = library.of_split(split)
        self.clips = [clip for clip in clips if clip.frames >= frames and self._largest_shrink(clip) >= 1]
        if not self.clips:
            raise TrainingError(self._none(clips))
        self._open: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, object]:
        """Leave mapped files behind when a worker process is started."""
        return {**self.__dict__, "_open": {}}

    @property
    def digest(self) -> str:
        """A hash of what samples depend on beside settings."""
        return digest_of(self.clips, VERSION)

    def clip(self, index: int) -> Clip:
        """The clip that sample `index` is cut from."""
        return self.clips[index % len(self.clips)] if self.split != TRAIN else self._draw(index).choice(self.clips)

    def sample(self, index: int) -> tuple[Tensor, str]:
        """Sample `index`, [3, T, H, W] in [-1, 1], and its clip's caption."""
        clip, draw = self.clip(index), self._draw(index)
        draw.random()  # chose the clip
        shrink = self._shrink(clip, draw)
        rows, columns = (min(round(side * shrink), whole) for side, whole in (
            (self.height, clip.height), (self.width, clip.width)))  # fmt: skip
        top, left = draw.randint(0, clip.height - rows), draw.randint(0, clip.width - columns)
        times = self._times(clip, draw)
        pixels = self._frames(clip)[times, top : top + rows, left : left + columns]
        video = rearrange(torch.from_numpy(np.array(pixels)), "t row column c -> t c row column")
        if (rows, columns) != (self.height, self.width):
            size = self.height, self.width
            video = F.interpolate(video, size, mode="bicubic", antialias=True, align_corners=False)
        video = rearrange(video, "t c h w -> c t h w").float() / 127.5 - 1
        flipped = draw.random() < 0.5 and self.cut.flip and not _SIDES.search(clip.caption)
        return (video.flip(-1) if flipped else video.contiguous()), clip.caption

    def _draw(self, index: int) -> random.Random:
        return random.Random(f"{self.seed} {self.split} real {index}")

    def _largest_shrink(self, clip: Clip) -> float:
        return min(clip.height / self.height, clip.width / self.width)

    def _shrink(self, clip: Clip, draw: random.Random) -> float:
        low, high = self.cut.shrink
        largest = self._largest_shrink(clip)
        return draw.uniform(min(low, largest), min(high, largest))

    def _times(self, clip: Clip, draw: random.Random) -> slice:
        """The frames of a sample: within one scene if there is one of the length, or may be across cuts."""
        edges = (0, *(() if self.cut.across_cuts else clip.cuts), clip.frames)
        strides = [stride for stride in self.cut.strides if self._starts(edges, stride)] or [1]
        stride = draw.choice(strides)
        start = draw.choice(self._starts(edges, stride) or self._starts((0, clip.frames), stride))
        return slice(start, start + self._length(stride), stride)

    def _length(self, stride: int) -> int:
        return (self.frames - 1) * stride + 1

    def _starts(self, edges: Sequence[int], stride: int) -> list[int]:
        """The frames that a sample may begin with, within scenes that begin and end at these edges."""
        scenes = zip(edges, edges[1:], strict=False)
        return [start for first, end in scenes for start in range(first, end - self._length(stride) + 1)]

    def _frames(self, clip: Clip) -> np.ndarray:
        if clip.sha256 not in self._open:
            self._open[clip.sha256] = self.library.frames(clip)
        return self._open[clip.sha256]

    def _none(self, clips: list[Clip]) -> str:
        kind = {TRAIN: "to train on", VALIDATION: "that is held out", TEST: "for testing"}[self.split]
        wanted = f"{self.width}x{self.height} pixels and {self.frames} frames"
        if not clips:
            return f"{self.library.folder} holds no clip {kind}."
        largest = max(clips, key=lambda clip: (clip.frames >= self.frames, clip.height * clip.width))
        return (
            f"{self.library.folder} holds no clip {kind} of at least {wanted}; the largest, {largest.name}, has "
            f"{largest.width}x{largest.height} pixels and {largest.frames} frames."
        )
