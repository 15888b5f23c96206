"""A latent is degraded exactly once, however the graph is wired.

ComfyUI's nodes rebuild LATENTs: some copy the dictionary with other samples in it, some make a new one, and samplers
see nothing but the samples. So a degraded latent is recognised by its numbers: this process remembers a key for each
position of what it has degraded. Cropping, flipping, repeating, batching, saving and loading keep the keys; a sampler,
an upscale or a blend makes other numbers, and its result doesn't count as degraded. When a sampler starts, the guard
below compares what is known with the noise that is about to be added.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...flashvideo.config import NANO_STRENGTH, SPATIAL_FACTOR, STAGE2_LATENT_SCALE
from ...flashvideo.degradation import AutoStrength, degrade_latent, strength_in_words
from ...flashvideo.nano import NANO_FAMILIES
from .host import let_go
from .idle_patches import warn_of_idle_patches
from .latent_keys import KEY_CHANNELS, KEY_DTYPES, keys_of, probes_of, stored_keys
from .latent_origin import origin_of, remember_origin
from .notices import warn
from .out_of_memory import explained
from .sampling import AutoRefinerSampling, RefinerSampling, auto_latent_strength
from .schedule_guard import check_conditions, check_spread, running_node

MARK = "flashvideo_degradation"
SAMPLER_ADVICE = "Use euler with scheduler simple, as the official code does, or more steps."
# Timesteps: at or above the first a run starts from the fully degraded latent; none starts above the second.
FULL_NOISE, BEYOND_NOISE = 999, 1001
_REMEMBERED = 64  # latents: at most 32 MB
_ALL, _NONE = 0.9, 0.1  # shares of a video's positions: known from the first on, not known up to the second
_NOISE_LIKE = 0.15  # correlation of neighbours below which a latent looks like noise; pictures have 0.5 and more


NOISE_LIKE = (
    "FlashVideo stage II: this latent looks like noise. If it was degraded before and comes from elsewhere (Load "
    "Latent, say), it is degraded twice now: give it to FlashVideo Stage II Refiner instead, with its strength in "
    "degraded_strength."
)


@dataclass(frozen=True)
class _Degraded:
    """A degraded latent: its strength, and the keys of its positions in each data type; one in `step` is stored.

    `preset`: the name of the preset that the strength is of, if any.
    """

    strength: int
    keys: dict[torch.dtype, Tensor]
    step: int
    preset: str | None = None

    def is_same(self, other: _Degraded) -> bool:
        """Whether it is the same latent, degraded with the same noise, strength and preset."""
        same = (self.strength, self.step, self.preset) == (other.strength, other.step, other.preset)
        return same and all(torch.equal(self.keys[dtype], other.keys[dtype]) for dtype in KEY_DTYPES)


_remembered: list[_Degraded] = []  # the newest last


def _remember(samples: Tensor, strength: int, preset: str | None = None) -> _Degraded:
    keys, step = stored_keys(samples)
    made = _Degraded(strength, keys, step, preset)
    made = next((each for each in _remembered if each.is_same(made)), made)
    _recall(made)
    return made


def _recall(degraded: _Degraded) -> None:
    """Make a latent the newest one; the oldest is forgotten."""
    _remembered[:] = [each for each in _remembered if each is not degraded][1 - _REMEMBERED :] + [degraded]


def degrade(latent: dict[str, Any], noise: Tensor, strength: int, preset: str | None = None) -> dict[str, Any]:
    """A marked LATENT, degraded with `noise` in stage II's scaled space. Raises ValueError beyond 0..999.

    `preset`: see `preset_of`.
    """
    samples = latent["samples"] * STAGE2_LATENT_SCALE
    degraded = degrade_latent(samples, noise, strength) / STAGE2_LATENT_SCALE
    remember_origin(degraded, origin_of(latent["samples"]))
    return {**latent, "samples": degraded, MARK: _remember(degraded, strength, preset)}


def suited_to_latent(samples: Tensor, strength: int | AutoStrength | None) -> int:
    """What a strength means for samples [B, C, T, H, W]: a number stays, auto suits whose latent it is and its size."""
    if not isinstance(strength, int) and origin_of(samples) in NANO_FAMILIES:
        return NANO_STRENGTH  # see `flashvideo.degradation.suited_strength`
    return auto_latent_strength(samples, strength)


@contextmanager
def counted_as_degraded(samples: Tensor, strength: int) -> Iterator[None]:
    """Count samples as degraded with `strength` for one run, as the user says. Raises ValueError if it is otherwise."""
    known = known_strength(samples)
    if known not in (None, strength):
        raise ValueError(
            f"FlashVideo Stage II Refiner: this latent was degraded with strength {known}, and degraded_strength says "
            f"{strength}"
        )
    before = list(_remembered)
    _remember(samples, strength)
    try:
        yield
    finally:
        _remembered[:] = before


def degradation_of(latent: dict[str, Any]) -> int | None:
    """The strength that a LATENT was degraded with; None if that isn't known, or it was changed since.

    Raises ValueError for a batch or a picture of which only a part is degraded, or with several strengths.
    """
    if MARK in latent:
        _recall(latent[MARK])
    return known_strength(latent["samples"])


def preset_of(latent: dict[str, Any]) -> str | None:
    """The preset that a LATENT with a known `degradation_of` was degraded with; None for a strength of one's own.

    Raises ValueError for a batch with several presets: the refiner can't follow them all.
    """
    if MARK in latent:
        _recall(latent[MARK])
    found = {_video_preset(video[None]) for video in latent["samples"]}
    if len(found) > 1:
        names = ", ".join(sorted(name or "custom" for name in found))
        raise ValueError(f"this latent holds videos with different presets ({names}); refine them one by one")
    return next(iter(found))


def _video_preset(video: Tensor) -> str | None:
    """The preset of the remembered latent that most of a video [1, C, T, H, W] is of, the newest of equals."""
    most, preset = 0.0, None
    for dtype in KEY_DTYPES:
        keys = keys_of(video, dtype).flatten()
        for each in reversed(_remembered):
            probes = probes_of(keys, each.step)
            share = float(torch.isin(probes, each.keys[dtype]).float().mean()) if len(probes) else 0.0
            if share > most:
                most, preset = share, each.preset
    return preset


def was_degraded(latent: dict[str, Any]) -> bool:
    """Whether a LATENT was degraded at some time, even if it was changed since."""
    return MARK in latent


def known_strength(samples: Tensor, where: str = "") -> int | None:
    """The strength that samples [B, C, T, H, W] are known to be degraded with; otherwise as `degradation_of`."""
    if not isinstance(samples, Tensor) or samples.ndim != 5 or samples.shape[1] < KEY_CHANNELS or not samples.any():
        return None
    found = [_video_strengths(video[None]) for video in samples]
    strengths = {strength for shares in found for strength, share in shares.items() if share > _NONE}
    if not strengths:
        return None
    if len(strengths) > 1:
        raise ValueError(
            f"{where}this latent holds videos that were degraded with different strengths "
            f"({', '.join(map(str, sorted(strengths)))}); refine them one by one"
        )
    if any(sum(shares.values()) < _ALL for shares in found):
        raise ValueError(
            f"{where}only a part of this latent was degraded, since another node (Latent Batch, Latent Composite, say) "
            "put it together with one that was not. Degrade all of it, once, after that node"
        )
    (strength,) = strengths
    return None if any(_is_enlarged(video) for video in samples) else strength


def _video_strengths(video: Tensor) -> dict[int, float]:
    """The shares of a video's positions that are known, by their strength."""
    found: dict[int, float] = {}
    for dtype in KEY_DTYPES:
        shares: dict[int, float] = {}
        keys = keys_of(video, dtype).flatten()
        for strength, step in {(each.strength, each.step) for each in _remembered}:
            probes = probes_of(keys, step)
            known = torch.zeros(len(probes), dtype=torch.bool)
            for each in _remembered:
                if (each.strength, each.step) == (strength, step):
                    known |= torch.isin(probes, each.keys[dtype])
            if len(probes):
                shares[strength] = shares.get(strength, 0.0) + float(known.float().mean())
        if sum(shares.values()) >= _ALL:
            return shares
        found = max(found, shares, key=lambda each: sum(each.values()))
    return found


