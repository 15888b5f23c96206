"""Networks that the ablations compare differ in one thing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashvideo.config import NANO_STAGE2
from flashvideo.training.ablations.variants import beside, load_variant, variant_network
from flashvideo.training.loop.checkpointing import export_weights
from flashvideo.training.tasks.networks import NetworkSettings, make_network
from flashvideo.training.tasks.positions import AbsolutePositionsDiT, sinusoidal_positions

CPU = torch.device("cpu")


def test_absolute_positions_are_distinct_and_the_same_in_a_larger_picture() -> None:
    small = sinusoidal_positions(2, 3, 4, 32, CPU).view(2, 3, 4, 32)
    large = sinusoidal_positions(3, 5, 6, 32, CPU).view(3, 5, 6, 32)
    assert torch.equal(large[:2, :3, :4], small)
    flat = small.flatten(0, 2)
    assert torch.cdist(flat, flat).fill_diagonal_(1).min() > 1e-3


@torch.no_grad()
def test_absolute_positions_replace_rotary_ones_and_nothing_else() -> None:
    rotary = make_network(NetworkSettings(), 2, 1, CPU)
    torch.nn.init.normal_(rotary.proj_out.weight, generator=torch.Generator().manual_seed(0))
    absolute = variant_network(rotary, "absolute", 1)
    assert isinstance(absolute, AbsolutePositionsDiT)
    assert {name: p.shape for name, p in absolute.named_parameters()} == {
        name: p.shape for name, p in rotary.named_parameters()
    }
    cosines, sines = absolute.rope(2, 2, 2, CPU)
    assert bool((cosines == 1).all())
    assert bool((sines == 0).all())
    same = torch.randn(1, 16, 1, 1, 1, generator=torch.Generator().manual_seed(1)).expand(1, 16, 1, 4, 4)
    text = torch.zeros(1, 3, NANO_STAGE2.text_dim)
    out = absolute(same.contiguous(), torch.tensor([500.0]), text, degradation_step=675)
    assert (out[..., :2, :2] - out[..., 2:, 2:]).abs().max() > 1e-3  # equal patches at other places differ


@torch.no_grad()
@pytest.mark.parametrize("kind", ["rotary", "absolute", "cascade"])
def test_a_variant_is_read_as_it_was_written(kind: str, tmp_path: Path) -> None:
    made = variant_network(make_network(NetworkSettings(), 2, 1, CPU), kind, 1)
    torch.nn.init.normal_(made.proj_out.weight, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "weights.safetensors"
    export_weights(path, made.state_dict(), {"flashvideo.stage": "2"}, torch.float32)
    again = load_variant(path, kind, CPU)
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(2, made.config.in_channels, 1, 4, 4, generator=generator)
    arguments = latent, torch.tensor([500.0, 500.0]), torch.zeros(2, 3, NANO_STAGE2.text_dim)
    assert torch.equal(made(*arguments, degradation_step=675), again(*arguments, degradation_step=675))
    assert type(again) is type(made)


@torch.no_grad()
def test_a_cascade_sees_the_draft_beside_the_noise() -> None:
    cascade = variant_network(make_network(NetworkSettings(), 2, 1, CPU), "cascade", 1)
    torch.nn.init.normal_(cascade.proj_out.weight, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(3)
    noise, *references = torch.randn(3, 1, 16, 1, 4, 4, generator=generator)
    arguments = torch.cat((noise, noise)), torch.tensor([999.0, 999.0]), torch.zeros(2, 3, NANO_STAGE2.text_dim)
    first, second = (beside(cascade, each)(*arguments, degradation_step=999) for each in references)
    assert torch.allclose(first[0], first[1], atol=1e-5)  # a batch of two contexts has the one reference
    assert (first - second).abs().max() > 1e-3
