"""How a video is judged: pure functions of frames [T, H, W, 3] in [0, 1], float32, on the CPU.

PSNR, SSIM, colour differences, the Laplacian and the optical flow are scikit-image's; the bands are those of the colour
match: "low" is what Finish Frames takes from the draft, "high" everything that the refiner answers for.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...color import LowBand
from ..data.degradations import LUMA
from ..errors import TrainingError

STEADY = 0.05  # a pixel's own change along the flow, above which it counts as covered or uncovered
LEVELS = 255.0
SPARSE = 4  # pixels; the low band's shortest pattern is many times that
LINE_SURROUNDINGS = 9  # rows, or columns, whose median a line stands out from


@dataclass(frozen=True)
class Metric:
    """A number of a table: its heading, its decimals, and which way is better (None: neither by itself)."""

    label: str
    digits: int
    better: str | None  # "higher", "lower" or None


METRICS = {
    "psnr": Metric("PSNR, dB", 2, "higher"),
    "ssim": Metric("SSIM", 4, "higher"),
    "psnr_high": Metric("high-band PSNR, dB", 2, "higher"),
    "psnr_low": Metric("low-band PSNR, dB", 2, "higher"),
    "gradient_error": Metric("gradient-energy error, %", 1, "lower"),
    "sharpness": Metric("sharpness", 0, None),
    "flicker": Metric("flicker", 3, "lower"),
    "warp_error": Metric("warp error", 3, "lower"),
    "lines": Metric("lines, levels", 1, "lower"),
    "brisque": Metric("BRISQUE", 1, "lower"),
    "piqe": Metric("PIQE", 1, "lower"),
    "niqe": Metric("NIQE, refitted", 2, "lower"),
    "swing_chunk": Metric("swing at the chunks' period, dB", 3, "lower"),
    "swing_window": Metric("swing at the windows' period, dB", 3, "lower"),
    "varying_loss": Metric("loss by varying, dB", 3, "lower"),
    "colour_shift": Metric("colour shift from the draft, ΔE", 3, "lower"),
    "colour_error": Metric("colour error, ΔE", 3, "lower"),
    "delta_e": Metric("pixels' ΔE", 2, "lower"),
    "colour": Metric("colour right, %", 1, "higher"),
    "shape": Metric("shape right, %", 1, "higher"),
    "direction": Metric("direction right, %", 1, "higher"),
    "all_right": Metric("all three right, %", 1, "higher"),
    "explained": Metric("explained of v, %", 2, "higher"),
    "seconds": Metric("seconds", 1, "lower"),
}


def library(name: str) -> Any:
    """Import a part of scikit-image. Raises TrainingError if it isn't installed."""
    try:
        return importlib.import_module(f"skimage.{name}")
    except ModuleNotFoundError as error:
        message = "Measuring needs scikit-image, which nothing else does: pip install scikit-image."
        raise TrainingError(message) from error


