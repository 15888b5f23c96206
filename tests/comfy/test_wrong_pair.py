"""A model and a VAE that don't belong together are named once, though no node of ComfyUI's sees both."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

CLIP = torch.rand((5, 32, 48, 3), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def load(submodule: Callable[[str], ModuleType]) -> Callable[[str], Any]:
    """A built-in MODEL or VAE by its part."""

    def loaded(part: str) -> Any:
        if part.endswith("vae"):
            return submodule("nodes.native.vae").load_vae_native(part)
        return submodule("nodes.native.model").load_model(submodule("flashvideo.nano").nano_state(part))

    return loaded


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said of pairs."""
    return [record.message for record in caplog.records if "don't belong together" in record.message]


def by_nodes(nodes: dict[str, Any], model: Any, latent: dict[str, Tensor], text: dict[str, list]) -> dict[str, Tensor]:
    """Degraded and refined by the pack's nodes."""
    degraded = nodes["FlashVideoLatentDegradation"].execute(latent, strength=60, seed=1).result[0]
    settings = {"steps": 1, "cfg": 2.0, "shift": 2.5, "solver": "euler", **text}
    return nodes["FlashVideoStage2Refiner"].execute(model=model, latent=degraded, **settings).result[0]


def by_ksampler(
    nodes: dict[str, Any], model: Any, latent: dict[str, Tensor], text: dict[str, list]
) -> dict[str, Tensor]:
    """Refined by ComfyUI's own sampler."""
    ready = nodes["FlashVideoRefinerSettings"].execute(model, 60, 2.5).result[0]
    return nodes["KSampler"]().sample(ready, 1, 1, 2.0, "euler", "simple", *text.values(), latent)[0]


@pytest.mark.parametrize("refine", [by_nodes, by_ksampler])
@pytest.mark.parametrize(("encoder", "refiner", "decoder", "expected"), [
    ("vae", "stage2", "vae", []),
    ("footage_vae", "footage_stage2", "footage_vae", []),
    ("vae", "footage_stage2", "vae", ["real footage, and the VAE of FlashVideo-Nano for drawn scenes"]),
    ("footage_vae", "footage_stage2", "vae", ["real footage, and the VAE of FlashVideo-Nano for drawn scenes"]),
    ("vae", "stage2", "footage_vae", ["drawn scenes, and the VAE of FlashVideo-Nano for real footage"]),
])  # fmt: skip
def test_a_wrong_pair_is_named_once(
    refine: Callable[..., dict[str, Tensor]],
    encoder: str,
    refiner: str,
    decoder: str,
    expected: list[str],
    load: Callable[[str], Any],
    comfy_nodes: dict[str, Any],
    text: dict[str, list],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        (latent,) = comfy_nodes["VAEEncode"]().encode(load(encoder), CLIP)
        refined = refine(comfy_nodes, load(refiner), latent, text)
        comfy_nodes["VAEDecode"]().decode(load(decoder), refined)
    said = warnings_of(caplog)
    assert len(said) == len(expected) and all(part in line for part, line in zip(expected, said, strict=True)), said


def test_cropped_and_stored_latents_are_still_known(
    load: Callable[[str], Any], comfy_nodes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        (latent,) = comfy_nodes["VAEEncode"]().encode(load("footage_vae"), CLIP)
        stored = {"samples": latent["samples"][..., :2, :4].half().flip(-1)}
        comfy_nodes["VAEDecode"]().decode(load("vae"), stored)
    assert len(warnings_of(caplog)) == 1


def test_a_draft_of_drawn_scenes_needs_their_vae(
    load: Callable[[str], Any],
    comfy_nodes: dict[str, Any],
    text: dict[str, list],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (empty,) = comfy_nodes["EmptyFlashVideoLatent"].execute(width=48, height=32, length=5, batch_size=1).result
    settings = {"seed": 1, "steps": 2, "cfg": 8.0, "dynamic_cfg": True, **text}
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        draft = comfy_nodes["FlashVideoStage1Sampler"].execute(model=load("stage1"), latent=empty, **settings).result[0]
        comfy_nodes["VAEDecode"]().decode(load("vae"), draft)
        assert not warnings_of(caplog)
        comfy_nodes["VAEDecode"]().decode(load("footage_vae"), draft)
    assert len(warnings_of(caplog)) == 1
