"""The refiner over a long latent: windows that agree at every step, in its own node and in KSampler."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import comfy.model_management
import pytest
import torch
from draws import normal
from torch import Tensor

STRENGTH, STEPS, SHIFT = 675, 4, 2.5


def wandering(frames: int, seed: int) -> Tensor:
    """A latent [1, 16, frames, 4, 6] that changes slowly and keeps its spread: nine tenths of a frame stay."""
    keep, noise = 0.9, normal(1, 16, frames, 4, 6, seed=seed)
    latent = [noise[:, :, 0]]
    for index in range(1, frames):
        latent.append(keep * latent[-1] + (1 - keep**2) ** 0.5 * noise[:, :, index])
    return torch.stack(latent, dim=2)


@pytest.fixture(scope="module")
def refine(degrade_and_refine: Callable[..., Tensor], model: Any) -> Callable[..., Tensor]:
    """Degrade a latent and refine it, with the two nodes."""

    def run(latent: Tensor, cfg: float = 13.0, use: Any = model, **windows: int) -> Tensor:
        return degrade_and_refine(use, latent, STRENGTH, steps=STEPS, cfg=cfg, shift=SHIFT, **windows)

    return run


def test_windows_give_what_the_library_gives(
    refine: Callable[..., Tensor], submodule: Callable[[str], ModuleType], text: dict[str, list]
) -> None:
    library = {name: submodule(f"flashvideo.{name}") for name in ("refiner.windows", "samplers", "schedule")}
    dit = submodule("flashvideo.checkpoints").load_dit(
        submodule("flashvideo.nano").nano_state("stage2"), dtype=torch.float32
    )
    scale = submodule("flashvideo.config").STAGE2_LATENT_SCALE
    latent = wandering(12, 0)
    start = submodule("flashvideo.degradation").degrade_latent(
        latent * scale, submodule("nodes.native.stages").latent_noise(latent.shape, 1), STRENGTH
    )
    velocity = library["samplers"].guided_velocity(dit, text["positive"][0][0], text["negative"][0][0], 13.0, STRENGTH)
    plan = library["refiner.windows"].plan_windows(12, 17, 8)
    assert len(plan.starts) > 2
    with torch.no_grad():
        blended = library["refiner.windows"].windowed_velocity(velocity, plan)
        expected = (
            library["samplers"].solve_flow(blended, start, library["schedule"].stage2_times(STEPS, SHIFT)) / scale
        )
    # ComfyUI blends clean latents where the library blends velocities; guidance multiplies rounding by 13, four times.
    torch.testing.assert_close(refine(latent, window=17, overlap=8), expected, rtol=0, atol=2e-3)


def test_ksampler_refines_in_the_same_windows(
    comfy_nodes: dict[str, Any], refine: Callable[..., Tensor], model: Any, text: dict[str, list]
) -> None:
    latent = wandering(12, 0)
    settings = {"strength": STRENGTH, "shift": SHIFT, "window": 17, "overlap": 8}
    with torch.inference_mode():
        windowed = comfy_nodes["FlashVideoRefinerSettings"].execute(model=model, **settings).result[0]
        sampled = comfy_nodes["KSampler"]().sample(
            windowed, 1, STEPS, 13.0, "euler", "simple", **text, latent_image={"samples": latent}
        )[0]["samples"]
    expected = refine(latent, window=17, overlap=8)
    torch.testing.assert_close(sampled, expected, rtol=0, atol=2e-3)
    assert (sampled - refine(latent, window=0)).abs().max() > 0.02  # the windows do have opinions of their own


def test_a_latent_of_one_window_is_refined_as_before_to_the_last_bit(refine: Callable[..., Tensor]) -> None:
    latent = wandering(13, 0)
    assert torch.equal(refine(latent), refine(latent, window=0))


def test_windows_begin_and_end_without_a_step(
    refine: Callable[..., Tensor], submodule: Callable[[str], ModuleType]
) -> None:
    """By how much the difference from the whole changes from frame to frame; hard cuts would give about 5."""
    frames = 40
    plan = submodule("flashvideo.refiner.windows").plan_windows(frames)
    steps = torch.zeros(frames - 1)
    for seed in range(3):
        latent = wandering(frames, seed)[..., :4, :4]
        difference = refine(latent, cfg=1.0) - refine(latent, cfg=1.0, window=0)
        steps += difference.diff(dim=2).square().mean((0, 1, 3, 4))
    cuts = [*plan.starts[1:], *(start + plan.length for start in plan.starts[:-1])]
    border = torch.zeros(frames - 1, dtype=torch.bool)
    border[[cut - 1 for cut in cuts]] = True
    assert float(steps.min()) > 0
    assert float((steps[border].mean() / steps[~border].mean()).sqrt()) < 2


def test_comfyui_makes_room_for_a_window_and_not_for_the_video(
    refine: Callable[..., Tensor], asked_memory: list[float]
) -> None:
    for frames, windows in ((13, {}), (40, {}), (40, {"window": 0})):
        refine(wandering(frames, 0), cfg=1.0, **windows)
    window, video, whole = asked_memory
    assert window < video < whole


def test_cancel_answers_after_a_window_and_other_wrappers_see_the_windows(
    refine: Callable[..., Tensor], model: Any
) -> None:
    seen: list[int] = []

    def watch(apply_model: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        seen.append(args["input"].shape[2])
        if len(seen) == 2:
            comfy.model_management.interrupt_current_processing(True)
        return apply_model(args["input"], args["timestep"], **args["c"])

    watched = model.clone()
    watched.set_model_unet_function_wrapper(watch)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        refine(wandering(40, 0), cfg=1.0, use=watched)
    assert seen == [13, 13]


@pytest.mark.parametrize("node", ["FlashVideoStage2Refiner", "FlashVideoRefinerSettings"])
def test_windows_that_cannot_be_are_refused(
    node: str, refine: Callable[..., Tensor], comfy_nodes: dict[str, Any], model: Any
) -> None:
    name = comfy_nodes[node].define_schema().display_name
    settings = {"window": 48, "overlap": 16}
    with pytest.raises(ValueError, match=f"^{name}: a window must have 4n\\+1 frames .* got 48"):
        if node == "FlashVideoStage2Refiner":
            refine(wandering(2, 0), **settings)
        else:
            comfy_nodes[node].execute(model=model, strength=STRENGTH, shift=SHIFT, **settings)