def _is_enlarged(video: Tensor) -> bool:
    """Whether a degraded video [C, T, H, W] was enlarged by repeating pixels or frames: noise never repeats itself."""
    for axis in (1, 2, 3):
        if video.shape[axis] > 1:
            first, second = video.narrow(axis, 0, video.shape[axis] - 1), video.narrow(axis, 1, video.shape[axis] - 1)
            if float((first == second).float().mean()) > _NONE:
                return True
    return False


def looks_like_noise(samples: Tensor) -> bool:
    """Whether neighbours in samples [B, C, T, H, W] have little to do with each other, as in a degraded latent."""
    if samples.shape[-1] < 2:
        return False
    values = samples.float()
    values = values - values.mean(dim=(2, 3, 4), keepdim=True)
    spread = float(values.square().mean())
    return spread > 0 and float((values[..., 1:] * values[..., :-1]).mean()) / spread < _NOISE_LIKE


def check_unmasked(mask: Tensor | None, where: str = "") -> None:
    """A degraded latent is refined as a whole: outside of a mask nothing would take its noise away.

    A white mask covers everything and counts as no mask.
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

    A latent that was degraded before is the start of the flow; one that was not gets the sampler's noise. Raises
    ValueError where a graph would degrade twice or never, or gives the network another strength than the latent's.
    """
    guider = executor.class_obj
    check_conditions(guider)
    warn_of_idle_patches(guider.model_options)
    sampling = guider.model_patcher.get_model_object("model_sampling")
    if not isinstance(sampling, RefinerSampling):
        raise ValueError(
            "FlashVideo stage II: another node replaced the refiner's noise schedule (such as ModelSampling...). "
            "Remove that node and set strength and shift with FlashVideo Refiner Settings."
        )
    strength = known_strength(latent_image, "FlashVideo stage II: ")
    if isinstance(sampling, AutoRefinerSampling):
        if strength is None:
            strength, config = sampling.strength_for(latent_image), guider.model_patcher.model.diffusion_model.config
            height, width = (SPATIAL_FACTOR * side for side in latent_image.shape[-2:])
            logging.info("FlashVideo stage II: %s", strength_in_words(strength, config, f"{width}x{height}"))
        else:
            logging.info("FlashVideo stage II: strength %d (auto, the latent's)", strength)
        run = (noise, latent_image, sampler, sigmas, denoise_mask, *args)
        return _at_strength(executor, sampling, strength, *run, **kwargs)
    adds_noise = bool(torch.count_nonzero(noise))
    starts_at = float(sampling.timestep(sigmas[0]))
    if starts_at > BEYOND_NOISE:
        raise ValueError(
            f"FlashVideo stage II: the sigmas begin at {float(sigmas[0]):.3g}, but {float(sampling.sigma_max):.3g} is "
            "the most that fits the strength. Take them from BasicScheduler, with the refiner as its model."
        )
    device = guider.model_patcher.load_device
    check_spread(sampler, sigmas, sampling, device, stage="FlashVideo stage II", advice=SAMPLER_ADVICE)
    starts_full = starts_at >= FULL_NOISE
    if strength is None:
        if starts_full and not adds_noise:
            raise ValueError(
                "FlashVideo stage II: this latent was never degraded. Turn the sampler's noise on, or put FlashVideo "
                "Latent Degradation before the sampler. Or it was, but that isn't known here, for example after Load "
                "Latent: then give it to FlashVideo Stage II Refiner, whose degraded_strength says how far."
            )
        if adds_noise and denoise_mask is None and looks_like_noise(latent_image):
            warn(NOISE_LIKE, running_node())
        with explained(guider.model_patcher, latent_image, stage=2):
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)

    check_unmasked(denoise_mask, "FlashVideo stage II: ")
    check_degraded_start(strength, sampling.degradation_step, adds_noise=adds_noise, starts_full=starts_full)
    # The first sigma is noise_weight / signal_weight, so that on the flow this start is the degraded latent itself.
    latent_image = latent_image.float()  # in half precision, samplers may end in NaN
    start = guider.model_patcher.model.process_latent_in(latent_image) / sampling.noise_weight
    with explained(guider.model_patcher, latent_image, stage=2):
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
    automatic = guider.model_patcher
    guider.model_patcher = automatic.clone()
    guider.model_patcher.add_object_patch("model_sampling", sampling.at(strength))
    try:
        sigmas = sampling.moved(sigmas, strength)
        return guard_degradation(executor, noise, latent_image, sampler, sigmas, *args, **kwargs)
    finally:
        let_go(guider.model_patcher)
        guider.model_patcher = automatic


def check_degraded_start(strength: int, expected: int, *, adds_noise: bool, starts_full: bool) -> None:
    """Refuse a run that would not start from the degraded latent itself, at its own strength."""
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
