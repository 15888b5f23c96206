"""Where training clips come from: drawn scenes, real clips, moving photographs, or a mixture of these."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..errors import TrainingError
from .clip_library import ClipLibrary
from .photographs import SPEEDS, MovingPhotographs
from .real_clips import SHRINK, STRIDES, Cut, RealClips

SCENES, REAL, PHOTOGRAPHS, MIXED = "scenes", "real", "photographs", "mixed"
SOURCES = (SCENES, REAL, PHOTOGRAPHS, MIXED)


class Clips(Protocol):
    """A source of training clips. A sample depends only on the source's settings and the index."""

    def sample(self, index: int) -> tuple[Tensor, str]:
        """Clip `index`, [3, T, H, W] in [-1, 1], and its caption."""
        ...


@dataclass(frozen=True)
class Weights:
    """How often each source is drawn, relative to the others."""

    scenes: float = 1.0
    real: float = 1.0
    photographs: float = 1.0

    def __post_init__(self) -> None:
        """Refuse negative weights and weights that are all 0."""
        values = (self.scenes, self.real, self.photographs)
        if min(values) < 0 or not sum(values):
            raise TrainingError(f"weights must be 0 or more, and one of them above 0; got {list(values)}.")


@dataclass(frozen=True, kw_only=True)
class Footage:
    """Which of the sources, and how clips are cut from them; `[clips]` of a config."""

    source: str = SCENES  # one of SOURCES
    real: str = ""  # the folder that `train fetch` filled; for all but scenes
    weights: Weights = field(default_factory=Weights)  # of a mixture
    shrink: tuple[float, float] = SHRINK  # pixels of a real clip for one of the sample
    strides: tuple[int, ...] = STRIDES  # frames of a real clip from one of the sample to the next
    across_cuts: bool = False  # whether a sample may show two scenes of a real clip
    flip: bool = True  # half of the real clips
    speeds: tuple[float, float] = SPEEDS  # of moving photographs, picture heights a second

    def __post_init__(self) -> None:
        """Refuse settings that no clip can be cut with."""
        self.check_source(self.source)
        if not 1 <= self.shrink[0] <= self.shrink[1]:
            raise TrainingError(f"shrink must be two numbers of 1 or more, the smaller first; got {list(self.shrink)}.")
        if not self.strides or min(self.strides) < 1:
            raise TrainingError(f"strides must be whole numbers of 1 or more; got {list(self.strides)}.")
        if not 0 < self.speeds[0] <= self.speeds[1]:
            raise TrainingError(f"speeds must be two numbers above 0, the smaller first; got {list(self.speeds)}.")

    def check_source(self, source: str) -> None:
        """Refuse an unknown source, and one without its folder."""
        if source not in SOURCES:
            raise TrainingError(f"source must be one of {', '.join(SOURCES)}; got {source!r}.")
        if source != SCENES and not self.real:
            raise TrainingError(f'source = "{source}" needs the folder of fetched clips: add real = "runs/nano/real".')

    def check_fetched(self) -> None:
        """Raises TrainingError if the settings ask for fetched clips and there are none."""
        if self.source != SCENES:
            ClipLibrary.open(self.real)

    def open_footage(
        self, scenes: Clips, split: str, height: int, width: int, frames: int, seed: int, source: str = ""
    ) -> Clips:
        """Clips of "train" or "validation" (all other splits); `source` overrides the settings' own.

        `scenes` are the drawn ones of that size. Raises TrainingError if there are no fetched clips.
        """
        source = source or self.source
        if source == SCENES:
            return scenes
        library = ClipLibrary.open(self.real)
        cut = Cut(self.shrink, self.strides, self.across_cuts, self.flip)

        def real() -> Clips:
            return RealClips(library, height, width, frames, seed, split=split, cut=cut)

        def photographs() -> Clips:
            return MovingPhotographs(library, height, width, frames, seed, split=split, speeds=self.speeds)

        if source != MIXED:
            return real() if source == REAL else photographs()
        weights = (self.weights.scenes, self.weights.real, self.weights.photographs)
        makers = (lambda: scenes, real, photographs)
        chosen = [(make(), weight) for make, weight in zip(makers, weights, strict=True) if weight]
        return Mixture([clips for clips, _ in chosen], [weight for _, weight in chosen], seed)


@dataclass(frozen=True)
class Mixture:
    """Clips of several sources; the source of each clip is drawn by the weights."""

    sources: Sequence[Clips]
    weights: Sequence[float]
    seed: int

    def of(self, index: int) -> Clips:
        """The source of clip `index`."""
        return random.Random(f"{self.seed} source {index}").choices(self.sources, self.weights)[0]

    def sample(self, index: int) -> tuple[Tensor, str]:
        """Clip `index`, [3, T, H, W] in [-1, 1], and its caption."""
        return self.of(index).sample(index)

    @property
    def digest(self) -> str:
        """A hash of everything that samples depend on besides the settings."""
        return hashlib.sha256(repr([digest_of_source(source) for source in self.sources]).encode()).hexdigest()


def digest_of_source(source: Clips) -> str:
    """A hash of the files that a source cuts clips from; empty for drawn scenes."""
    return getattr(source, "digest", "")
