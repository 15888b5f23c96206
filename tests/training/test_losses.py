"""The training losses: the official code's numbers, and what minimises them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flashvideo.checkpoints import load_dit
from flashvideo.samplers import v_to_clean
from flashvideo.schedule import shift_times, stage2_times, zero_snr_signal
from flashvideo.training.tasks.losses import (
    drop_captions,
    flow_point,
    flow_step,
    own_flow_step,
    stage1_loss,
    texture_distance,
    vae_loss,
)

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
GOLDEN_TOLERANCE = 2e-5  # as the network's; measured 0 for the place on the flow, 5e-7 for the loss
LATENT = (2, 16, 3, 4, 6)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    tensors = load_file(GOLDEN / "train_terms.safetensors")
    return {name: value.transpose(1, 2) if value.ndim == 5 else value for name, value in tensors.items()}


@pytest.fixture(scope="module")
def setting() -> dict:
    return json.loads((GOLDEN / "train_terms.json").read_text())


def test_place_on_the_flow_equals_the_official_one(golden: dict[str, Tensor], setting: dict) -> None:
    point = flow_point(golden["flow.x0"], golden["flow.x1"], golden["flow.uniform"], setting["shift"])
    assert (point.latent - golden["flow.xt"]).abs().max() <= GOLDEN_TOLERANCE
    assert point.timestep.tolist() == pytest.approx(golden["flow.network_timestep"].tolist(), rel=1e-6)
    assert torch.equal(point.velocity, golden["flow.x1"] - golden["flow.x0"])


@torch.inference_mode()
def test_flow_loss_equals_the_official_one(golden: dict[str, Tensor], setting: dict) -> None:
    step = flow_step(
        load_dit(load_file(GOLDEN / setting["weights"])),
        golden["flow.x0"],
        golden["flow.x1"],
        golden["flow.context"],
        golden["flow.uniform"],
        torch.tensor([setting["degradation_step"]]),
        shift=setting["shift"],
    )
    assert float(step.loss) == pytest.approx(float(golden["flow.loss"]), abs=GOLDEN_TOLERANCE)


def test_a_right_velocity_leads_to_the_clean_latent_from_anywhere(golden: dict[str, Tensor]) -> None:
    uniform = torch.tensor([0.0, 0.4, 1.0])
    degraded, clean = drawn(3, *LATENT[1:]), drawn(3, *LATENT[1:], seed=1)
    point = flow_point(degraded, clean, uniform)
    torch.testing.assert_close(point.end(point.velocity), clean)
    assert not torch.allclose(point.end(0.9 * point.velocity)[:2], clean[:2])


def test_training_times_follow_the_samplers_grid() -> None:
    torch.testing.assert_close(shift_times(torch.linspace(0, 1, 6), 2.5), stage2_times(5, 2.5))
    uniform = torch.tensor([0.0, 0.3, 1.0])
    torch.testing.assert_close(shift_times(uniform, 1.0), uniform)
    with pytest.raises(ValueError, match="shift must be above 0"):
        shift_times(uniform, 0.0)


def test_flow_loss_of_a_batch_is_the_mean_of_its_samples(golden: dict[str, Tensor], setting: dict) -> None:
    dit = load_dit(load_file(GOLDEN / setting["weights"]))
    degraded, clean, context = drawn(*LATENT), drawn(*LATENT, seed=1), golden["flow.context"].repeat(2, 1, 1)
    uniform, steps = torch.tensor([0.1, 0.8]), torch.tensor([600, 750])
    whole = flow_step(dit, degraded, clean, context, uniform, steps).loss
    parts = [
        flow_step(dit, degraded[i, None], clean[i, None], context[i, None], uniform[i, None], steps[i, None]).loss
        for i in range(2)
    ]
    torch.testing.assert_close(whole, sum(parts) / 2, rtol=1e-5, atol=1e-6)  # float32 sums in another order
    whole.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in dit.parameters())


def test_a_networks_own_point_lies_between_the_start_and_its_first_guess() -> None:
    """And the best that it can do there is to lead to the clean latent, whatever it guessed first."""
    degraded, clean = drawn(*LATENT), drawn(*LATENT, seed=1)
    uniform, steps, context = torch.tensor([0.3, 0.8]), torch.tensor([60, 300]), drawn(2, 5, 8)
    guess, seen = drawn(*LATENT, seed=2), []

    def learner(latent: Tensor, timestep: Tensor, _context: Tensor, **_: Tensor) -> Tensor:
        seen.append((latent, timestep, torch.is_grad_enabled()))
        if len(seen) == 1:
            return guess - degraded
        rest = (timestep / 1000)[:, None, None, None, None]
        return ((clean - latent) / rest).requires_grad_()

    step = own_flow_step(learner, degraded, clean, context, uniform, steps)
    (first, begin, first_learns), (second, later, second_learns) = seen
    assert torch.equal(first, degraded)
    assert begin.tolist() == [1000, 1000]
    times = shift_times(uniform)
    assert later.tolist() == pytest.approx((1000 - 1000 * times).tolist())
    along = times[:, None, None, None, None]
    torch.testing.assert_close(second, (1 - along) * degraded + along * guess)
    assert (first_learns, second_learns) == (False, True)
    torch.testing.assert_close(step.clean, clean, rtol=1e-4, atol=1e-4)
    assert step.loss.item() == pytest.approx(0, abs=1e-8)
    assert step.loss.requires_grad


def test_stage1_loss_is_zero_for_a_network_that_knows_the_noise() -> None:
    latent, noise, timestep = drawn(*LATENT), drawn(*LATENT, seed=1), torch.tensor([0, 999])
    seen = {}

    def knowing(noisy: Tensor, step: Tensor, context: Tensor) -> Tensor:
        signal = zero_snr_signal()[step][:, None, None, None, None]
        v = signal * noise - (1 - signal**2).sqrt() * latent
        seen["clean"] = torch.cat([v_to_clean(*each) for each in zip(noisy, v, signal, strict=True)])
        seen["noisy"] = noisy
        return v

    assert float(stage1_loss(knowing, latent, drawn(2, 5, 8), noise, timestep)) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(seen["clean"], latent.flatten(0, 1), rtol=1e-5, atol=1e-5)  # the sampler agrees
    torch.testing.assert_close(seen["noisy"][1], noise[1])  # zero terminal SNR: the last step is noise alone


def test_stage1_loss_teaches_the_real_network() -> None:
    dit = load_dit(load_file(GOLDEN / "dit_stage1_weights.safetensors"))
    context = drawn(2, 5, dit.config.text_dim, seed=2)
    optimiser = torch.optim.AdamW(dit.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = stage1_loss(dit, drawn(*LATENT), context, drawn(*LATENT, seed=1), torch.tensor([20, 700]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "timestep", [torch.tensor([3]), torch.tensor([0.5, 3.0]), torch.tensor([-1, 5]), torch.tensor([5, 1000])]
)
def test_stage1_loss_refuses_other_timesteps(timestep: Tensor) -> None:
    with pytest.raises(ValueError, match="timestep"):
        stage1_loss(lambda *_: None, drawn(*LATENT), drawn(2, 5, 8), drawn(*LATENT), timestep)


def test_vae_loss_is_zero_for_a_perfect_copy_and_a_standard_normal() -> None:
    video, zeros = drawn(1, 3, 5, 8, 8), torch.zeros(1, 16, 2, 1, 1)
    assert {name: float(value) for name, value in vae_loss(video, video, zeros, zeros).items()} == {
        "loss": 0, "reconstruction": 0, "gradient": 0, "kl": 0,
    }  # fmt: skip


def test_vae_loss_weighs_its_terms() -> None:
    video, zeros = drawn(1, 3, 5, 8, 8), torch.zeros(1, 16, 2, 1, 1)
    mean, logvar = zeros + 2, zeros + 1
    ramp = torch.arange(8.0)[None, None, None, None]
    terms = vae_loss(video + 0.5 + 0.3 * ramp, video, mean, logvar, kl=0.25, gradient=2.0)
    assert float(terms["reconstruction"]) == pytest.approx(0.5 + 0.3 * 3.5, rel=1e-5)
    assert float(terms["gradient"]) == pytest.approx(0.3 / 3, rel=1e-5)  # along one of three axes
    q = torch.distributions.Normal(2.0, torch.tensor(0.5).exp())
    assert float(terms["kl"]) == pytest.approx(
        float(torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))), rel=1e-5
    )
    total = terms["reconstruction"] + 2 * terms["gradient"] + 0.25 * terms["kl"]
    torch.testing.assert_close(terms["loss"], total)


def test_motion_is_the_error_of_what_changes_and_counts_no_still_error() -> None:
    video, zeros = drawn(1, 3, 5, 8, 8), torch.zeros(1, 16, 2, 1, 1)
    still = drawn(1, 3, 1, 8, 8, seed=1)
    ramp = 0.3 * torch.arange(5.0)[None, None, :, None, None]
    terms = vae_loss(video + still, video, zeros, zeros, motion=2.0)
    assert float(terms["motion"]) == pytest.approx(0, abs=1e-6)
    terms = vae_loss(video + ramp, video, zeros, zeros, gradient=0.0, motion=2.0)
    assert float(terms["motion"]) == pytest.approx(0.3, rel=1e-5)
    assert float(terms["loss"]) == pytest.approx(0.3 * 2 + 2 * 0.3, rel=1e-5)  # the ramp's mean, and its motion
    picture = video[:, :, :1]
    assert float(vae_loss(picture + 1, picture, zeros, zeros, motion=2.0)["motion"]) == 0


def test_squared_errors_count_large_ones_most() -> None:
    video, zeros = torch.zeros(1, 3, 1, 4, 4), torch.zeros(1, 16, 1, 1, 1)
    spread = video + 0.25
    spot = video.clone()
    spot[..., 0, :] = 1.0  # the same mean error, in a quarter of the pixels
    losses = [vae_loss(clip, video, zeros, zeros, kl=0.0, gradient=0.0, square=6.0) for clip in (spread, spot)]
    assert [float(terms["square"]) for terms in losses] == pytest.approx([0.0625, 0.25])
    assert [float(terms["loss"]) for terms in losses] == pytest.approx([0.25 + 6 * 0.0625, 0.25 + 6 * 0.25])
    assert "square" not in vae_loss(spot, video, zeros, zeros)


def test_texture_asks_how_strong_detail_is_and_not_where() -> None:
    generator = torch.Generator().manual_seed(0)
    grass, other = torch.randn(2, 1, 3, 3, 64, 64, generator=generator) * 0.2
    plain = torch.zeros_like(grass)
    assert texture_distance(grass, grass) == 0
    assert texture_distance(grass, other) < 0.15 * texture_distance(grass, plain)
    blurred = (grass + grass.roll(1, -1) + grass.roll(1, -2)) / 3
    assert texture_distance(grass, other) < 0.5 * texture_distance(grass, blurred)
    # Strong in one half, plain in the other: not the same as half as strong everywhere.
    half = grass * (torch.arange(64) < 32) * 2**0.5
    assert texture_distance(grass, half) > 0.3 * texture_distance(grass, plain)


def test_texture_of_plain_pictures_has_a_gradient() -> None:
    plain = torch.zeros(1, 3, 1, 9, 15, requires_grad=True)
    texture_distance(plain, torch.randn(1, 3, 1, 9, 15, generator=torch.Generator().manual_seed(0))).backward()
    assert plain.grad.isfinite().all()
    terms = vae_loss(torch.ones(1, 3, 1, 8, 8), torch.zeros(1, 3, 1, 8, 8), *torch.zeros(2, 1, 16, 1, 1, 1), texture=2)
    assert terms["texture"] == 0
    assert float(terms["loss"]) == 1


def test_vae_loss_of_a_single_frame_has_no_time_to_differ_in() -> None:
    picture, zeros = drawn(1, 3, 1, 8, 8), torch.zeros(1, 16, 1, 1, 1)
    assert all(value.isfinite() for value in vae_loss(picture + 1, picture, zeros, zeros - 1000).values())


def test_captions_are_dropped_whole_and_as_often_as_asked() -> None:
    context = drawn(4000, 2, 3).abs() + 1
    dropped = drop_captions(context, torch.Generator().manual_seed(0))
    empty = (dropped == 0).all(dim=(1, 2))
    assert torch.equal(dropped[~empty], context[~empty])
    assert float(empty.float().mean()) == pytest.approx(0.1, abs=0.02)  # 4 standard deviations
    assert torch.equal(drop_captions(context, torch.Generator().manual_seed(0)), dropped)
    assert torch.equal(drop_captions(context, torch.Generator(), 0.0), context)
