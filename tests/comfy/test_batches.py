"""ComfyUI's convention for batches: a video is made again by its place in the batch (batch_index) and the seed."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

SIZE = (64, 32, 5)  # width, height, frames


@pytest.fixture(scope="module")
def draft(
    comfy_nodes: dict[str, Any], submodule: Callable[[str], ModuleType]
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Nano's stage I on a LATENT, seed 1; returns the LATENT."""
    model = submodule("nodes.native.model").load_model(submodule("flashvideo.nano").nano_state("stage1"))
    width = model.model.diffusion_model.config.text_dim
    context = torch.randn((1, 8, width), generator=torch.Generator().manual_seed(0))
    texts = [[context, {}]], [[torch.zeros_like(context), {}]]

    def run(latent: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            return comfy_nodes["FlashVideoStage1Sampler"].execute(model, *texts, latent, 1, 3, 6.0, True).result[0]

    return run


@pytest.fixture()
def degrade(comfy_nodes: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Latent Degradation, seed 1."""
    return lambda latent: comfy_nodes["FlashVideoLatentDegradation"].execute(latent, 675, 1).result[0]


@pytest.fixture()
def empty(comfy_nodes: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    """An empty LATENT of so many videos."""
    return lambda count: comfy_nodes["EmptyFlashVideoLatent"].execute(*SIZE, count).result[0]


@pytest.fixture()
def picked(comfy_nodes: dict[str, Any]) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    """One video of a batch, by ComfyUI's Latent From Batch."""
    return lambda latent, number: comfy_nodes["LatentFromBatch"]().frombatch(latent, number, 1)[0]


def near(one: Tensor, other: Tensor) -> bool:
    """Equal but for the rounding of a batch's sums."""
    return bool((one - other).abs().max() < 1e-3)


@pytest.mark.parametrize("way", ["draft", "degrade"])
def test_one_video_of_a_batch_is_made_again_by_its_place(
    request: pytest.FixtureRequest, empty: Callable, picked: Callable, way: str
) -> None:
    run, batch = request.getfixturevalue(way), empty(3)
    videos = run(batch)["samples"]
    assert not near(videos[0], videos[1]) and not near(videos[1], videos[2])
    for number in range(3):
        again = run(picked(batch, number))
        assert near(again["samples"][0], videos[number]), number
        assert again["batch_index"] == [number]
    assert near(run(empty(1))["samples"][0], videos[0])  # the first one doesn't depend on how many there are


@pytest.mark.parametrize("way", ["draft", "degrade"])
def test_a_fixed_seed_behavior_gives_equal_videos(
    comfy_nodes: dict[str, Any], request: pytest.FixtureRequest, empty: Callable, way: str
) -> None:
    fixed = comfy_nodes["LatentBatchSeedBehavior"].execute(empty(2), "fixed").result[0]
    first, second = request.getfixturevalue(way)(fixed)["samples"]
    assert near(first, second)


def test_noise_of_latent_degradation_is_comfyuis(empty: Callable, degrade: Callable, picked: Callable) -> None:
    from comfy.sample import prepare_noise

    batch = empty(2)
    noise = prepare_noise(batch["samples"], 1)
    degraded = degrade(batch)["samples"]
    weight = float((degraded / noise).mean())
    torch.testing.assert_close(degraded, weight * noise, rtol=0, atol=1e-5)


def test_a_batch_index_that_cannot_be_is_refused(empty: Callable, degrade: Callable) -> None:
    for wrong in ([0], [0, -1], [0, 10**9], [0, 0.5]):
        with pytest.raises(ValueError, match="holds 2 videos, and its batch_index is"):
            degrade({**empty(2), "batch_index": wrong})
