"""Noise tables and time grids of both stages (FlashVideo sections 3.1 and 3.3).

Stage I is v-prediction on a scaled-linear table of 1000 steps with zero terminal SNR; stage II is a straight flow
from the degraded latent (t = 0) to the clean one (t = 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .config import STAGE2_SHIFT, TRAIN_STEPS

LINEAR_START = 0.00085
LINEAR_END = 0.012
MAX_SHIFT = 1000.0  # beyond it all steps lie at the degraded end


@dataclass(frozen=True)
class Stage1Schedule:
    """What stage I does at each of its `steps` evaluations.

    `timesteps` [steps] int64, descending from 999; `signal` [steps + 1], the square root of the cumulative alpha
    product, ascending from exactly 0 and closed by 1.0; `quantized_signal` [steps], the nearest entries of the
    1000-entry table, which turn the network's output into a clean latent.
    """

    timesteps: Tensor
    signal: Tensor
    quantized_signal: Tensor


def _signal_table() -> Tensor:
    """Square roots of the cumulative alpha products of the 1000 training steps, before any rescaling; float32."""
    betas = np.linspace(LINEAR_START**0.5, LINEAR_END**0.5, TRAIN_STEPS, dtype=np.float64) ** 2
    return torch.from_numpy(np.cumprod(1.0 - betas)).to(torch.float32).sqrt()


def rescale_to_zero_snr(signal: Tensor) -> Tensor:
    """Shift and scale a descending signal table so that it ends at exactly 0 and keeps its first value.

    Source: "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv 2305.08891), algorithm 1.
    """
    first, last = signal[0].clone(), signal[-1].clone()
    return (signal - last) * (first / (first - last))


def zero_snr_signal() -> Tensor:
    """The 1000-entry table: index k is training step k; [1000] float32, from 0.99957 down to exactly 0."""
    return rescale_to_zero_snr(_signal_table())


def stage1_schedule(steps: int) -> Stage1Schedule:
    """Stage I's schedule for `steps` evaluations (2 to 1000; the official setting is 51).

    The table is rescaled over the chosen steps alone, as the official sampler does, so a step's signal differs
    slightly from the 1000-entry table's.
    """
    if not 2 <= steps <= TRAIN_STEPS:
        raise ValueError(f"stage I takes 2 to {TRAIN_STEPS} steps; got {steps}")
    descending = np.linspace(TRAIN_STEPS - 1, 0, steps, endpoint=False).astype(np.int64)
    timesteps = torch.from_numpy(descending)
    chosen = rescale_to_zero_snr(_signal_table()[timesteps.flip(0)]).flip(0)
    table = zero_snr_signal()
    nearest = (table[None] - chosen[:, None]).abs().argmin(dim=1)
    return Stage1Schedule(timesteps, torch.cat((chosen, chosen.new_ones(1))), table[nearest])


def stage2_times(steps: int, shift: float = STAGE2_SHIFT, dtype: torch.dtype = torch.float32) -> Tensor:
    """Time grid of the flow: [steps + 1] from 0 (degraded) to 1 (clean); a larger `shift` takes small first steps.

    `dtype` bfloat16 gives the official code's rounded grid. Raises ValueError for other than 1 to 1000 steps, and
    as `shift_times`.
    """
    if not 1 <= steps <= TRAIN_STEPS:
        raise ValueError(f"stage II takes at least 1 step and at most {TRAIN_STEPS}; got {steps}")
    return shift_times(torch.linspace(0, 1, steps + 1, dtype=dtype), shift)


def shift_times(times: Tensor, shift: float = STAGE2_SHIFT) -> Tensor:
    """Move times in [0, 1] towards the degraded end, as sampling and training do; `shift` 1 leaves them as they are.

    Raises ValueError for a shift outside of 0 to 1000.
    """
    if not 0 < shift <= MAX_SHIFT:
        raise ValueError(f"the flow shift must be above 0 and at most {MAX_SHIFT:g}; got {shift}")
    rest = 1 - times
    return 1 - shift * rest / (1 + (shift - 1) * rest)
