"""Runs of the two stages through ComfyUI's guider, so that memory, previews, progress and cancel are its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...flashvideo.config import STAGE1_SCALE
from ...flashvideo.degradation import AutoStrength, suited_strength
from ...flashvideo.guidance import STAGE1_EXPONENT, dynamic_cfg_scale
from ...flashvideo.samplers import solve_vp
from ...flashvideo.schedule import stage2_times
from .host import let_go
from .sampling import AutoRefinerSampling, RefinerSampling, Stage1ExactSampling, flow_to_sigma, per_sample
from .schedule_guard import DYNAMIC
from .tiny_vae import previewer

# A guidance scale other than 1: at 1 ComfyUI skips the unconditional branch.
ANY_SCALE = 2.0
_GOLDEN_RATIO = 0x9E3779B97F4A7C15  # of 2^64: its multiples are spread evenly (Knuth)


def with_dynamic_cfg(
    model: comfy.model_patcher.ModelPatcher, scale: float = STAGE1_SCALE, exponent: int = STAGE1_EXPONENT
) -> comfy.model_patcher.ModelPatcher:
    """A clone of a stage-I MODEL that is guided by FlashVideo's dynamic scale instead of the sampler's cfg."""

    def guided(args: dict[str, Any]) -> Tensor:
        sigmas = args["model_options"]["transformer_options"]["sample_sigmas"]
        timestep = float(args["model"].model_sampling.timestep(args["sigma"])[0])
        guidance = dynamic_cfg_scale(timestep, len(sigmas) - 1, scale, exponent)
        return args["uncond"] + guidance * (args["cond"] - args["uncond"])

    setattr(guided, DYNAMIC, True)
    clone = model.clone()
    clone.set_model_sampler_cfg_function(guided, disable_cfg1_optimization=True)
    return clone


def is_guided_otherwise(model: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether another node decides how cfg works, which `with_dynamic_cfg` would undo."""
    guide = model.model_options.get("sampler_cfg_function")
    return guide is not None and guide.__module__ != __name__


def _as_elsewhere(guide: Callable[[dict[str, Any]], Tensor]) -> Callable[[dict[str, Any]], Tensor]:
    """Another node's guidance, on a latent as ComfyUI's samplers define it: the clean latent plus sigma times noise.

    Stage I's exact run keeps the latent's variance at 1 instead.
    """

    def guided(args: dict[str, Any]) -> Tensor:
        x, sigma = args["input"], per_sample(args["sigma"], args["input"].ndim)
        there = x * (1 + sigma**2) ** 0.5
        seen = {name: there - args[f"{name}_denoised"] for name in ("cond", "uncond")}
        return x - there + guide({**args, **seen, "input": there})

    return guided


def latent_noise(shape: torch.Size, seed: int, numbers: Sequence[int] | None = None) -> Tensor:
    """Standard normal noise [B, C, T, H, W], as ComfyUI's samplers draw it; the same for every device.

    `numbers` are the videos' positions in a larger batch (a LATENT's batch_index); by default the first B.
    """
    numbers = range(shape[0]) if numbers is None else numbers
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = {}
    for number in range(max(numbers) + 1):
        noise = torch.randn(1, *shape[1:], generator=generator)
        if number in numbers:
            drawn[number] = noise
    return torch.cat([drawn[number] for number in numbers])


def seeded_noise(shape: torch.Size, seed: int, numbers: Sequence[int] | None = None) -> Callable[[], Tensor]:
    """Draws of standard normal noise [B, C, T, H, W], the same for every device; the first video's is ComfyUI's.

    Each video has a stream of its own, so that it comes out the same in a batch of any size. `numbers` as above.
    """
    numbers = range(shape[0]) if numbers is None else numbers
    streams = {number: torch.Generator("cpu").manual_seed(_stream_seed(seed, number)) for number in numbers}

    def draw() -> Tensor:
        noise = {number: torch.randn(1, *shape[1:], generator=stream) for number, stream in streams.items()}
        return torch.cat([noise[number] for number in numbers])

    return draw


