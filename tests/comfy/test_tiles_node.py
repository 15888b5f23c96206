"""The refiner in spatial tiles: the library's numbers, with windows too, in every sampler, and room for one tile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from draws import normal
from torch import Tensor

STRENGTH, STEPS, SHIFT, TILE = 450, 2, 2.5, 128


@pytest.fixture(scope="module")
def tiled(comfy_nodes: dict[str, Any], model: Any) -> Any:
    """The MODEL behind the node."""
    return comfy_nodes["FlashVideoSpatialTiles"].execute(model=model, tile=TILE).result[0]


@pytest.fixture(scope="module")
def refine(degrade_and_refine: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Degrade a latent and refine it, with the two nodes."""
    return partial(degrade_and_refine, strength=STRENGTH, steps=STEPS, cfg=4.0, shift=SHIFT)


def expected(submodule: Callable[[str], ModuleType], text: dict[str, list], latent: Tensor, window: int = 0) -> Tensor:
    """What the library makes of the latent in tiles, in windows of time too if wanted."""
    names = ("samplers", "schedule", "refiner.windows")
    samplers, schedule, windows = (submodule(f"flashvideo.{name}") for name in names)
    nano = submodule("flashvideo.nano").nano_state("stage2")
    dit = submodule("flashvideo.checkpoints").load_dit(nano, dtype=torch.float32)
    scale = submodule("flashvideo.config").STAGE2_LATENT_SCALE
    noise = submodule("nodes.native.stages").latent_noise(latent.shape, 1)
    start = submodule("flashvideo.degradation").degrade_latent(latent * scale, noise, STRENGTH)
    velocity = samplers.guided_velocity(dit, text["positive"][0][0], text["negative"][0][0], 4.0, STRENGTH)
    velocity = submodule("flashvideo.refiner.tiles").tiled_velocity(velocity, TILE)
    if window:
        velocity = windows.windowed_velocity(velocity, windows.plan_windows(latent.shape[2], window, 0))
    with torch.no_grad():
        return samplers.solve_flow(velocity, start, schedule.stage2_times(STEPS, SHIFT)) / scale


@pytest.mark.parametrize("window", [0, 5])
def test_tiles_give_what_the_library_gives(
    window: int,
    refine: Callable[..., Tensor],
    tiled: Any,
    model: Any,
    submodule: Callable[[str], ModuleType],
    text: dict[str, list],
) -> None:
    latent = normal(1, 16, 3, 20, 28)
    refined = refine(tiled, latent, window=window, overlap=0)
    torch.testing.assert_close(refined, expected(submodule, text, latent, window), rtol=0, atol=1e-3)
    assert (refined - refine(model, latent, window=window, overlap=0)).abs().max() > 0.02  # tiles have their own view


def test_ksampler_takes_the_tiles_too(
    comfy_nodes: dict[str, Any], refine: Callable[..., Tensor], tiled: Any, text: dict[str, list]
) -> None:
    latent = normal(1, 16, 2, 20, 28)
    with torch.inference_mode():
        ready = comfy_nodes["FlashVideoRefinerSettings"].execute(model=tiled, strength=STRENGTH, shift=SHIFT).result[0]
        sampled = comfy_nodes["KSampler"]().sample(
            ready, 1, STEPS, 4.0, "euler", "simple", **text, latent_image={"samples": latent}
        )[0]["samples"]
    torch.testing.assert_close(sampled, refine(tiled, latent), rtol=0, atol=1e-3)


def test_a_picture_of_one_tile_is_refined_as_before_to_the_last_bit(
    refine: Callable[..., Tensor], tiled: Any, model: Any
) -> None:
    latent = normal(1, 16, 2, 16, 16)
    assert torch.equal(refine(tiled, latent), refine(model, latent))


def test_comfyui_makes_room_for_a_tile_and_not_for_the_picture(
    refine: Callable[..., Tensor], tiled: Any, model: Any, asked_memory: list[float]
) -> None:
    for use, sides in ((model, (16, 16)), (tiled, (32, 48)), (model, (32, 48))):
        refine(use, normal(1, 16, 1, *sides))
    tile, picture, whole = asked_memory
    assert tile < picture < whole


def test_the_long_video_node_tells_tiles_from_none(
    comfy_nodes: dict[str, Any], submodule: Callable[[str], ModuleType], model: Any, tiled: Any
) -> None:
    fingerprint = submodule("nodes.native.fingerprint").weights_fingerprint
    larger = comfy_nodes["FlashVideoSpatialTiles"].execute(model=model, tile=256).result[0]
    again = comfy_nodes["FlashVideoSpatialTiles"].execute(model=model, tile=TILE).result[0]
    assert len({fingerprint(each) for each in (model, tiled, larger)}) == 3
    assert fingerprint(again) == fingerprint(tiled)


def test_a_wrong_model_or_tile_is_refused(
    comfy_nodes: dict[str, Any], model: Any, submodule: Callable[[str], ModuleType]
) -> None:
    node = comfy_nodes["FlashVideoSpatialTiles"]
    with pytest.raises(ValueError, match="^FlashVideo Spatial Tiles: a tile's side is a multiple of 16 .* got 200"):
        node.execute(model=model, tile=200)
    draft = submodule("nodes.native.model").load_model(submodule("flashvideo.nano").nano_state("stage1"))
    with pytest.raises(ValueError, match="^FlashVideo Spatial Tiles: model must be FlashVideo stage II"):
        node.execute(model=draft, tile=TILE)
