"""The whole run's time and memory, from a trial's: each phase by the ratio of its operations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..memory import parameters
from ..refiner.run import DECODE, ENCODE, MEASURE, REFINE, Networks
from ..refiner.trial import CUT, Trial
from .plan import (
    MAX_STEPS,
    OFFICIAL,
    STAGE_2,
    VAE_DECODE,
    VAE_ENCODE,
    NetworkConfigs,
    Phase,
    Setting,
    make_plan,
)

_PHASES = {ENCODE: VAE_ENCODE, REFINE: STAGE_2, MEASURE: VAE_DECODE, DECODE: VAE_DECODE}
_PRECISIONS = {1: "fp8", 2: "bf16", 4: "fp32"}  # by bytes of a weight


@dataclass(frozen=True)
class WholeRun:
    """Estimates for a whole run: seconds, and bytes of the device at the peak."""

    seconds: float
    memory: float


def whole_run(trial: Trial, networks: Networks) -> WholeRun:
    """What the whole run takes, by the planner's formulas.

    Each of the networks' phases grows with its operations. The whole run upscales its frames once before encoding and
    once in each phase that decodes; the trial did it once, at full size. What is outside the phases (reading, moving
    networks to the device) stays as it is.
    """
    small = _phases(trial, networks, trial.crop.size, trial.frames)
    large = _phases(trial, networks, trial.size, trial.count)
    seconds = dict(trial.seconds)
    outside = trial.total - sum(seconds.values())
    frames = seconds.pop(CUT) * trial.count / trial.frames * len(seconds.keys() - {REFINE})
    phases = sum(
        taken * large[_PHASES[phase]].flops.total / small[_PHASES[phase]].flops.total
        for phase, taken in seconds.items()
    )
    return WholeRun(outside + frames + phases, max(large[name].memory for name in _PHASES.values()))


def _phases(trial: Trial, networks: Networks, size: tuple[int, int], frames: int) -> dict[str, Phase]:
    settings, vae = trial.settings, networks.vae
    itemsize = next(networks.dit.parameters()).dtype.itemsize
    limit = networks.vae_memory  # without the weights, which the planner counts, too
    setting = Setting(
        width=size[1],
        height=size[0],
        frames=frames,
        stage1_steps=0,
        stage2_steps=min(settings.steps, MAX_STEPS),
        cfg=settings.cfg,
        tile=settings.tile,
        precision=_PRECISIONS.get(itemsize, "bf16"),
        networks=NetworkConfigs("loaded", OFFICIAL.text, OFFICIAL.stage1, networks.dit.config, vae.config),
        device=networks.device.type,
        memory=None if limit is None else limit + parameters(vae.config) * next(vae.parameters()).dtype.itemsize,
        store=math.inf if networks.vae_store is None else networks.vae_store,
        window=settings.window,
        overlap=settings.overlap,
    )
    return {phase.name: phase for phase in make_plan(setting).phases}