def psnr(frames: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of all frames; infinity where they are equal."""
    if torch.equal(frames, truth):
        return math.inf
    return float(library("metrics").peak_signal_noise_ratio(truth.numpy(), frames.numpy(), data_range=1.0))


def ssim(frames: Tensor, truth: Tensor) -> float:
    """Structural similarity (Wang et al. 2004), the mean over frames and colours; 1 where they are equal."""
    structural_similarity = library("metrics").structural_similarity
    pairs = zip(truth.numpy(), frames.numpy(), strict=True)
    return float(np.mean([structural_similarity(*pair, channel_axis=2, data_range=1.0) for pair in pairs]))


def bands(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high band, [T, H, W, 3] each, which add up to the frames; parted at 70 pixels (`color.LowBand`)."""
    low_band = LowBand(*frames.shape[1:3])
    low = torch.stack([low_band(frame) for frame in frames])
    return low, frames - low


def gradient_energy(frames: Tensor) -> float:
    """Mean squared difference of neighbours along rows and columns: how much detail there is."""
    return float((frames.diff(dim=1).square().mean() + frames.diff(dim=2).square().mean()) / 2)


def gradient_error(frames: Tensor, truth: Tensor) -> float:
    """By how many percent of the truth's gradient energy the frames' is off, above or below."""
    wanted = gradient_energy(truth)
    return abs(gradient_energy(frames) - wanted) / max(wanted, 1e-12) * 100


def sharpness(frames: Tensor) -> float:
    """Variance of the Laplacian of the luma in levels of 255 (Pech-Pacheco et al. 2000), the mean over frames.

    It needs no truth, and takes noise for detail: to be read beside the truth's own.
    """
    luma = (frames @ torch.tensor(LUMA)).numpy() * LEVELS
    laplace = library("filters").laplace
    return float(np.mean([np.var(laplace(frame)) for frame in luma]))


def flicker(frames: Tensor, truth: Tensor) -> float:
    """Mean error of the change from one frame to the next, in levels of 255; 0 for a single frame.

    A blurred clip lacks the changes of moving detail, a flickering one has changes that the truth hasn't.
    """
    if len(frames) < 2:
        return 0.0
    return float((frames.diff(dim=0) - truth.diff(dim=0)).abs().mean()) * LEVELS


def optical_flow(truth: Tensor) -> Tensor:
    """Where each pixel of a frame is found in the next: rows and columns to add, [T - 1, 2, H, W], iterative
    Lucas-Kanade (Le Besnerais and Champagnat 2005) on the luma."""
    flow = library("registration").optical_flow_ilk
    luma = (truth @ torch.tensor(LUMA)).numpy()
    moves = [flow(now, after) for now, after in zip(luma, luma[1:], strict=False)]
    return torch.from_numpy(np.stack(moves)).float() if moves else truth.new_zeros(0, 2, *truth.shape[1:3])


def warp(frames: Tensor, flow: Tensor) -> Tensor:
    """The next frame moved back along the flow [T - 1, 2, H, W] onto each frame: [T - 1, H, W, 3], bilinear."""
    height, width = frames.shape[1:3]
    rows = torch.arange(height)[:, None] + flow[:, 0]
    columns = torch.arange(width)[None] + flow[:, 1]
    grid = torch.stack((columns * 2 / max(width - 1, 1) - 1, rows * 2 / max(height - 1, 1) - 1), dim=-1)
    after = rearrange(frames[1:], "t h w c -> t c h w")
    warped = F.grid_sample(after, grid, padding_mode="border", align_corners=True)
    return rearrange(warped, "t c h w -> t h w c")


def warp_error(frames: Tensor, truth: Tensor, flow: Tensor) -> float:
    """Mean change along the truth's motion, in levels of 255, where the truth itself is followed well.

    Sharp frames have more of it than blurred ones, because resampling them along the flow loses detail: to be read
    beside the truth's own.
    """
    if len(frames) < 2:
        return 0.0
    steady = (warp(truth, flow) - truth[:-1]).abs().amax(dim=-1) < STEADY
    change = (warp(frames, flow) - frames[:-1]).abs().mean(dim=-1)
    return float(change[steady].mean()) * LEVELS if steady.any() else math.nan


def lines(frames: Tensor, truth: Tensor) -> float:
    """How far the worst row or column of any frame stands out, in levels of 255.

    The mean error of each row's luma, and of each column's, less the median of the rows around it: a bright line across
    the picture is one; a colour cast, a soft picture and a wrong area are none.
    """
    error = (frames - truth) @ torch.tensor(LUMA) * LEVELS  # [T, H, W]
    return max(_outlier(error.mean(dim=axis)) for axis in (1, 2))


def _outlier(means: Tensor) -> float:
    """The largest distance of a value of [T, N] from the median of those around it."""
    reach = min(LINE_SURROUNDINGS // 2, means.shape[1] - 1)
    around = F.pad(means[:, None], (reach, reach), mode="reflect")[:, 0].unfold(1, 2 * reach + 1, 1)
    return float((means - around.median(dim=-1).values).abs().max())


def delta_e(frames: Tensor, others: Tensor) -> Tensor:
    """Colour difference of each pixel of pictures or clips [..., 3]: CIE76, [...]. About 2 is just noticeable."""
    color = library("color")
    return torch.from_numpy(color.deltaE_cie76(*(color.rgb2lab(each.double().numpy()) for each in (frames, others))))


def colour_shift(frames: Tensor, others: Tensor) -> float:
    """Mean colour difference (CIE76) of the low bands: of broad areas, whatever their detail. About 2 is noticeable."""
    return _shift(bands(frames)[0], bands(others)[0])


def _shift(low: Tensor, other: Tensor) -> float:
    """`colour_shift` of low bands. They are smooth: one pixel of SPARSE in each direction is enough."""
    low, other = (band[:, ::SPARSE, ::SPARSE].clamp(0, 1) for band in (low, other))
    return float(delta_e(low, other).mean())


def measure(frames: Tensor, truth: Tensor, flow: Tensor, draft: Tensor) -> dict[str, float]:
    """All of the above for one clip; `draft` [T, H, W, 3] is what was finished, enlarged."""
    (low, high), (true_low, true_high) = bands(frames), bands(truth)
    return {
        "psnr": psnr(frames, truth),
        "ssim": ssim(frames, truth),
        "psnr_high": psnr(high, true_high),
        "psnr_low": psnr(low, true_low),
        "gradient_error": gradient_error(frames, truth),
        "sharpness": sharpness(frames),
        "flicker": flicker(frames, truth),
        "warp_error": warp_error(frames, truth, flow),
        "lines": lines(frames, truth),
        "colour_shift": _shift(low, bands(draft)[0]),
        "colour_error": _shift(low, true_low),
        "delta_e": float(delta_e(frames, truth).mean()),
    }


def mean_of(values: list[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each number over clips; an infinite one makes its mean infinite."""
    return {name: sum(each[name] for each in values) / len(values) for name in values[0]} if values else {}