def _stream_seed(seed: int, number: int) -> int:
    """The seed of a video in a batch: the user's for the first, far from what users choose for the others."""
    return (seed + number * _GOLDEN_RATIO) % 2**64


def run_stage1(
    model: comfy.model_patcher.ModelPatcher,
    positive: list,
    negative: list,
    latent: Tensor,
    draw: Callable[[], Tensor],
    *,
    steps: int,
    scale: float,
    dynamic: bool = True,
    seed: int | None = None,
) -> Tensor:
    """Draft latent in the VAE's scale [B, 16, T, H, W], on the official trajectory of `steps` evaluations.

    Of `latent` only the shape counts. `draw()` gives the initial latent, then the noise of each step but the last.
    """
    model = with_dynamic_cfg(model, scale) if dynamic else model.clone()
    if is_guided_otherwise(model):
        options = model.model_options
        options["sampler_cfg_function"] = _as_elsewhere(options["sampler_cfg_function"])
    sampling = Stage1ExactSampling(steps)
    model.add_object_patch("model_sampling", sampling)

    def official(
        denoiser: Callable[..., Tensor],
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        def denoise(state: Tensor, i: int) -> Tensor:
            return denoiser(state, sigmas[i].expand(len(state)), **(extra_args or {}))

        def on_step(done: int, _total: int, clean: Tensor) -> None:
            if callback is not None:
                callback({"i": done - 1, "denoised": clean, "x": clean, "sigma": sigmas[done - 1]})

        return solve_vp(denoise, x, sampling.schedule, lambda _: draw().to(x), on_step)

    sigmas = sampling.sigmas.flip(0)
    try:
        return comfy.sample.sample_custom(
            model,
            draw(),
            ANY_SCALE if dynamic else scale,
            comfy.samplers.KSAMPLER(official),
            torch.cat((sigmas, sigmas.new_zeros(1))),
            positive,
            negative,
            torch.zeros_like(latent),
            callback=_progress(model, steps, latent),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
    finally:
        let_go(model)


def run_stage2(
    model: comfy.model_patcher.ModelPatcher,
    positive: list,
    negative: list,
    degraded: Tensor,
    *,
    strength: int,
    steps: int,
    cfg: float,
    shift: float,
    solver: str,
) -> Tensor:
    """Refined latent in the VAE's scale [B, 16, T, H, W] from a latent that was degraded (and marked) before."""
    model = refiner_settings(model, strength, shift)
    try:
        return comfy.sample.sample_custom(
            model,
            torch.zeros_like(degraded),
            cfg,
            comfy.samplers.sampler_object(solver),
            flow_to_sigma(1 - stage2_times(steps, shift), strength),
            positive,
            negative,
            degraded,
            callback=_progress(model, steps, degraded),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=0,
        )
    finally:
        let_go(model)


def _progress(model: comfy.model_patcher.ModelPatcher, steps: int, latent: Tensor) -> Callable[..., None]:
    """ComfyUI's callback for progress and previews; with the tiny autoencoder's previews where it is there."""
    tiny = previewer(model.model.latent_format.scale_factor, model.load_device, max(latent.shape[-2:]))
    if tiny is None:
        return latent_preview.prepare_callback(model, steps)
    bar = comfy.utils.ProgressBar(steps)

    def callback(step: int, x0: Tensor, _x: Tensor, total: int) -> None:
        bar.update_absolute(step + 1, total, tiny.decode_latent_to_preview_image("JPEG", x0))

    return callback


def refiner_settings(
    model: comfy.model_patcher.ModelPatcher, strength: int | AutoStrength | None, shift: float
) -> comfy.model_patcher.ModelPatcher:
    """A clone of a stage-II MODEL that degrades with `strength` (None: auto) and spaces steps by `shift`."""
    clone = model.clone()
    is_known = isinstance(strength, int)
    suited = suited_strength(strength, model.model.diffusion_model.config)
    sampling = RefinerSampling(strength, shift) if is_known else AutoRefinerSampling(shift, suited)
    clone.add_object_patch("model_sampling", sampling)
    return clone
