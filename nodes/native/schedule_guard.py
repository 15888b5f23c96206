"""Checks before a run: schedules, samplers and guiders that can't give a correct picture are refused or warned of.

Some combinations of sampler, scheduler and steps give a picture that is far too weak or far too strong, with any
network. So each run is first simulated with few numbers and an ideal network, for which clean latents are standard
normal numbers. At the end their standard deviation must be 1. That takes some milliseconds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import comfy.hooks
import comfy.samplers
import torch
from comfy_execution.utils import get_executing_context
from torch import Tensor

from .host import holds_quantised
from .idle_patches import warn_of_idle_patches
from .notices import warn
from .out_of_memory import explained
from .sampling import Stage1ExactSampling, Stage1Sampling

STAGE1 = "FlashVideo stage I"
STAGE1_ADVICE = "Use FlashVideo Stage I Sampler, or dpmpp_2m_sde with FlashVideo Stage I Scheduler or simple."
NOT_FINITE = "holds numbers that are not finite (NaN); look at its weights, such as (word:1.2), and at the text encoder"
HOOKED = (
    "has a LoRA on a hook, which ComfyUI can't add to quantised weights. Set Load FlashVideo Model's weight_dtype to "
    "bf16 or an fp8, take a GGUF file, or use Load LoRA on the model."
)
DYNAMIC = "flashvideo_dynamic_cfg"  # an attribute of FlashVideo's own guidance
SHAPE = (1, 16, 1, 16, 16)  # the spread of so many random numbers is known to 3.5 % (three deviations)
RIGHT = 0.725, 1.255  # spreads without a warning: 0.7 to 1.3, less what chance may add
USABLE = 0.1, 2.5  # outside of them nothing is left of the picture
CLEAN, NOISE, SAMPLER_NOISE = 0, 1, 3  # seeds; ComfyUI may add 1 to a sampler's
UNTRIED = "FlashVideo: this sampler could not be checked before the run:"
AS_WEAK = 0.95  # of the official sampler's spread with as few steps: then the steps are the cause


class _Ideal:
    """Replaces ComfyUI's guider: returns the mean of the clean latents that a sample may come from."""

    def __init__(self, sampling: Any) -> None:
        patcher = SimpleNamespace(get_model_object=lambda _name: sampling, model_sampling=sampling)
        self.inner_model = SimpleNamespace(model_sampling=sampling, model_patcher=patcher)
        patcher.model = self.inner_model
        self.model_patcher = patcher
        self.conds: dict[str, Any] = {}
        self.cfg = 1.0

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict[str, Any] | None = None, **_: Any) -> Tensor:
        clean = x / (1 + sigma.reshape(-1, 1, 1, 1, 1) ** 2)
        for change in (model_options or {}).get("sampler_post_cfg_function", []):
            seen = {"denoised": clean, "cond_denoised": clean, "uncond_denoised": clean, "input": x, "sigma": sigma}
            clean = change({**seen, "model": self.inner_model, "model_options": model_options, "cond_scale": 1.0})
        return clean


def spread(sampler: Any, sigmas: Tensor, sampling: Any, device: torch.device) -> float | None:
    """Standard deviation of a sampler's result with ideal predictions, ideally 1; None where it can't be computed.

    On the CPU, some versions of ComfyUI draw a sampler's own noise from the same numbers as the start's noise, which
    makes the result stronger. On a card the two differ. `device` is where the run is going to be.
    """
    if type(sampler) is not comfy.samplers.KSAMPLER or len(sigmas) < 2:
        return None
    sigmas = sigmas.to("cpu", torch.float32)
    clean, noise = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (CLEAN, NOISE))
    seed = NOISE if device.type == "cpu" else SAMPLER_NOISE
    extra = {"model_options": {"transformer_options": {"sample_sigmas": sigmas}}, "seed": seed}
    try:
        with torch.random.fork_rng(devices=[]):
            found = sampler.sample(_Ideal(sampling), sigmas, extra, None, noise, clean, None, True)
        return float(found.std() / (1 + sigmas[-1] ** 2) ** 0.5)
    except Exception as error:  # of another pack's sampler, which may need more of a model than there is here
        logging.info("%s %s: %s", UNTRIED, type(error).__name__, error)
        return None


