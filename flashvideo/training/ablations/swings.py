"""How quality rises and falls in time: pure functions of frames [T, H, W, 3] in [0, 1].

The VAE works in chunks of frames and stage II in windows: both have a period.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...config import OVERLAP_FRAMES, TEMPORAL_FACTOR, WINDOW
from ...vae import DECODE_CHUNK

CHUNK_PERIOD = DECODE_CHUNK * TEMPORAL_FACTOR  # frames
WINDOW_PERIOD = WINDOW - OVERLAP_FRAMES
HARMONICS = (1, 2)


def time_measures(frames: Tensor, truth: Tensor, enlarged: Tensor) -> dict[str, float]:
    """Swings at both periods and the loss by varying, in dB, of a clip [T, H, W, 3]; 0 where they are equal."""
    gain = frame_psnr(frames, truth) - frame_psnr(enlarged, truth)
    return {
        "swing_chunk": swing(gain, CHUNK_PERIOD),
        "swing_window": swing(gain, WINDOW_PERIOD),
        "varying_loss": varying_loss(frames, truth),
    }


def frame_psnr(frames: Tensor, truth: Tensor) -> Tensor:
    """PSNR of each frame in dB, [T], at most that of an error of a hundredth of a level."""
    return -10 * torch.log10(_errors(frames, truth))


def _errors(frames: Tensor, truth: Tensor) -> Tensor:
    least = (0.01 / 255) ** 2
    return (frames - truth).double().square().mean(dim=(1, 2, 3)).clamp_min(least)


def swing(values: Tensor, period: int) -> float:
    """How far values [T] rise and fall with a period: root mean square of its wave and of the one half as long.

    The first frame stands alone, as the VAE codes it; then whole periods count. NaN for fewer than two of them.
    """
    cycles = (len(values) - 1) // period
    if cycles < 2:
        return math.nan
    values = values[1 : 1 + cycles * period].double()
    waves = torch.fft.rfft(values - values.mean()) / len(values)
    power = sum(2 * float(waves[cycles * harmonic].abs()) ** 2 for harmonic in HARMONICS)
    return math.sqrt(power)


def varying_loss(frames: Tensor, truth: Tensor) -> float:
    """How far the PSNR of the mean error is below the mean of the frames' PSNR, in dB: 0 if all are equally good."""
    return float(frame_psnr(frames, truth).mean() + 10 * torch.log10(_errors(frames, truth).mean()))
