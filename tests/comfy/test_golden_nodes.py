"""The nodes, in real ComfyUI, on the official code's numbers (float32, CPU)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
SAMPLE_TOLERANCE = 3e-4  # the library's own; the way through ComfyUI adds rounding of about 1e-7 a step
STAGE1_SCALE, STAGE2_SCALE = 0.7, 1.15258426


def frames_second(latent: torch.Tensor) -> torch.Tensor:
    """Golden latents are [B, T, C, H, W]; ours are [B, C, T, H, W]."""
    return latent.transpose(1, 2)


@pytest.fixture(scope="module")
def golden_model(submodule: Callable[[str], ModuleType]) -> Callable[[int], Any]:
    """A golden stage as a native MODEL."""
    load_model = submodule("nodes.native.model").load_model
    return lambda stage: load_model(load_file(GOLDEN / f"dit_stage{stage}_weights.safetensors"))


@pytest.fixture(autouse=True)
def as_the_executor_does() -> Iterator[None]:
    """ComfyUI runs nodes under inference mode."""
    with torch.inference_mode():
        yield


def conditioning(golden: dict[str, torch.Tensor], case: str) -> tuple[list, list]:
    """Positive and negative CONDITIONING of a golden case."""
    return [[golden[f"{case}.cond"], {}]], [[golden[f"{case}.uncond"], {}]]


def stage2_case(index: int) -> tuple[dict, dict[str, torch.Tensor], str]:
    """Settings, tensors and the name of a golden refinement."""
    case = json.loads((GOLDEN / "sample_stage2.json").read_text())["cases"][index]
    return case, load_file(GOLDEN / "sample_stage2.safetensors"), f"case{index}"


def test_stage1_sampler_follows_the_official_trajectory(
    comfy_nodes: dict, golden_model: Callable, submodule: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = load_file(GOLDEN / "sample_stage1.safetensors")
    case = json.loads((GOLDEN / "sample_stage1.json").read_text())["cases"][0]
    used = [0, *(draw for draw in case["draw_used_per_step"] if draw is not None)]
    draws = iter([frames_second(golden[f"case0.draw.{draw:02d}"]) for draw in used])
    monkeypatch.setattr(submodule("nodes.stage1"), "seeded_noise", lambda *_: lambda: next(draws))
    positive, negative = conditioning(golden, "case0")

    (latent,) = (
        comfy_nodes["FlashVideoStage1Sampler"]
        .execute(
            golden_model(1),
            positive,
            negative,
            {"samples": torch.zeros(1, 16, case["T"], case["h"], case["w"])},
            seed=0,
            steps=case["steps"],
            cfg=case["cfg"],
            dynamic_cfg=True,
        )
        .result
    )
    error = frames_second(latent["samples"]) * STAGE1_SCALE - golden["case0.final"]
    assert error.abs().max() <= SAMPLE_TOLERANCE


@pytest.mark.parametrize("index", [0, 1])
def test_degradation_and_refiner_follow_the_official_trajectory(
    comfy_nodes: dict, golden_model: Callable, submodule: Callable, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    case, golden, name = stage2_case(index)
    noise = frames_second(golden[f"{name}.ref_noise"])
    monkeypatch.setattr(submodule("nodes.stage2"), "latent_noise", lambda *_: noise)
    reference = {"samples": frames_second(golden[f"{name}.ref_latent"]) / STAGE2_SCALE}

    (degraded,) = comfy_nodes["FlashVideoLatentDegradation"].execute(reference, case["step"], seed=0).result
    error = frames_second(degraded["samples"]) * STAGE2_SCALE - golden[f"{name}.noised_latent"]
    assert error.abs().max() <= 2e-6  # one more multiply and divide than the library
    (latent,) = (
        comfy_nodes["FlashVideoStage2Refiner"]
        .execute(
            golden_model(2),
            *conditioning(golden, name),
            degraded,
            steps=case["steps"],
            cfg=case["cfg"],
            shift=case["shift"],
            solver="euler",
        )
        .result
    )
    error = frames_second(latent["samples"]) * STAGE2_SCALE - golden[f"{name}.final"]
    assert error.abs().max() <= SAMPLE_TOLERANCE


@pytest.mark.parametrize("index", [0, 1])
def test_stock_ksampler_follows_the_official_trajectory(
    comfy_nodes: dict, golden_model: Callable, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    import comfy.sample

    case, golden, name = stage2_case(index)
    noise = frames_second(golden[f"{name}.ref_noise"])
    monkeypatch.setattr(comfy.sample, "prepare_noise", lambda latent, seed, inds=None: noise)
    (model,) = comfy_nodes["FlashVideoRefinerSettings"].execute(golden_model(2), case["step"], case["shift"]).result
    positive, negative = conditioning(golden, name)
    (latent,) = comfy_nodes["KSampler"]().sample(
        model=model,
        seed=0,
        steps=case["steps"],
        cfg=case["cfg"],
        sampler_name="euler",
        scheduler="simple",
        positive=positive,
        negative=negative,
        latent_image={"samples": frames_second(golden[f"{name}.ref_latent"]) / STAGE2_SCALE},
        denoise=1.0,
    )
    error = frames_second(latent["samples"]) * STAGE2_SCALE - golden[f"{name}.final"]
    assert error.abs().max() <= SAMPLE_TOLERANCE


def test_the_three_ways_to_refine_agree(comfy_nodes: dict, golden_model: Callable) -> None:
    """The same seed gives the same video through our nodes, KSampler and SamplerCustomAdvanced."""
    case, golden, name = stage2_case(0)
    model, (positive, negative) = golden_model(2), conditioning(golden, name)
    reference = {"samples": frames_second(golden[f"{name}.ref_latent"]) / STAGE2_SCALE}
    steps, cfg = case["steps"], case["cfg"]

    (degraded,) = comfy_nodes["FlashVideoLatentDegradation"].execute(reference, case["step"], seed=7).result
    refine = comfy_nodes["FlashVideoStage2Refiner"].execute
    (ours,) = refine(model, positive, negative, degraded, steps, cfg, case["shift"], "euler").result

    (set_up,) = comfy_nodes["FlashVideoRefinerSettings"].execute(model, case["step"], case["shift"]).result
    (stock,) = comfy_nodes["KSampler"]().sample(
        set_up, 7, steps, cfg, "euler", "simple", positive, negative, reference, denoise=1.0
    )
    noise = comfy_nodes["RandomNoise"].execute(7).result[0]
    guider = comfy_nodes["CFGGuider"].execute(set_up, positive, negative, cfg).result[0]
    sampler = comfy_nodes["KSamplerSelect"].execute("euler").result[0]
    sigmas = comfy_nodes["BasicScheduler"].execute(set_up, "simple", steps, 1.0).result[0]
    custom = comfy_nodes["SamplerCustomAdvanced"].execute(noise, guider, sampler, sigmas, reference).result[0]

    assert (stock["samples"] - ours["samples"]).abs().max() <= 1e-4  # rounding of the start, amplified by cfg 13
    assert torch.equal(stock["samples"], custom["samples"])


def test_a_degraded_latent_starts_ksampler_advanced_without_noise(comfy_nodes: dict, golden_model: Callable) -> None:
    case, golden, name = stage2_case(0)
    model, (positive, negative) = golden_model(2), conditioning(golden, name)
    reference = {"samples": frames_second(golden[f"{name}.ref_latent"]) / STAGE2_SCALE}
    (degraded,) = comfy_nodes["FlashVideoLatentDegradation"].execute(reference, case["step"], seed=7).result
    refine = comfy_nodes["FlashVideoStage2Refiner"].execute
    (ours,) = refine(model, positive, negative, degraded, case["steps"], case["cfg"], case["shift"], "euler").result
    (stock,) = comfy_nodes["KSamplerAdvanced"]().sample(
        model,
        "disable",
        0,
        case["steps"],
        case["cfg"],
        "euler",
        "simple",
        positive,
        negative,
        degraded,
        0,
        10000,
        "disable",
    )
    assert (stock["samples"] - ours["samples"]).abs().max() <= 1e-4  # the grids differ by rounding, amplified by cfg 13


def test_a_run_split_in_two_equals_one_run(comfy_nodes: dict, golden_model: Callable) -> None:
    """A zero-noise continuation round-trips through a LATENT."""
    case, golden, name = stage2_case(0)
    model, (positive, negative) = golden_model(2), conditioning(golden, name)
    reference = {"samples": frames_second(golden[f"{name}.ref_latent"]) / STAGE2_SCALE}
    advanced = comfy_nodes["KSamplerAdvanced"]()
    common = (4, case["cfg"], "euler", "simple", positive, negative)
    (whole,) = advanced.sample(model, "enable", 3, *common, reference, 0, 10000, "disable")
    (half,) = advanced.sample(model, "enable", 3, *common, reference, 0, 2, "enable")
    (rest,) = advanced.sample(model, "disable", 3, *common, half, 2, 10000, "disable")
    assert (rest["samples"] - whole["samples"]).abs().max() <= 1e-4  # float32 rounding, amplified by cfg 13


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "ddim", "euler"])
def test_stage1_runs_in_stock_samplers(comfy_nodes: dict, golden_model: Callable, sampler: str) -> None:
    golden = load_file(GOLDEN / "sample_stage1.safetensors")
    positive, negative = conditioning(golden, "case0")
    (model,) = comfy_nodes["FlashVideoDynamicCFG"].execute(golden_model(1), 8.0, 5).result
    (sigmas,) = comfy_nodes["FlashVideoStage1Scheduler"].execute(model, 6, 1.0).result
    latent = (
        comfy_nodes["SamplerCustom"]
        .execute(
            model,
            True,
            1,
            1.0,
            positive,
            negative,
            comfy_nodes["KSamplerSelect"].execute(sampler).result[0],
            sigmas,
            {"samples": torch.zeros(1, 16, 3, 6, 8)},
        )
        .result[0]
    )
    samples = latent["samples"]
    assert torch.isfinite(samples).all()
    # The official result of this random model spreads by 1.79 in scaled space; a wrong noise law is off by far more.
    assert 0.5 < float(samples.std() * STAGE1_SCALE) / float(golden["case0.final"].std()) < 2.0


def test_stage1_scheduler_starts_later_at_lower_denoise(comfy_nodes: dict, golden_model: Callable) -> None:
    model = golden_model(1)
    (whole,) = comfy_nodes["FlashVideoStage1Scheduler"].execute(model, 20, 1.0).result
    (half,) = comfy_nodes["FlashVideoStage1Scheduler"].execute(model, 10, 0.5).result
    assert len(whole) == 21 and len(half) == 11
    assert whole[-1] == half[-1] == 0
    assert torch.equal(half, whole[-11:])
    assert comfy_nodes["FlashVideoStage1Scheduler"].execute(model, 10, 0.0).result[0].numel() == 0


def test_seed_decides_the_result(comfy_nodes: dict, golden_model: Callable) -> None:
    golden = load_file(GOLDEN / "sample_stage1.safetensors")
    model, (positive, negative) = golden_model(1), conditioning(golden, "case0")
    empty = {"samples": torch.zeros(1, 16, 2, 4, 4)}

    def draft(seed: int) -> torch.Tensor:
        run = comfy_nodes["FlashVideoStage1Sampler"].execute
        return run(model, positive, negative, empty, seed, 4, 8.0, True).result[0]["samples"]

    assert torch.equal(draft(1), draft(1))
    assert not torch.allclose(draft(1), draft(2))