def check_spread(sampler: Any, sigmas: Tensor, sampling: Any, device: torch.device, *, stage: str, advice: str) -> None:
    """Warn of a sampler and sigmas that end too weak or too strong. Raises ValueError if nothing usable comes out."""
    found = spread(sampler, sigmas, sampling, device)
    if found is None or RIGHT[0] <= found <= RIGHT[1] or _is_only_few_steps(found, sigmas, sampling, device):
        return
    name = getattr(sampler.sampler_function, "__name__", "this sampler").removeprefix("sample_")
    steps = len(sigmas) - 1
    ends = f"at {found:.2g} times it" if math.isfinite(found) else "in numbers that are not finite"
    text = (
        f"{stage}: the sampler ({name}) and the scheduler's {steps} steps don't suit each other: instead of at the "
        f"right contrast they end {ends}. {advice}"
    )
    if not USABLE[0] <= found <= USABLE[1]:
        raise ValueError(text)
    warn(text, running_node())


def _is_only_few_steps(found: float, sigmas: Tensor, sampling: Any, device: torch.device) -> bool:
    """Whether a result is too weak only because the user chose so few steps."""
    if not found < RIGHT[0]:
        return False
    steps = len(sigmas) - 1
    euler, simple = comfy.samplers.sampler_object("euler"), comfy.samplers.simple_scheduler(sampling, steps)
    official = spread(euler, simple, sampling, device)
    return official is not None and found >= AS_WEAK * official


def running_node() -> str | None:
    """The id of the node that is running, if one is."""
    context = get_executing_context()
    return None if context is None else context.node_id


def guard_stage1(
    executor: Callable[..., Tensor],
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """ComfyUI wrapper around a sampler run of stage I. Raises ValueError for what would spoil the draft."""
    guider = executor.class_obj
    check_conditions(guider)
    warn_of_idle_patches(guider.model_options)
    sampling = guider.model_patcher.get_model_object("model_sampling")
    if not isinstance(sampling, Stage1Sampling | Stage1ExactSampling):
        raise ValueError(
            f"{STAGE1}: another node replaced the draft model's noise schedule (such as ModelSampling...). Remove that "
            "node: stage I has a schedule of its own."
        )
    if isinstance(sampling, Stage1Sampling):
        check_guider(guider)
        device = guider.model_patcher.load_device
        check_spread(sampler, sigmas, sampling, device, stage=STAGE1, advice=STAGE1_ADVICE)
    with explained(guider.model_patcher, latent_image, stage=1):
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)


def check_conditions(guider: Any) -> None:
    """Refuse a prompt that can't be used with this model. Raises ValueError.

    It may hold numbers which are not finite, such as of (cat:1e400), or hooks that change weights which ComfyUI's
    quantised layers can't change in a run.
    """
    quantised = holds_quantised(guider.model_patcher)
    for name, conditions in guider.conds.items():
        for condition in conditions or ():
            hooks = condition.get("hooks")
            if quantised and hooks is not None and hooks.get_type(comfy.hooks.EnumHookType.Weight):
                raise ValueError(f"FlashVideo: the {name} prompt {HOOKED}")
            text = condition.get("cross_attn")
            if isinstance(text, Tensor) and not torch.isfinite(text).all():
                raise ValueError(f"FlashVideo: the {name} prompt {NOT_FINITE}")


def check_guider(guider: Any) -> None:
    """FlashVideo's dynamic guidance needs a negative. Raises ValueError where a guider has none."""
    guide = guider.model_options.get("sampler_cfg_function")
    if not hasattr(guide, DYNAMIC):
        return
    if not guider.conds.get("negative"):
        raise ValueError(
            f"{STAGE1}: FlashVideo Dynamic CFG compares the prompt with a negative, and this guider has none (as "
            "BasicGuider). Take CFGGuider, with FlashVideo Prompt's second output as the negative, or leave Dynamic "
            "CFG out."
        )
    if type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise:
        warn(
            f"{STAGE1}: FlashVideo Dynamic CFG has no effect with this guider, which decides itself how strongly the "
            "prompt is followed. Take CFGGuider.",
            running_node(),
        )
