"""The planner's formulas against counted operations and measured memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes, flash_attention
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flashvideo.checkpoints.weights import open_weights
from flashvideo.config import (
    NANO_STAGE1,
    NANO_STAGE2,
    NANO_VAE,
    STAGE1,
    STAGE2,
    VAE,
    DiTConfig,
    VAEConfig,
    latent_shape,
)
from flashvideo.dit import Attention, FlashVideoDiT, attention_sdpa
from flashvideo.memory import dit_bytes, sampler_bytes, vae_outline
from flashvideo.nano import build_nano
from flashvideo.planner import NANO, Setting, make_plan
from flashvideo.planner.flops import decode_flops, dit_flops, encode_flops, tiling_factor
from flashvideo.refiner.tiles import tiled_velocity
from flashvideo.samplers import guided_velocity, solve_flow
from flashvideo.schedule import stage2_times
from flashvideo.training.tasks.networks import attention_products
from flashvideo.vae import VideoVAE
from flashvideo.vae.memory import decode_bytes, encode_bytes, plan_vae_tiles
from flashvideo.vae.tiles import decode_in_tiles

FLOPS_TOLERANCE = 0.01  # 0.1 is what a plan needs; the formulas leave out nothing that the counter counts
MEMORY_TOLERANCE = 0.15
DRAFT, FULL_HD = (13, 32, 60), (13, 136, 240)  # latents of 480x256 and 1920x1088, 49 frames
ONE_LAYER_1, ONE_LAYER_2 = replace(STAGE1, num_layers=1), replace(STAGE2, num_layers=1)


def dit_inputs(config: DiTConfig, shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = {
        "latent": torch.empty(1, 16, *shape, dtype=dtype, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "context": torch.empty(1, 226, config.text_dim, dtype=dtype, device="meta"),
    }
    return inputs | ({"degradation_step": torch.empty(1, device="meta")} if config.stage == 2 else {})


def operations(run: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("config", "shape"),
    [(NANO_STAGE1, (3, 16, 20)), (NANO_STAGE2, FULL_HD), (ONE_LAYER_1, DRAFT), (ONE_LAYER_2, FULL_HD)],
)
def test_operations_of_the_transformer_are_those_counted(config: DiTConfig, shape: tuple[int, int, int]) -> None:
    network = FlashVideoDiT(config, device="meta")
    counted = operations(lambda: network(**dit_inputs(config, shape, torch.float32)))
    assert dit_flops(config, shape).total == pytest.approx(counted, rel=FLOPS_TOLERANCE)


@pytest.mark.parametrize(
    ("config", "video"), [(NANO_VAE, (9, 64, 96)), (NANO_VAE, (37, 48, 64)), (VAE, (17, 1088, 1920))]
)
def test_operations_of_the_vae_are_those_counted(config: VAEConfig, video: tuple[int, int, int]) -> None:
    network = VideoVAE(config, device="meta")
    counted = operations(lambda: network.encode(torch.empty(1, 3, *video, device="meta")))
    assert encode_flops(config, *video).total == pytest.approx(counted, rel=FLOPS_TOLERANCE)
    counted = operations(lambda: network.decode(torch.empty(1, 16, *latent_shape(video), device="meta")))
    assert decode_flops(config, *video).total == pytest.approx(counted, rel=FLOPS_TOLERANCE)


@pytest.mark.parametrize(("store", "repeated"), [(math.inf, 1.0), (2e6, 1.5), (0.0, 5.0)])
def test_operations_of_the_vae_in_tiles_are_those_counted(
    store: float, repeated: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The less may be stored between groups of units, the more is computed again."""
    monkeypatch.setattr("flashvideo.vae.tiles.MAIN_MEMORY", torch.device("meta"))  # nothing comes back from there
    network, video = vae_outline(NANO_VAE), (5, 64, 128)
    shape = latent_shape(video)
    latent, frames = torch.empty(1, 16, *shape, device="meta"), torch.empty(1, 3, *video, device="meta")
    tiles = plan_vae_tiles(network.decoder, shape, torch.float32, math.inf, store, side=8)
    counted = operations(lambda: decode_in_tiles(network, latent, tiles, frames, "meta"))
    predicted = decode_flops(NANO_VAE, *video).total * tiling_factor(tiles, *shape)
    assert predicted == pytest.approx(counted, rel=0.1)
    assert predicted > repeated * decode_flops(NANO_VAE, *video).total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (NANO_STAGE1, DRAFT),
        (NANO_STAGE2, FULL_HD),
        (ONE_LAYER_1, DRAFT),
        (ONE_LAYER_2, (13, 68, 120)),
        (ONE_LAYER_2, FULL_HD),
        (ONE_LAYER_2, (13, 184, 320)),
    ],
)
def test_memory_of_the_transformer_is_what_was_measured(
    config: DiTConfig, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    network = FlashVideoDiT(config, device="meta", dtype=dtype)
    inputs = dit_inputs(config, shape, dtype)
    with LiveBytes(*inputs.values(), *network.parameters()) as memory, torch.no_grad():
        network(**inputs, attention=flash_attention)
    assert dit_bytes(config, shape, dtype) == pytest.approx(memory.added, rel=MEMORY_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_the_refiner_is_what_a_run_took(dtype: torch.dtype) -> None:
    network = FlashVideoDiT(NANO_STAGE2, dtype=dtype).eval()
    context, shape = torch.zeros(1, 226, NANO_STAGE2.text_dim, dtype=dtype), (3, 16, 24)
    with LiveBytes(context, *network.parameters()) as memory, torch.no_grad():
        start = torch.zeros(1, 16, *shape)
        solve_flow(guided_velocity(network, context, torch.zeros_like(context), 13.0, 675), start, stage2_times(2))
    predicted = dit_bytes(NANO_STAGE2, shape, dtype, "cpu") + sampler_bytes(NANO_STAGE2, shape)
    assert predicted == pytest.approx(memory.added, rel=MEMORY_TOLERANCE)


def test_a_refiner_in_tiles_costs_what_a_run_took() -> None:
    network = FlashVideoDiT(NANO_STAGE2).eval()
    context, video = torch.zeros(1, 226, NANO_STAGE2.text_dim), (5, 192, 256)
    setting = Setting(video[2], video[1], video[0], 0, 2, tile=160, precision="fp32", networks=NANO, device="cpu")
    phase = next(phase for phase in make_plan(setting).phases if phase.name == "stage II")

    def refine(attention: Attention) -> None:
        called = partial(network, attention=attention)
        velocity = tiled_velocity(guided_velocity(called, context, torch.zeros_like(context), 13.0, 675), 160)
        with torch.no_grad():
            solve_flow(velocity, torch.zeros(1, 16, *latent_shape(video)), stage2_times(2))

    with LiveBytes(context, *network.parameters()) as memory:
        refine(attention_sdpa)
    assert phase.activations == pytest.approx(memory.added, rel=MEMORY_TOLERANCE)
    assert phase.flops.total == pytest.approx(operations(lambda: refine(attention_products)), rel=FLOPS_TOLERANCE)
    assert phase.tile == 160


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("config", "video"),
    [(NANO_VAE, (37, 256, 480)), (NANO_VAE, (1, 544, 960)), (VAE, (21, 256, 480))],
)
def test_memory_of_the_vae_is_what_was_measured(
    config: VAEConfig, video: tuple[int, int, int], dtype: torch.dtype
) -> None:
    network = VideoVAE(config, device="meta", dtype=dtype)
    pixels = torch.empty(1, 3, *video, dtype=dtype, device="meta")
    latent = torch.empty(1, 16, *latent_shape(video), dtype=dtype, device="meta")
    for predicted, run, given in (
        (encode_bytes(network, pixels.shape, dtype), network.encode, pixels),
        (decode_bytes(network, latent.shape, dtype), network.decode, latent),
    ):
        with LiveBytes(*network.parameters()) as memory, torch.no_grad():
            run(given)
        assert predicted == pytest.approx(memory.added, rel=MEMORY_TOLERANCE)


def test_weights_are_those_of_the_files() -> None:
    plan = make_plan(Setting(networks=NANO, precision="fp32"))
    weights = {phase.name: phase.weights for phase in plan.phases}
    for phase, part in (("text", "text_encoder"), ("stage I", "stage1"), ("stage II", "stage2"), ("VAE decode", "vae")):
        numbers = sum(math.prod(shape) for shape in open_weights(build_nano(0)[part]).shapes.values())
        assert weights[phase] == 4 * numbers
