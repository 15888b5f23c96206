"""A latent is degraded exactly once, whichever way the graph is wired.

The Latent Degradation node marks its result; the mark rides on the tensor, since ComfyUI's samplers see nothing
else of a LATENT. When a sampler starts, the guard below compares the mark with the noise that is about to be added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...flashvideo.config import STAGE2_LATENT_SCALE
from ...flashvideo.degradation import degrade_latent
from .sampling import RefinerSampling

MARK = "flashvideo_degradation"
FULL_NOISE = 0.999  # sigma at or above which a run starts from the fully degraded latent


def mark_degraded(latent: dict[str, Any], samples: Tensor, strength: int) -> dict[str, Any]:
    """A LATENT with `samples` that says with which strength they were degraded."""
    setattr(samples, MARK, strength)
    return {**latent, "samples": samples, MARK: strength}


def degrade(latent: dict[str, Any], noise: Tensor, strength: int) -> dict[str, Any]:
    """A marked LATENT, degraded with `noise` in stage II's scaled space. Raises ValueError beyond 0..999."""
    samples = latent["samples"] * STAGE2_LATENT_SCALE
    return mark_degraded(latent, degrade_latent(samples, noise, strength) / STAGE2_LATENT_SCALE, strength)


def degradation_of(latent: dict[str, Any]) -> int | None:
    """The strength a LATENT was degraded with, or None."""
    return latent.get(MARK)


def guard_degradation(
    executor: Callable[..., Tensor],
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """ComfyUI wrapper around a sampler run of stage II.

    A latent that was degraded before passes through as the start of the flow; one that was not gets the
    sampler's noise. Raises ValueError where a graph would degrade twice or never, or tells the network another
    strength than the latent's.
    """
    sampling = executor.class_obj.model_patcher.get_model_object("model_sampling")
    if not isinstance(sampling, RefinerSampling):
        raise ValueError(
            "FlashVideo stage II: another node replaced the refiner's noise schedule (such as ModelSampling...). "
            "Remove that node and set strength and shift with FlashVideo Refiner Settings."
        )
    strength = getattr(latent_image, MARK, None)
    adds_noise = bool(torch.count_nonzero(noise))
    starts_full = float(sigmas[0]) >= FULL_NOISE
    if strength is None:
        if starts_full and not adds_noise:
            raise ValueError(
                "FlashVideo stage II: this latent was never degraded. Turn the sampler's noise on, or put "
                "FlashVideo Latent Degradation before the sampler."
            )
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    check_degraded_start(strength, sampling.degradation_step, adds_noise=adds_noise, starts_full=starts_full)
    # noise_scaling adds noise_weight * noise at sigma 1, so this start comes out as the degraded latent itself.
    model = executor.class_obj.model_patcher.model
    start = model.process_latent_in(latent_image) / sampling.noise_weight
    return executor(start, torch.zeros_like(latent_image), sampler, sigmas, *args, **kwargs)


def check_degraded_start(strength: int, expected: int, *, adds_noise: bool, starts_full: bool) -> None:
    """Refuse to sample from a degraded latent in any way but from itself, at its own strength."""
    if adds_noise:
        raise ValueError(
            "FlashVideo stage II: this latent would be degraded twice, by FlashVideo Latent Degradation and by the "
            "sampler's noise. Remove the degradation node, or turn the sampler's noise off (add_noise: disable)."
        )
    if strength != expected:
        raise ValueError(
            f"FlashVideo stage II: the latent was degraded with strength {strength}, but the model is set to "
            f"{expected}. Give FlashVideo Refiner Settings the same strength."
        )
    if not starts_full:
        raise ValueError(
            "FlashVideo stage II: a degraded latent needs the whole run. Set denoise to 1 (or start_at_step to 0), "
            "or remove FlashVideo Latent Degradation and let the sampler add the noise."
        )
