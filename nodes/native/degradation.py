"""A latent is degraded exactly once, whichever way the graph is wired.

The Latent Degradation node marks its result. The LATENT's mark holds keys of the samples, since stock samplers copy all
of a LATENT but its samples: a refined latent is told from the degraded one that it was made of. The strength also rides
on the tensor, since ComfyUI's samplers see nothing else of a LATENT. When a sampler starts, the guard below compares it
with the noise that is about to be added.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...flashvideo.config import SPATIAL_FACTOR, STAGE2_LATENT_SCALE
from ...flashvideo.degradation import degrade_latent
from .sampling import AutoRefinerSampling, RefinerSampling, auto_latent_strength

MARK = "flashvideo_degradation"
# Timesteps: at or above the first a run starts from the fully degraded latent; none starts above the second.
FULL_NOISE, BEYOND_NOISE = 999, 1001
_KEY_CHANNELS = 4  # of half precision make one whole number, which no other place of a video shares
_PROBES = 256  # places of a latent that are looked for
_ENOUGH = 0.25  # of them must be known: a batch may hold other latents, too, and enlarging keeps the corners


@dataclass(frozen=True)
class _Mark:
    """What a LATENT says of its degradation: the strength, and a key for each place of the degraded samples."""

    strength: int
    keys: Tensor

    def fits(self, samples: Tensor) -> bool:
        """Whether samples are the degraded ones or a part of them, such as a crop or a frame."""
        keys = _keys(samples)
        known = torch.isin(keys[:: max(1, len(keys) // _PROBES)], self.keys)
        return float(known.float().mean()) >= _ENOUGH


def _keys(samples: Tensor) -> Tensor:
    # Half precision, so that a latent which was kept in it is known again.
    values = samples[:, :_KEY_CHANNELS].movedim(1, -1).to("cpu", torch.float16)
    return values.contiguous().view(torch.int64).flatten()


def degrade(latent: dict[str, Any], noise: Tensor, strength: int) -> dict[str, Any]:
    """A marked LATENT, degraded with `noise` in stage II's scaled space. Raises ValueError beyond 0..999."""
    samples = latent["samples"] * STAGE2_LATENT_SCALE
    degraded = mark_samples(degrade_latent(samples, noise, strength) / STAGE2_LATENT_SCALE, strength)
    return {**latent, "samples": degraded, MARK: _Mark(strength, _keys(degraded))}


def mark_samples(samples: Tensor, strength: int) -> Tensor:
    """Samples that tell a sampler with which strength they were degraded."""
    setattr(samples, MARK, strength)
    return samples


def degradation_of(latent: dict[str, Any]) -> int | None:
    """The strength a LATENT was degraded with; None if it never was, or was refined or otherwise changed since."""
    mark = latent.get(MARK)
    return mark.strength if mark is not None and mark.fits(latent["samples"]) else None


def was_degraded(latent: dict[str, Any]) -> bool:
    """Whether a LATENT was degraded at some time, whatever has become of it since."""
    return MARK in latent


def check_unmasked(mask: Tensor | None, where: str = "") -> None:
    """A degraded latent is refined as a whole: outside of a mask nothing would take its noise away.

    A white mask, which lets all through, is none.
    """
    if mask is not None and bool((mask < 1).any()):
        raise ValueError(
            f"{where}this latent has a mask (from Set Latent Noise Mask, say), and a degraded latent is only refined "
            "as a whole. To refine a part of the picture, leave FlashVideo Latent Degradation out and give the masked "
            "latent to KSampler, with FlashVideo Refiner Settings before it"
        )


def guard_degradation(
    executor: Callable[..., Tensor],
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
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
    if isinstance(sampling, AutoRefinerSampling):
        chosen = auto_latent_strength(latent_image) if strength is None else strength
        run = (noise, latent_image, sampler, sigmas, denoise_mask, *args)
        return _at_strength(executor, sampling, chosen, *run, **kwargs)
    adds_noise = bool(torch.count_nonzero(noise))
    starts_at = float(sampling.timestep(sigmas[0]))
    if starts_at > BEYOND_NOISE:
        raise ValueError(
            f"FlashVideo stage II: the sigmas begin at {float(sigmas[0]):.3g}, but {float(sampling.sigma_max):.3g} is "
            "the most that fits the strength. Take them from BasicScheduler, with the refiner as its model."
        )
    starts_full = starts_at >= FULL_NOISE
    if strength is None:
        if starts_full and not adds_noise:
            raise ValueError(
                "FlashVideo stage II: this latent was never degraded. Turn the sampler's noise on, or put "
                "FlashVideo Latent Degradation before the sampler."
            )
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)

    check_unmasked(denoise_mask, "FlashVideo stage II: ")
    check_degraded_start(strength, sampling.degradation_step, adds_noise=adds_noise, starts_full=starts_full)
    # The first sigma is noise_weight / signal_weight, so that on the flow this start is the degraded latent itself.
    model = executor.class_obj.model_patcher.model
    start = model.process_latent_in(latent_image) / sampling.noise_weight
    return executor(start, torch.zeros_like(latent_image), sampler, sigmas, None, *args, **kwargs)


def _at_strength(
    executor: Callable[..., Tensor],
    sampling: AutoRefinerSampling,
    strength: int,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """The guarded run with a known strength in place of auto; the guider has its own model again afterwards."""
    guider = executor.class_obj
    height, width = (SPATIAL_FACTOR * side for side in latent_image.shape[-2:])
    logging.info("FlashVideo stage II: strength %d (auto, for %dx%d)", strength, width, height)
    automatic = guider.model_patcher
    guider.model_patcher = automatic.clone()
    guider.model_patcher.add_object_patch("model_sampling", sampling.at(strength))
    try:
        sigmas = sampling.moved(sigmas, strength)
        return guard_degradation(executor, noise, latent_image, sampler, sigmas, *args, **kwargs)
    finally:
        guider.model_patcher = automatic


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
