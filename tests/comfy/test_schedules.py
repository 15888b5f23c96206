"""Every sampler with every scheduler of ComfyUI, on both stages: the right spread at the end, or a message."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from draws import normal
from torch import Tensor

STRENGTH, STEPS = 675, 6
LOW, HIGH = 0.7, 1.3
SCALES = {1: 0.7, 2: 1.15258426}  # of the latents


@pytest.fixture(scope="module")
def draft_model(submodule: Callable[[str], ModuleType]) -> Any:
    """Nano's stage I as a MODEL."""
    return submodule("nodes.native.model").load_model(submodule("flashvideo.nano").nano_state("stage1"))


@pytest.fixture(scope="module")
def ideal(draft_model: Any, model: Any, submodule: Callable[[str], ModuleType]) -> dict[int, Any]:
    """Both stages with the best possible network: the clean latents are standard normal numbers."""
    signal, noise = submodule("flashvideo.degradation").degradation_weights(STRENGTH)
    table = submodule("flashvideo.schedule").zero_snr_signal()

    def velocity(_executor: Any, x: Tensor, timestep: Tensor, *_: Any, **__: Any) -> Tensor:
        place = timestep.reshape(-1, 1, 1, 1, 1) / 1000
        w, n = 1 - place * (1 - signal), place * noise
        return (w * x / (w**2 + n**2) - x) / place

    def v(_executor: Any, x: Tensor, timestep: Tensor, *_: Any, **__: Any) -> Tensor:
        # x is variance preserving, s clean + n noise: its clean latent is s x on average, its noise n x, so v is 0.
        assert float(timestep.min()) >= 0 and float(timestep.max()) < len(table)
        return torch.zeros_like(x)

    made = {}
    for stage, base, network in ((1, draft_model, v), (2, model, velocity)):
        made[stage] = base.clone()
        made[stage].add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "ideal", network)
    return made


@pytest.mark.filterwarnings("ignore::UserWarning")  # of ComfyUI's samplers
@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
@pytest.mark.parametrize("stage", [1, 2])
def test_every_sampler_ends_at_the_right_spread_or_says_so(
    stage: int,
    scheduler: str,
    ideal: dict[int, Any],
    comfy_nodes: dict[str, Any],
    draft_model: Any,
    model: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    width = {1: draft_model, 2: model}[stage].model.diffusion_model.config.text_dim
    text = [[torch.zeros(1, 4, width), {}]]
    latent = {"samples": normal(1, 16, 1, 16, 16, seed=1) / SCALES[stage]}
    if stage == 1:
        latent = {"samples": torch.zeros_like(latent["samples"])}
    wrong = []
    caplog.set_level(logging.INFO)
    for sampler in comfy.samplers.SAMPLER_NAMES:
        caplog.clear()
        try:
            with torch.inference_mode():
                found = comfy_nodes["KSampler"]().sample(
                    ideal[stage], 2, STEPS, 1.0, sampler, scheduler, text, text, latent, 1.0
                )[0]["samples"]
        except ValueError as error:
            assert "don't suit each other" in str(error), error
            continue
        spread = float(found.std()) * SCALES[stage]
        if not LOW < spread < HIGH and "don't suit each other" not in caplog.text:
            wrong.append(f"{sampler} {spread:.2f}")
        assert "could not be checked" not in caplog.text, sampler
    assert not wrong


def test_the_ways_that_the_help_names_are_passed_in_silence(
    ideal: dict[int, Any], comfy_nodes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    for stage, sampler, scheduler, steps in (
        (1, "dpmpp_2m_sde", "simple", 25),
        (1, "euler", "simple", 30),
        (2, "euler", "simple", 1),
        (2, "euler", "simple", 4),
        (2, "heun", "simple", 4),
        (2, "dpmpp_2m", "simple", 4),
        (2, "res_multistep", "simple", 4),
    ):
        text = [[torch.zeros(1, 4, ideal[stage].model.diffusion_model.config.text_dim), {}]]
        latent = {"samples": normal(1, 16, 1, 16, 16, seed=1) / SCALES[stage]}
        with torch.inference_mode():
            comfy_nodes["KSampler"]().sample(ideal[stage], 2, steps, 1.0, sampler, scheduler, text, text, latent, 1.0)
    assert "don't suit each other" not in caplog.text


def test_a_schedule_of_another_model_is_refused_on_stage_one(comfy_nodes: dict[str, Any], draft_model: Any) -> None:
    text = [[torch.zeros(1, 4, draft_model.model.diffusion_model.config.text_dim), {}]]
    latent = {"samples": torch.zeros(1, 16, 1, 4, 4)}
    changed = comfy_nodes["ModelSamplingSD3"]().patch(draft_model, 3.0)[0]
    with pytest.raises(ValueError, match=r"FlashVideo stage I: another node replaced .* noise schedule"):
        comfy_nodes["KSampler"]().sample(changed, 2, 2, 1.0, "euler", "simple", text, text, latent, 1.0)


def test_dynamic_guidance_needs_a_negative(
    comfy_nodes: dict[str, Any], draft_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    width = draft_model.model.diffusion_model.config.text_dim
    positive, empty = [[normal(1, 4, width, seed=2), {}]], [[torch.zeros(1, 4, width), {}]]
    dynamic = comfy_nodes["FlashVideoDynamicCFG"].execute(draft_model, 8.0, 5).result[0]
    sigmas = comfy_nodes["FlashVideoStage1Scheduler"].execute(draft_model, 4, 1.0).result[0]
    latent, sampler = {"samples": torch.zeros(1, 16, 1, 4, 4)}, comfy_nodes["KSamplerSelect"].execute("euler").result[0]
    noise = comfy_nodes["RandomNoise"].execute(3).result[0]

    def run(guider: Any) -> Tensor:
        with torch.inference_mode():
            return (
                comfy_nodes["SamplerCustomAdvanced"]
                .execute(noise, guider, sampler, sigmas, latent)
                .result[0]["samples"]
            )

    with pytest.raises(ValueError, match="Dynamic CFG compares the prompt with a negative, and this guider has none"):
        run(comfy_nodes["BasicGuider"].execute(dynamic, positive).result[0])
    assert torch.isfinite(run(comfy_nodes["CFGGuider"].execute(dynamic, positive, empty, 5.0).result[0])).all()
    assert "no effect" not in caplog.text
    run(comfy_nodes["PerpNegGuider"].execute(dynamic, positive, empty, empty, 5.0, 1.0).result[0])
    assert "Dynamic CFG has no effect with this guider" in caplog.text
