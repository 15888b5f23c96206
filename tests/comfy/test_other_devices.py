"""ComfyUI's own nodes that choose devices or split guidance over two: newer versions only, with pretended devices."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import ModuleType
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import pytest
import torch
from torch import Tensor

if not hasattr(comfy.patcher_extension.CallbacksMP, "ON_DEEPCLONE_MULTIGPU"):
    pytest.skip("this ComfyUI has no nodes for several devices", allow_module_level=True)

FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 1)  # to ComfyUI two devices, to PyTorch one
ELSEWHERE = torch.device("meta")


@pytest.fixture(scope="module", autouse=True)
def only_living_models() -> None:
    """Forget models that tests of other files left in ComfyUI's list.

    Errors that those expect hold a clone and the model that it was made of, and both go at one time; see `host.let_go`.
    """
    gc.collect()
    listed = comfy.model_management.current_loaded_models
    listed[:] = [each for each in listed if each.model is not None]


@pytest.fixture(autouse=True)
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI finds two devices."""
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda **_: [FIRST, SECOND])
    monkeypatch.setattr(comfy.model_management, "resolve_gpu_device_option", lambda _name: ELSEWHERE)
    # So that a single device, too, computes the two halves of guidance one after the other, with the same numbers.
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda *_: 0)


@pytest.fixture(scope="module")
def draft_model(submodule: Callable[[str], ModuleType]) -> Any:
    """Nano's stage I as a MODEL."""
    return submodule("nodes.native.model").load_model(submodule("flashvideo.nano").nano_state("stage1"))


def conditioning(model: Any, seed: int) -> list[list[Any]]:
    """A made-up prompt."""
    width = model.model.diffusion_model.config.text_dim
    return [[torch.randn(1, 4, width, generator=torch.Generator().manual_seed(seed)), {}]]


def split(comfy_nodes: dict[str, Any], model: Any) -> tuple[Any, list[int]]:
    """The model behind MultiGPU CFG Split, and a list of the networks that ran."""
    both = comfy_nodes["MultiGPU_WorkUnits"].execute(model, 2).result[0]
    assert [copy.load_device for copy in both.get_additional_models_with_key("multigpu")] == [SECOND]
    ran: list[int] = []

    def note(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        ran.append(id(executor.class_obj))
        return executor(*args, **kwargs)

    both.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "note", note)
    return both, ran


@pytest.mark.parametrize("sampler", ["KSampler", "own node"])
@pytest.mark.parametrize("stage", [1, 2])
def test_guidance_split_over_two_devices_equals_one(
    stage: int, sampler: str, comfy_nodes: dict[str, Any], model: Any, draft_model: Any
) -> None:
    base = draft_model if stage == 1 else model
    positive, negative = conditioning(base, 1), conditioning(base, 2)
    latent = {"samples": torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(3))}

    def run(used: Any) -> Tensor:
        with torch.inference_mode():
            if sampler == "KSampler":
                settings = (5, 3, 4.0, "euler", "simple", positive, negative, latent, 1.0)
                return comfy_nodes["KSampler"]().sample(used, *settings)[0]["samples"]
            if stage == 1:
                node = comfy_nodes["FlashVideoStage1Sampler"]
                return node.execute(used, positive, negative, latent, 3, 3, 6.0, True).result[0]["samples"]
            degraded = comfy_nodes["FlashVideoLatentDegradation"].execute(latent, 300, 5).result[0]
            node = comfy_nodes["FlashVideoStage2Refiner"]
            return node.execute(used, positive, negative, degraded, 3, 4.0, 2.5, "euler").result[0]["samples"]

    one = run(base)
    both, ran = split(comfy_nodes, base)
    assert torch.equal(run(both), one)
    assert len(set(ran)) == 2  # two networks took part


@pytest.mark.parametrize("sampler", ["stage 1", "stage 2", "auto"])
def test_comfyui_never_lists_a_model_that_is_gone(
    sampler: str, comfy_nodes: dict[str, Any], model: Any, draft_model: Any
) -> None:
    base = draft_model if sampler == "stage 1" else model
    positive, negative = conditioning(base, 1), conditioning(base, 2)
    latent = {"samples": torch.zeros(1, 16, 1, 4, 4)}
    both, _ = split(comfy_nodes, base)
    with torch.inference_mode():
        if sampler == "stage 1":
            comfy_nodes["FlashVideoStage1Sampler"].execute(both, positive, negative, latent, 3, 2, 6.0, True)
        elif sampler == "stage 2":
            degraded = comfy_nodes["FlashVideoLatentDegradation"].execute(latent, 300, 5).result[0]
            comfy_nodes["FlashVideoStage2Refiner"].execute(both, positive, negative, degraded, 1, 4.0, 2.5, "euler")
        else:
            both = comfy_nodes["FlashVideoRefinerSettings"].execute(both, -1, 2.5).result[0]
            settings = (5, 1, 4.0, "euler", "simple", positive, negative, latent, 1.0)
            comfy_nodes["KSampler"]().sample(both, *settings)
    base_is_used_again, both = base.clone(), None  # another graph is run, with the same file
    gc.collect()
    assert None not in comfy.model_management.loaded_models()
    split(comfy_nodes, base_is_used_again)


def test_a_model_can_be_put_on_another_device(comfy_nodes: dict[str, Any], model: Any) -> None:
    moved = comfy_nodes["SelectModelDevice"].execute(model, "gpu:1").result[0]
    assert moved.load_device == ELSEWHERE and moved.model is not model.model
    before, after = (each.model.diffusion_model.state_dict() for each in (model, moved))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert moved.model.latent_format.scale_factor == model.model.latent_format.scale_factor


def test_a_vae_on_another_device_works_there(
    comfy_nodes: dict[str, Any], submodule: Callable[[str], ModuleType]
) -> None:
    vae = submodule("nodes.native.vae").load_vae_native("vae")
    moved = comfy_nodes["SelectVAEDevice"].execute(vae, "gpu:1").result[0]
    assert moved.first_stage_model is not vae.first_stage_model
    assert (vae.first_stage_model.device, moved.first_stage_model.device) == (FIRST, ELSEWHERE)


def test_a_text_encoder_can_be_put_on_another_device(
    comfy_nodes: dict[str, Any], submodule: Callable[[str], ModuleType]
) -> None:
    clip = submodule("nodes.native.clip").load_clip_native(None)
    moved = comfy_nodes["SelectCLIPDevice"].execute(clip, "gpu:1").result[0]
    assert moved.patcher.load_device == ELSEWHERE and moved.patcher.model is not clip.patcher.model
