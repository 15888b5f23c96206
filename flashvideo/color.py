"""Matches the colours of a refined clip to its reference.

A clip is [T, H, W, 3] in [0, 1], a frame [H, W, 3]. Everything works on coded sRGB values, not on linear light: the
networks that shift the colours see coded values, so that colour casts are gains and offsets there; equal steps look
about equally large; and the variance of linear light depends mostly on the highlights.

There are two methods, with one rule for both: statistics of a single frame never decide that frame's colours. Methods
that match each frame's mean and deviation to its reference break this rule, and flicker when a bright object enters.

- "wavelet": the refined picture's low band is replaced by the reference's: result = refined + L(reference - refined),
  after the wavelet colour fix of StableSR (Wang et al. 2023, `wavelet_color_fix`), but with one clean spline step in
  place of five blurs. L is the same linear operator for every frame. It is an average (weights of at least zero that
  sum to one), symmetric, with eigenvalues in [0, 1]; so each frame's mean colour becomes the reference's, the
  correction changes from frame to frame by no more than refined and reference do, and on a steady reference the result
  flickers no more than the refined clip did; brightness and large areas are as steady as the reference. The correction
  is not averaged over time: that would keep the refiner's own flicker and its steps between windows, and leave trails
  behind moving objects. Detail keeps the refiner's contrast: a strong gain leaves fringes at hard edges.
  How fine the low band is can be chosen (`Detail`). At 70 pixels it holds light and colour. At about twice the
  enlargement's factor it holds nearly all that the reference shows, and the refiner adds only what is finer, all of it
  or as far as the reference supports it (`SupportedDetail`).
- "adain": each channel gets the reference's mean and standard deviation (Huang and Belongie 2017, equation 8), both
  taken over the whole clip: one gain and one offset for all frames. It scales detail too, and can't copy the
  reference's shapes into a picture that moved away from them. But it corrects only casts that are the same everywhere,
  and none that mix the channels (a rotated hue).

Memory: the result, and a few buffers of one frame's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from .config import (
    DETAIL_SIZE,
    MAX_DETAIL_SIZE,
    MIN_DETAIL_SIZE,
    NANO_DETAIL_GAIN,
    NANO_DETAIL_SIZE,
    NANO_FOOTAGE_STAGE2,
    NANO_REFINERS,
    DiTConfig,
)
from .progress import Progress, no_progress

_KNOTS_PER_SIZE = 70 / 16  # sinc(16 / 70)^8 = 1/2
_BANDED = 40  # pixels: with what isn't 0 in the matrices of finer splines a CPU is 4 times as fast or more
_MAX_GAIN = 4.0  # of adain: a larger one, or less than its inverse, means a clip without contrast, not a colour cast
_FLAT = 1e-4  # a standard deviation of 1/40 of an 8-bit step: nothing to scale
# Of SupportedDetail, measured on clips of FlashVideo-Nano (docs/nano_footage.md, "What the reference supports").
_AREA = 4 / 3  # times the detail size: over what contrast and disagreement are averaged
_FINEST = 5 / 9  # of the detail size: what is smaller still tells how sharp the reference is
_SHARP, _SOFT = 0.19, 0.15  # the finest detail's part of the reference's detail: enlarged 2 times, and 4 times
_ON_SHARP = 0.5  # the gain where the reference is as sharp as that
_CONTRAST, _DETAIL = 1e-5, 1e-6  # variances of 0.8 and 0.25 of an 8-bit step: less tells nothing
_FAINT = 4e-4  # variance of 5 8-bit steps: where the reference has this contrast, half of the gain beyond 1 counts


class LowBand:
    """The low band L of pictures of one size: a cubic spline with a knot about every 16 pixels, by default.

    Each axis has the basis B [side, knots] of cubic B-splines, the scaling functions of the spline wavelets (Unser,
    Aldroubi, Eden 1993). A knot's value is the average under its spline, and the picture is the sum of the splines:
    L = B diag(1 / B'1) B'. Both borders have a knot, and the picture is mirrored there, so that the weights sum to one
    up to the last pixel, for any side from 1. With knots every k pixels its response to a pattern of wavelength w is
    sinc(k / w)^8. For a `detail_size` of 70 pixels k is 16: 0.5 at 70 pixels, 0.98 at 400, 0.002 at 25.
    """

    def __init__(
        self, height: int, width: int, device: torch.device | str = "cpu", detail_size: float = DETAIL_SIZE
    ) -> None:
        spacing = detail_size / _KNOTS_PER_SIZE
        self._rows, self._row_means = (matrix.to(device) for matrix in _splines(height, spacing))
        self._columns, self._column_means = (matrix.to(device) for matrix in _splines(width, spacing))
        self._banded: tuple[_BandMatrix, ...] = ()
        if detail_size <= _BANDED and torch.device(device).type == "cpu":
            matrices = self._row_means, self._column_means, self._columns, self._rows
            self._banded = tuple(map(_BandMatrix, matrices))

    def __call__(self, picture: Tensor, out: Tensor | None = None) -> Tensor:
        """The low band of a picture [H, W, 3], float32; `out`, contiguous, receives it if given."""
        if self._banded:
            return self._by_bands(picture, out)
        low = self._row_means @ rearrange(picture, "h w c -> h (w c)")
        low = rearrange(low, "h (w c) -> h c w", c=picture.shape[2])
        low = low @ self._column_means.T @ self._columns.T
        out = torch.empty_like(picture, memory_format=torch.contiguous_format) if out is None else out
        torch.mm(self._rows, rearrange(low, "h c w -> h (w c)"), out=out.view(len(out), -1))
        return out

    def _by_bands(self, picture: Tensor, out: Tensor | None) -> Tensor:
        """The same from what isn't 0 in the matrices."""
        row_means, column_means, columns, rows = self._banded
        low, channels = row_means @ rearrange(picture, "h w c -> h (w c)"), picture.shape[2]
        low = columns @ (column_means @ rearrange(low, "h (w c) -> w (h c)", c=channels))
        low = rows @ rearrange(low, "w (h c) -> h (w c)", c=channels)
        low = rearrange(low, "h (w c) -> h w c", c=channels)
        return low if out is None else out.copy_(low)

    def of_planes(self, planes: Tensor) -> Tensor:
        """The low band of [..., H, W], float32, as a new tensor that gradients flow through."""
        low = self._row_means @ planes @ self._column_means.T
        return self._rows @ low @ self._columns.T


class _BandMatrix:
    """A matrix [M, N] whose rows have few numbers that aren't 0, side by side: products with it on a CPU."""

    def __init__(self, matrix: Tensor) -> None:
        filled = matrix != 0
        count = int(filled.sum(1).max())
        first = filled.int().argmax(1).clamp_max(matrix.shape[1] - count)
        self._places = first[:, None] + torch.arange(count)
        self._weights = matrix.gather(1, self._places)

    def __matmul__(self, rows: Tensor) -> Tensor:
        """With rows [N, K], float32: [M, K]."""
        return functional.embedding_bag(self._places, rows, per_sample_weights=self._weights, mode="sum")


class Detail(NamedTuple):
    """What "wavelet" takes from the refined clip: what is smaller than `size` pixels, 5 to 1000.

    With a `gain`, 1 or more, only as far as the reference supports it, and made stronger by it: see `SupportedDetail`.
    """

    size: float = DETAIL_SIZE
    gain: float | None = None


COLORS_ONLY = Detail()


class ColorStatistics(NamedTuple):
    """Mean and standard deviation of each channel over all pixels of all frames: [3] each, float64."""

    mean: Tensor
    deviation: Tensor


class WaveletMatch:
    """The "wavelet" method for frames of one size, one frame at a time."""

    def __init__(
        self, height: int, width: int, device: torch.device | str = "cpu", detail_size: float = DETAIL_SIZE
    ) -> None:
        self._low_band = LowBand(height, width, device, detail_size)
        self._difference = torch.empty(height, width, 3, device=device)
        self._correction = torch.empty_like(self._difference)

    def __call__(self, refined: Tensor, reference: Tensor, out: Tensor | None = None) -> Tensor:
        """A refined frame [H, W, 3] with its reference's low band, in [0, 1]; `out` receives it if given."""
        torch.sub(reference, refined, out=self._difference)
        return torch.add(refined, self._low_band(self._difference, self._correction), out=out).clamp_(0, 1)


class SupportedDetail:
    """The "wavelet" method for a refiner that can't be believed everywhere, one frame of one size at a time.

    What is larger than the detail size comes from the reference. Of what is smaller:

    - What the reference shows itself is kept: only the part of the refined detail that goes beyond it is added.
    - Detail is as strong as it can be believed, c / (c + d): c is the reference's local contrast (variance), d the mean
      squared difference of the two low bands there. A network that has put larger things in the wrong place, such as
      behind fast motion, has put their detail there, too. This is a Wiener filter's weight for a signal c and noise d.
    - Where the reference is soft, the detail is `gain` times as strong: a small network trained on errors makes detail
      weaker than it is. In faint areas it is left as it is, since what is added there flickers most: what `gain` goes
      beyond 1 counts as c / (c + _FAINT). Where the reference has the finest detail itself, the refiner has little to
      add: detail is half as strong.
    """

    def __init__(self, height: int, width: int, device: torch.device | str, detail: Detail) -> None:
        self._low, self._finer, self._wider = (
            LowBand(height, width, device, detail.size * factor) for factor in (1, _FINEST, _AREA)
        )
        self._gain = detail.gain

    def __call__(self, refined: Tensor, reference: Tensor, out: Tensor | None = None) -> Tensor:
        """A refined frame's detail on its reference, [H, W, 3] in [0, 1]; `out` receives it if given."""
        low, reference_low = self._low(refined), self._low(reference)
        added, shown = refined - low, reference - reference_low
        disagreement = self._power(reference_low.sub_(low))
        contrast = self._power(reference - self._wider(reference))
        belief = (contrast + _CONTRAST) / (contrast + _CONTRAST + disagreement)
        power = self._power(shown) + _DETAIL
        finest = (self._power(reference - self._finer(reference)) + _SOFT * _DETAIL) / power
        softness = ((_SHARP - finest) / (_SHARP - _SOFT)).clamp_(0, 1)
        kept = ((self._mean(added * shown) + _DETAIL) / power).clamp_(0, 1)
        gain = (contrast / (contrast + _FAINT)).mul_(self._gain - 1).add_(1)
        added.addcmul_(kept, shown, value=-1).mul_(belief.mul_(softness.mul_(gain.sub_(_ON_SHARP)).add_(_ON_SHARP)))
        return torch.add(reference, added, out=out).clamp_(0, 1)

    def _power(self, picture: Tensor) -> Tensor:
        return self._mean(picture.square()).clamp_min_(0)

    def _mean(self, picture: Tensor) -> Tensor:
        """Over the channels and the area around: [H, W, 1]."""
        return self._wider(picture.mean(2, keepdim=True))


class AdainMatch:
    """The "adain" method, one frame at a time, with the statistics of the whole clips."""

    def __init__(
        self, refined: ColorStatistics, reference: ColorStatistics, device: torch.device | str = "cpu"
    ) -> None:
        transform = adain_transform(refined, reference)
        self._gain, self._offset = (numbers.float().to(device) for numbers in transform)

    def __call__(self, refined: Tensor, _reference: Tensor, out: Tensor | None = None) -> Tensor:
        """A refined frame [H, W, 3] in the reference clip's colours, in [0, 1]; `out` receives it if given."""
        return torch.mul(refined, self._gain, out=out).add_(self._offset).clamp_(0, 1)


def color_statistics(frames: Iterable[Tensor], report: Callable[[], None] = lambda: None) -> ColorStatistics:
    """Statistics of frames [H, W, 3] of one size, one frame at a time; `report` is called after each."""
    parts = []
    for frame in frames:
        parts.append(frame_statistics(frame))
        report()
    return clip_statistics(torch.stack(parts))


def frame_statistics(frame: Tensor) -> Tensor:
    """Variance and mean of each channel of a frame [H, W, 3]: [2, 3], float64, on the CPU (MPS has no float64)."""
    return torch.stack(torch.var_mean(frame, (0, 1), correction=0)).cpu().double()


def clip_statistics(parts: Tensor) -> ColorStatistics:
    """Statistics of a clip from the `frame_statistics` of its frames, [T, 2, 3]."""
    variance, mean = parts.unbind(1)  # [T, 3] each
    # Frames have one size, so the clip's variance is the mean variance within frames plus the variance of their means.
    return ColorStatistics(mean.mean(0), (variance.mean(0) + mean.var(0, correction=0)).sqrt())


def adain_transform(refined: ColorStatistics, reference: ColorStatistics) -> tuple[Tensor, Tensor]:
    """(gain, offset), [3] each, so that refined * gain + offset has the reference's mean and standard deviation.

    A channel without contrast keeps gain 1; no gain is above 4 or below 1/4, so that a flat clip's noise isn't
    amplified and a flat reference doesn't remove the picture. The mean always matches.
    """
    gain = reference.deviation / refined.deviation.clamp_min(_FLAT)
    gain = torch.where(refined.deviation > _FLAT, gain, 1.0).clamp(1 / _MAX_GAIN, _MAX_GAIN)
    return gain, reference.mean - refined.mean * gain


def wavelet_match(
    height: int, width: int, device: torch.device | str, detail: Detail
) -> WaveletMatch | SupportedDetail:
    """The "wavelet" method for frames of one size."""
    if detail.gain is None:
        return WaveletMatch(height, width, device, detail.size)
    return SupportedDetail(height, width, device, detail)


def auto_detail(config: DiTConfig | None) -> Detail:
    """The detail that suits a stage II of this form: all but the miniature can make large things anew."""
    if config == NANO_FOOTAGE_STAGE2:
        return Detail(NANO_DETAIL_SIZE, NANO_DETAIL_GAIN)
    return Detail(NANO_DETAIL_SIZE if config in NANO_REFINERS else DETAIL_SIZE)


def check_detail_size(detail_size: float) -> None:
    """Raise ValueError for a detail size out of range."""
    if not MIN_DETAIL_SIZE <= detail_size <= MAX_DETAIL_SIZE:
        raise ValueError(f"detail_size must be {MIN_DETAIL_SIZE} to {MAX_DETAIL_SIZE} pixels; got {detail_size:g}.")


def match_colors(
    frames: Tensor,
    reference: Tensor,
    method: str,
    detail: Detail = COLORS_ONLY,
    *,
    progress: Progress | None = None,
) -> Tensor:
    """A refined clip [T, H, W, 3] in the colours of `reference` [T, H, W, 3]; both float32 in [0, 1].

    Returns a new clip in [0, 1]; the inputs are not modified. `method` is one of METHODS; `detail` is for "wavelet".
    Raises ValueError for another method or size and for clips of different shapes.
    """
    check_detail_size(detail.size)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    if frames.shape != reference.shape:
        raise ValueError(f"frames and reference must have one shape; got {[*frames.shape]} and {[*reference.shape]}.")
    out = torch.empty_like(frames, memory_format=torch.contiguous_format)
    METHODS[method](frames, reference.to(frames.device), out, detail, progress or no_progress)
    return out


def _wavelet(frames: Tensor, reference: Tensor, out: Tensor, detail: Detail, progress: Progress) -> None:
    match = wavelet_match(*frames.shape[1:3], frames.device, detail)
    for index, (refined, wanted) in enumerate(zip(frames, reference, strict=True)):
        match(refined, wanted, out[index])
        progress(index + 1, len(frames))


def _adain(frames: Tensor, reference: Tensor, out: Tensor, _detail: Detail, progress: Progress) -> None:
    steps = iter(range(1, 3 * len(frames) + 1))  # both clips are read, then the result is written

    def report() -> None:
        progress(next(steps), 3 * len(frames))

    match = AdainMatch(color_statistics(frames, report), color_statistics(reference, report), frames.device)
    for refined, wanted, result in zip(frames, reference, out, strict=True):
        match(refined, wanted, result)
        report()


METHODS = {"wavelet": _wavelet, "adain": _adain}


def _splines(side: int, spacing: float) -> tuple[Tensor, Tensor]:
    """(B [side, knots], the averages under its columns [knots, side]) of one axis of `LowBand`, float32."""
    spans = max(1, round(side / spacing))
    pixels = (torch.arange(side, dtype=torch.float64) + 0.5) * (spans / side)  # centres, counted in knots
    distance = (pixels[:, None] - torch.arange(-1, spans + 2)).abs()  # one knot more beyond each border
    basis = torch.where(distance < 1, 2 / 3 - distance**2 + distance**3 / 2, (2 - distance).clamp_min(0) ** 3 / 6)
    basis[:, 2] += basis[:, 0]  # mirrored at the border: knot -1 is knot 1
    basis[:, -3] += basis[:, -1]
    basis = basis[:, 1:-1]
    return basis.float(), (basis / basis.sum(0)).T.float()
