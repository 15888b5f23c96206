"""Judges without a truth, as tables use them: BRISQUE and PIQE for real clips, a refitted NIQE for drawn scenes."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...frames import to_frames
from ..loop.checkpointing import whole_file
from ..scenes.stream import VERSION, SceneStream
from .no_reference import FEWEST_CLIPS, PATCH, NaturalModel, brisque, missing_packages, piqe

FITTED_SPLIT, FITTED_SEED = "validation", 5  # the scenes that NIQE is fitted to; measured ones are of another split
REAL = {"brisque": brisque, "piqe": piqe}
DRAWN = "niqe"


class Judges:
    """Judges clips, and keeps NIQE's fitted models in a folder; without a folder drawn scenes are not judged."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        missing = missing_packages()
        self._real = {name: judge for name, judge in REAL.items() if name not in missing}
        self._models: dict[tuple[int, int, int], NaturalModel] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics that can be measured here."""
        return (*self._real, *((DRAWN,) if self.folder else ()))

    def __call__(self, frames: Tensor, size: tuple[int, int, int], *, real: bool) -> dict[str, float]:
        """Judge a clip [T, H, W, 3] of `size` (T, H, W); what doesn't apply to it, or can't be measured, is NaN."""
        values = dict.fromkeys((*REAL, DRAWN), math.nan)
        if real:
            values |= {name: judge(frames) for name, judge in self._real.items()}
        elif self.folder and min(size[1:]) >= 2 * PATCH:
            values[DRAWN] = self.drawn_model(size).distance(frames)
        return values

    def drawn_model(self, size: tuple[int, int, int]) -> NaturalModel:
        """NIQE's model of undistorted drawn scenes of a size (T, H, W), fitted when it is first needed."""
        if size not in self._models:
            count, height, width = size
            name = f"niqe-{width}x{height}x{count}-{FEWEST_CLIPS}-{VERSION}.safetensors"
            path = self.folder / name
            if not path.is_file():
                self._fit(path, SceneStream(FITTED_SPLIT, height, width, count, FITTED_SEED))
            self._models[size] = NaturalModel(**load_file(path))
        return self._models[size]

    def _fit(self, path: Path, scenes: SceneStream) -> None:
        clips = (to_frames(scenes.sample(index)[0][None]) for index in range(FEWEST_CLIPS))
        model = NaturalModel.fitted(torch.round(clip * 255) / 255 for clip in clips)
        with whole_file(path) as part:
            save_file({"mean": model.mean, "covariance": model.covariance}, part)
