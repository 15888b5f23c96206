"""Quality of frames [T, H, W, 3] in [0, 1] without a truth: BRISQUE and PIQE of real clips, NIQE of drawn scenes.

BRISQUE (Mittal, Moorthy and Bovik 2012) is the `brisque` package with the weights in it, PIQE (Venkatanath et al. 2015)
is `pypiqe`. Both are 0 for the best and about 100 for the worst, and both take a mosaic for detail: read them beside
the gradient-energy error. NIQE (Mittal, Soundararajan and Bovik 2013) is written here after the paper, because its
ready-made statistics are those of photographs and rate drawn truth worst: `NaturalModel` is fitted to drawn scenes.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..data.degradations import LUMA
from ..errors import TrainingError

PACKAGES = {"brisque": "brisque", "piqe": "pypiqe"}
JUDGED_FRAMES = 3  # of a clip by BRISQUE and PIQE, evenly in time
LEVELS = 255.0
PATCH = 48  # pixels; half the paper's 96, because these pictures are small
SHARPEST = 0.75  # patches of the model are at least so sharp, in parts of their picture's sharpest
FEWEST_CLIPS = 16  # that a model is fitted to
_WINDOW, _SIGMA = 7, 7 / 6  # of the local mean and contrast
_SHAPES = torch.arange(0.2, 10.001, 0.001, dtype=torch.float64)  # of generalised Gaussians that are compared
_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))


def missing_packages() -> list[str]:
    """Which of "brisque" and "piqe" can't be measured: its package isn't installed, or fails with this NumPy."""
    return [metric for metric in PACKAGES if not _works(metric)]


@cache
def _works(metric: str) -> bool:
    noise = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    try:
        {"brisque": brisque, "piqe": piqe}[metric](noise)
    except (TrainingError, TypeError, AttributeError):  # brisque 0.2.0 raises TypeError with NumPy 2.4
        return False
    return True


def _imported(name: str) -> Any:
    with warnings.catch_warnings():  # brisque 0.2.0 uses an old name of scipy.ndimage
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(name)


def brisque(frames: Tensor) -> float:
    """BRISQUE, the mean over JUDGED_FRAMES; NaN for flat pictures. Raises TrainingError if it isn't installed."""
    judge = _brisque()
    return _mean([float(judge.score(frame)) for frame in _judged(frames)])


def piqe(frames: Tensor) -> float:
    """PIQE of the luma, the mean over JUDGED_FRAMES. Raises TrainingError if it isn't installed."""
    judge = _package("pypiqe").piqe
    weights = np.array(LUMA)
    return _mean([float(judge(np.rint(frame @ weights).astype(np.uint8))[0]) for frame in _judged(frames)])


def _package(name: str) -> Any:
    try:
        return _imported(name)
    except ImportError as error:
        message = "BRISQUE and PIQE are not installed: pip install --no-deps -r scripts/requirements/evidence.txt"
        raise TrainingError(message) from error


@lru_cache(maxsize=1)
def _brisque() -> Any:
    return _package("brisque").BRISQUE(url=False)


def _judged(frames: Tensor) -> list[np.ndarray]:
    """JUDGED_FRAMES of the clip as pictures of 8 bits."""
    times = np.unique(np.linspace(0, len(frames) - 1, JUDGED_FRAMES).round().astype(int))
    return [(frames[time] * LEVELS).round().clamp(0, LEVELS).byte().numpy() for time in times.tolist()]


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else math.nan


@dataclass(frozen=True)
class NaturalModel:
    """The statistics of undistorted pictures: mean [36] and covariance [36, 36] of their patches' features."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def fitted(cls, clips: Iterable[Tensor]) -> NaturalModel:
        """Fit it to the sharpest patches of clips [T, H, W, 3], pooled. Raises ValueError for too few clips."""
        pooled = [patch_features(clip, sharpest=SHARPEST) for clip in clips]
        if len(pooled) < FEWEST_CLIPS:
            raise ValueError(f"NIQE is fitted to at least {FEWEST_CLIPS} clips; got {len(pooled)}.")
        return cls(*_gaussian(torch.cat(pooled)))

    def distance(self, frames: Tensor) -> float:
        """NIQE of a clip: how far its patches, all frames pooled, are from the model; 0 is best, NaN for flat ones."""
        features = patch_features(frames)
        if features.isfinite().all(dim=1).sum() < 2:
            return math.nan
        mean, covariance = _gaussian(features)
        apart = self.mean - mean
        inverse = torch.linalg.pinv((self.covariance + covariance) / 2)
        return float((apart @ inverse @ apart).clamp_min(0).sqrt())


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance over rows, of those without a missing number (flat patches have some)."""
    features = features[features.isfinite().all(dim=1)]
    return features.mean(dim=0), torch.cov(features.T)


