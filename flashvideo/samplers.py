"""The two samplers as pure functions: no state, and all randomness is an argument.

Stage I: a second-order multistep SDE solver of DPM-Solver++ (arXiv 2211.01095) on the variance-preserving
schedule. Stage II: a fixed-grid solver of the flow's ODE.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .config import DEGRADATION_STEP, SOLVERS, STAGE1_SCALE, STAGE2_SCALE, STAGE2_SHIFT
from .dit import FlashVideoDiT
from .guidance import STAGE1_EXPONENT, dynamic_cfg_scale, guide
from .parallel import Ranks
from .schedule import Stage1Schedule, stage1_schedule, stage2_times

# on_step(done, total, clean_estimate): progress and preview; may raise to cancel
OnStep = Callable[[int, int, Tensor], None]
Velocity = Callable[[Tensor, Tensor], Tensor]  # (latent [B, C, T, H, W], time) -> dx/dt of the same shape


def v_to_clean(latent: Tensor, v: Tensor, signal: Tensor) -> Tensor:
    """The clean latent that v-prediction implies at `signal` = sqrt(alpha-bar)."""
    return signal * latent - (1 - signal**2).sqrt() * v


def solve_vp(
    denoise: Callable[[Tensor, int], Tensor],
    latent: Tensor,
    schedule: Stage1Schedule,
    step_noise: Callable[[int], Tensor],
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++(2M) SDE from pure noise to a clean latent.

    `denoise(latent, i)` gives the guided clean estimate at step i; `step_noise(i)` the noise that step i adds (the
    last step adds none). The state is float32.
    """
    signal = schedule.signal.to(latent.device)
    log_snr = torch.log(signal / (1 - signal**2).sqrt())  # -inf at the first step, +inf at the end
    steps = len(schedule.timesteps)
    clean_before = latent
    for i in range(steps):
        clean = denoise(latent, i)
        if on_step is not None:
            on_step(i + 1, steps, clean)
        if i == steps - 1:
            return clean
        here, after = signal[i], signal[i + 1]
        h = log_snr[i + 1] - log_snr[i]
        if i < 2:  # no earlier estimate counts: the log-SNR of the first step is infinite
            target = clean
        else:
            ratio = (log_snr[i] - log_snr[i - 1]) / h
            target = (1 + 1 / (2 * ratio)) * clean - clean_before / (2 * ratio)
        keep = ((1 - after**2) / (1 - here**2)).sqrt() * torch.exp(-h)
        renoise = (1 - after**2).sqrt() * (1 - torch.exp(-2 * h)).sqrt()
        latent = keep * latent - after * torch.expm1(-2 * h) * target + renoise * step_noise(i)
        clean_before = clean
    raise ValueError("stage I needs at least one step")


def solve_flow(
    velocity: Velocity,
    start: Tensor,
    times: Tensor,
    solver: str = "euler",
    on_step: OnStep | None = None,
) -> Tensor:
    """Follow dx/dt = velocity(x, t) over the grid `times` [steps + 1]; "heun" takes two evaluations a step.

    `on_step` receives the end point of a straight path from here.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; one of {', '.join(SOLVERS)}")
    times = times.to(start.device)
    latent, steps = start, len(times) - 1
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
        slope = velocity(latent, t)
        if on_step is not None:
            on_step(i + 1, steps, latent + (1 - t) * slope)
        ahead = latent + (t_next - t) * slope
        if solver == "heun" and i < steps - 1:
            slope = (slope + velocity(ahead, t_next)) / 2
            ahead = latent + (t_next - t) * slope
        latent = ahead
    return latent


@torch.no_grad()
def sample_stage1(
    dit: FlashVideoDiT,
    noise: Tensor,
    context: Tensor,
    uncond: Tensor,
    *,
    steps: int = 51,
    scale: float = STAGE1_SCALE,
    exponent: int = STAGE1_EXPONENT,
    step_noise: Callable[[int], Tensor],
    on_step: OnStep | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """Draft latent [B, C, T, H, W] in stage I's scaled space (divide by STAGE1_LATENT_SCALE for the VAE).

    `noise` has that shape and is standard normal; `context` and `uncond` are [B, L, text_dim]; `step_noise(i)`
    gives the noise used at step i, for i from 0 to steps - 2. All `ranks` give the same and get the same.
    """
    schedule = stage1_schedule(steps)
    contexts = torch.cat((uncond, context))

    def denoise(latent: Tensor, i: int) -> Tensor:
        timestep = schedule.timesteps[i].to(latent.device, torch.float32).expand(2 * len(latent))
        if ranks is not None and ranks.halves is not None:
            text = (uncond, context)[ranks.halves.index]
            mine = _on(dit, ranks.halves.ranks)(latent.to(text.dtype), timestep[: len(latent)], text).float()
            v = torch.cat(ranks.halves.exchange(mine))
        else:
            v = _on(dit, ranks)(torch.cat((latent, latent)).to(context.dtype), timestep, contexts).float()
        clean_uncond, clean_cond = v_to_clean(
            torch.cat((latent, latent)), v, schedule.quantized_signal[i].to(latent.device)
        ).chunk(2)
        return guide(clean_uncond, clean_cond, dynamic_cfg_scale(int(schedule.timesteps[i]), steps, scale, exponent))

    return solve_vp(denoise, noise.float(), schedule, step_noise, on_step)


@torch.no_grad()
def sample_stage2(
    dit: FlashVideoDiT,
    start: Tensor,
    context: Tensor,
    uncond: Tensor,
    *,
    steps: int = 4,
    cfg: float = STAGE2_SCALE,
    shift: float = STAGE2_SHIFT,
    degradation_step: int = DEGRADATION_STEP,
    solver: str = "euler",
    on_step: OnStep | None = None,
) -> Tensor:
    """Refined latent [B, C, T, H, W] in stage II's scaled space (divide by STAGE2_LATENT_SCALE for the VAE).

    `start` is the degraded latent (`degrade_latent`), `degradation_step` the step it was degraded with.
    """
    velocity = guided_velocity(dit, context, uncond, cfg, degradation_step)
    return solve_flow(velocity, start.float(), stage2_times(steps, shift), solver, on_step)


def guided_velocity(
    dit: FlashVideoDiT,
    context: Tensor,
    uncond: Tensor,
    cfg: float,
    degradation_step: int = DEGRADATION_STEP,
    ranks: Ranks | None = None,
) -> Velocity:
    """Stage II's velocity for prompts [B, L, text_dim] or one for all [1, L, text_dim], guided away from `uncond`.

    One pass of the network after the other, so that the memory needed is that of one; with cfg 1 there is only one. An
    even number of ranks makes both at once, one pass in either half.
    """
    halves = None if ranks is None or cfg == 1 else ranks.halves

    def velocity(latent: Tensor, time: Tensor) -> Tensor:
        timestep = (1000 - 1000 * time).float().to(latent.device).expand(len(latent))

        def evaluate(text: Tensor, ranks: Ranks | None = ranks) -> Tensor:
            text = text.expand(len(latent), -1, -1)
            return _on(dit, ranks)(latent.to(text.dtype), timestep, text, degradation_step=degradation_step).float()

        if halves is not None:
            return guide(*halves.exchange(evaluate((uncond, context)[halves.index], halves.ranks)), cfg)
        prompted = evaluate(context)
        return prompted if cfg == 1 else guide(evaluate(uncond), prompted, cfg)

    return velocity


def _on(dit: FlashVideoDiT, ranks: Ranks | None) -> Callable[..., Any]:
    return dit if ranks is None else partial(dit, ranks=ranks)
