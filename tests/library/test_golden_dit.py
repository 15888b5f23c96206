"""The network and the samplers against the official code's numbers (float32, CPU)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flashvideo.checkpoints import load_dit
from flashvideo.degradation import degradation_weights, degrade_latent
from flashvideo.dit import FlashVideoDiT
from flashvideo.dit.rope import rope_table
from flashvideo.guidance import dynamic_cfg_scale
from flashvideo.samplers import sample_stage1, sample_stage2
from flashvideo.schedule import stage1_schedule, stage2_times, zero_snr_signal

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
NETWORK_TOLERANCE = 2e-5  # an independent implementation reached 1.5e-6
SAMPLE_TOLERANCE = 3e-4  # likewise 2e-5


def frames_second(latent: torch.Tensor) -> torch.Tensor:
    """Golden latents are [B, T, C, H, W]; ours are [B, C, T, H, W]."""
    return latent.transpose(1, 2)


@pytest.fixture(scope="module", params=[1, 2])
def stage(request: pytest.FixtureRequest) -> int:
    return request.param


def load_stage(stage: int) -> FlashVideoDiT:
    return load_dit(load_file(GOLDEN / f"dit_stage{stage}_weights.safetensors"))


@pytest.mark.parametrize("case", ["case0", "case1"])
@torch.inference_mode()
def test_network_equals_the_official_one(stage: int, case: str) -> None:
    io = load_file(GOLDEN / f"dit_stage{stage}_io.safetensors")
    output = load_stage(stage)(
        frames_second(io[f"{case}.x"]),
        io[f"{case}.timesteps"],
        io[f"{case}.context"],
        degradation_step=675 if stage == 2 else None,
    )
    assert (frames_second(output) - io[f"{case}.output"]).abs().max() <= NETWORK_TOLERANCE


def test_rope_table_equals_the_official_one() -> None:
    io = load_file(GOLDEN / "dit_stage1_io.safetensors")
    cos, sin = rope_table(3, 3, 4, 64, torch.device("cpu"))
    assert torch.equal(cos.repeat_interleave(2, dim=-1), io["case0.trace.rope_cos"])
    assert torch.equal(sin.repeat_interleave(2, dim=-1), io["case0.trace.rope_sin"])


@pytest.mark.parametrize("entry", json.loads((GOLDEN / "schedules.json").read_text())["stage1"])
def test_stage1_schedule_equals_the_official_one(entry: dict) -> None:
    steps = entry["num_steps"]
    schedule = stage1_schedule(steps)
    torch.testing.assert_close(schedule.signal, torch.tensor(entry["alphas_cumprod_sqrt"]), rtol=1e-6, atol=1e-9)
    for i, row in enumerate(entry["rows"]):
        assert schedule.timesteps[i] == row["timestep"]
        assert float(schedule.quantized_signal[i]) == pytest.approx(row["quantised_alpha_sqrt"], rel=1e-6, abs=1e-9)
        scale = dynamic_cfg_scale(row["timestep"], steps, entry["guider"]["scale"], entry["guider"]["exp"])
        assert scale == pytest.approx(row["cfg_scale"], rel=1e-6)


def test_tables_and_grids_equal_the_official_ones() -> None:
    golden = json.loads((GOLDEN / "schedules.json").read_text())
    table = zero_snr_signal()
    assert table[:5].tolist() == pytest.approx(golden["stage1_denoiser_table"]["first_5"], rel=1e-6)
    assert table[-5:].tolist() == pytest.approx(golden["stage1_denoiser_table"]["last_5"], rel=1e-6)
    assert float(table.double().sum()) == pytest.approx(golden["stage1_denoiser_table"]["sha_sum"], rel=1e-6)
    for entry in golden["stage2"]["degradation"]:
        signal, noise = degradation_weights(entry["step"])
        assert (signal, noise) == pytest.approx((entry["sqrt_alpha_bar"], entry["noise_weight"]), rel=1e-6)
    for entry in golden["stage2"]["time_grids"]:
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            times = stage2_times(entry["steps"], entry["shift"], dtype).float()
            assert times.tolist() == pytest.approx(entry[name]["t"], rel=1e-6, abs=1e-7), (entry["steps"], name)


@torch.inference_mode()
def test_stage1_sample_equals_the_official_one() -> None:
    golden = load_file(GOLDEN / "sample_stage1.safetensors")
    case = json.loads((GOLDEN / "sample_stage1.json").read_text())["cases"][0]
    estimates = []
    final = sample_stage1(
        load_stage(1),
        frames_second(golden["case0.draw.00"]),
        golden["case0.cond"],
        golden["case0.uncond"],
        steps=case["steps"],
        scale=case["cfg"],
        step_noise=lambda i: frames_second(golden[f"case0.draw.{case['draw_used_per_step'][i]:02d}"]),
        on_step=lambda done, total, clean: estimates.append(clean),
    )
    assert len(estimates) == case["steps"]
    for i, estimate in enumerate(estimates):
        assert (frames_second(estimate) - golden[f"case0.denoised.{i:02d}"]).abs().max() <= SAMPLE_TOLERANCE
    assert (frames_second(final) - golden["case0.final"]).abs().max() <= SAMPLE_TOLERANCE


@pytest.mark.parametrize("index", [0, 1])
@torch.inference_mode()
def test_stage2_sample_equals_the_official_one(index: int) -> None:
    golden = load_file(GOLDEN / "sample_stage2.safetensors")
    case = json.loads((GOLDEN / "sample_stage2.json").read_text())["cases"][index]
    name = f"case{index}"
    start = degrade_latent(
        frames_second(golden[f"{name}.ref_latent"]), frames_second(golden[f"{name}.ref_noise"]), case["step"]
    )
    assert (frames_second(start) - golden[f"{name}.noised_latent"]).abs().max() <= 1e-6  # one multiply-add
    final = sample_stage2(
        load_stage(2),
        start,
        golden[f"{name}.cond"],
        golden[f"{name}.uncond"],
        steps=case["steps"],
        cfg=case["cfg"],
        shift=case["shift"],
        degradation_step=case["step"],
    )
    assert (frames_second(final) - golden[f"{name}.final"]).abs().max() <= SAMPLE_TOLERANCE