def patch_features(frames: Tensor, sharpest: float = 0.0) -> Tensor:
    """Features of all patches of all frames [T, H, W, 3], float64 [patches, 36]: 18 at full size, 18 at half.

    With `sharpest`, patches less sharp than that part of their frame's sharpest are left out. Raises ValueError for
    pictures that are smaller than a patch.
    """
    luma = (frames.double() @ torch.tensor(LUMA, dtype=torch.float64))[:, None] * LEVELS  # [T, 1, H, W]
    rows, columns = (side // PATCH for side in luma.shape[-2:])
    if not rows or not columns:
        raise ValueError(f"NIQE needs pictures of at least {PATCH}x{PATCH} pixels.")
    luma = luma[..., : rows * PATCH, : columns * PATCH]
    half = F.interpolate(luma, scale_factor=0.5, mode="bicubic", antialias=True, align_corners=False)
    features, contrast = [], None
    for picture, side in ((luma, PATCH), (half, PATCH // 2)):
        normalised, local = _normalised(picture)
        patches = _patches(normalised, side)
        features.append(_features(patches))
        if contrast is None:
            contrast = _patches(local, side).mean(dim=(1, 2)).view(len(frames), -1)
    kept = contrast >= sharpest * contrast.amax(dim=1, keepdim=True)
    return torch.cat(features, dim=1)[kept.flatten()]


def _patches(pictures: Tensor, side: int) -> Tensor:
    """[T, 1, H, W] -> [T * patches, side, side]."""
    return rearrange(pictures, "t 1 (rows y) (columns x) -> (t rows columns) y x", y=side, x=side)


def _normalised(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Each pixel's distance from its surroundings' mean in units of their contrast, and that contrast; [T, 1, H, W]."""
    along = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    weights = torch.exp(-(along**2) / (2 * _SIGMA**2))
    weights = weights / weights.sum()

    def blurred(pixels: Tensor) -> Tensor:
        pixels = F.pad(pixels, (_WINDOW // 2,) * 4, mode="replicate")
        pixels = F.conv2d(pixels, weights.view(1, 1, -1, 1))
        return F.conv2d(pixels, weights.view(1, 1, 1, -1))

    mean = blurred(picture)
    contrast = (blurred(picture**2) - mean**2).clamp_min(0).sqrt()
    return (picture - mean) / (contrast + 1), contrast


def _features(patches: Tensor) -> Tensor:
    """[patches, side, side] -> [patches, 18]: shape and spread of the pixels, and of four neighbours' products."""
    ratio = patches.abs().mean(dim=(1, 2)) ** 2 / patches.square().mean(dim=(1, 2))
    columns = [_shape(ratio), patches.square().mean(dim=(1, 2)).sqrt()]
    for down, right in _NEIGHBOURS:
        product = (patches * patches.roll((-down, -right), dims=(1, 2))).flatten(1)
        columns += _asymmetric(product)
    return torch.stack(columns, dim=1)


def _asymmetric(values: Tensor) -> list[Tensor]:
    """Shape, mean, left and right spread of an asymmetric generalised Gaussian by its moments, each [patches]."""
    left, right = (_root_mean_square(values, side) for side in (values < 0, values > 0))
    lean = left / right
    ratio = values.abs().mean(dim=1) ** 2 / values.square().mean(dim=1)
    ratio = ratio * (lean**3 + 1) * (lean + 1) / (lean**2 + 1) ** 2
    shape = _shape(ratio)
    first, second, third = (torch.lgamma(order / shape) for order in (1, 2, 3))
    mean = (right - left) * torch.exp(second - (first + third) / 2)
    return [shape, mean, left, right]


def _root_mean_square(values: Tensor, which: Tensor) -> Tensor:
    return ((values.square() * which).sum(dim=1) / which.sum(dim=1)).sqrt()


def _shape(ratio: Tensor) -> Tensor:
    """The shape of a generalised Gaussian whose squared mean of amounts is `ratio` of its mean square."""
    known = torch.exp(2 * torch.lgamma(2 / _SHAPES) - torch.lgamma(1 / _SHAPES) - torch.lgamma(3 / _SHAPES))
    nearest = torch.searchsorted(known, ratio.contiguous()).clamp(0, len(_SHAPES) - 1)
    return torch.where(ratio.isfinite(), _SHAPES[nearest], math.nan)
