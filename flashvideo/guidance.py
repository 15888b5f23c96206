"""Guidance by text: plain classifier-free guidance and FlashVideo's dynamic scale."""

from __future__ import annotations

import math

from torch import Tensor

from .config import STAGE1_SCALE

STAGE1_EXPONENT = 5
MAX_SCALE = 100.0  # beyond it nothing but saturated pixels comes out


def dynamic_cfg_scale(
    timestep: float, steps: int, scale: float = STAGE1_SCALE, exponent: int = STAGE1_EXPONENT
) -> float:
    """Stage I's guidance at a training timestep (0 to 999) of a run of `steps` evaluations.

    The rule was meant for a step counter and is fed the timestep, in CogVideoX and in FlashVideo alike: the scale
    jumps between 1 and 1 + `scale` from one step to the next. The models are used that way, so it stays. The base
    is negative at first, so the exponent is a whole number.
    """
    phase = math.pi * ((steps - timestep) / steps) ** exponent
    return 1 + scale * (1 - math.cos(phase)) / 2


def guide(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: away from `uncond`, through `cond`, by `scale` (1 gives `cond`)."""
    return uncond + scale * (cond - uncond)
