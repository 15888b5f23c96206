"""Presets in the graph: set once, followed by the refiner, shown, and the same as the numbers typed by hand."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from draws import normal
from torch import Tensor

HEIGHT, WIDTH = 48, 64  # pixels
# Widgets that a preset overrides.
IGNORED = {"steps": 1, "cfg": 2.0, "shift": 7.0}
NAMES = ("faithful", "balanced", "rich", "fast")


@pytest.fixture(scope="module")
def presets(submodule: Callable[[str], ModuleType]) -> Mapping[str, Any]:
    """The table."""
    return submodule("flashvideo.presets").PRESETS


@pytest.fixture(scope="module")
def strength_of(submodule: Callable[[str], ModuleType], presets: Mapping[str, Any]) -> Callable[[str], int]:
    """A preset's strength for the latents below."""
    auto_strength = submodule("flashvideo.degradation").auto_strength
    return lambda name: auto_strength(HEIGHT, WIDTH, strength=presets[name].strength)


@pytest.fixture()
def latent() -> dict[str, Tensor]:
    """A LATENT of HEIGHT x WIDTH pixels, five frames."""
    return {"samples": normal(1, 16, 2, HEIGHT // 8, WIDTH // 8, seed=1)}


@pytest.fixture()
def degrade(comfy_nodes: dict[str, Any], latent: dict) -> Callable[..., Any]:
    """FlashVideo Latent Degradation's output."""
    node = comfy_nodes["FlashVideoLatentDegradation"]
    return lambda strength, seed=3, **preset: node.execute(latent, strength, seed, **preset)


@pytest.fixture()
def refine(comfy_nodes: dict[str, Any], model: Any, text: dict[str, list]) -> Callable[..., Any]:
    """FlashVideo Stage II Refiner's output."""

    def run(latent: dict, **widgets: Any) -> Any:
        widgets = {"solver": "euler", **widgets}
        with torch.inference_mode():
            return comfy_nodes["FlashVideoStage2Refiner"].execute(model, latent=latent, **text, **widgets)

    return run


@pytest.mark.parametrize("name", NAMES)
def test_the_refiner_follows_the_preset_of_the_latent(
    name: str,
    degrade: Callable[..., Any],
    refine: Callable[..., Any],
    presets: Mapping[str, Any],
    strength_of: Callable[[str], int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The widgets that it overrides are ignored, and the numbers are shown."""
    with caplog.at_level(logging.INFO):
        chosen = degrade(900, preset=name)
        refined = refine(chosen.result[0], **IGNORED)
    preset, strength = presets[name], strength_of(name)
    assert chosen.ui.as_dict()["text"] == (f"preset {name}: strength {strength}",)
    numbers = f"preset {name}: steps {preset.steps}, cfg {preset.cfg:g}, shift 2.5"
    assert refined.ui.as_dict()["text"] == (numbers,)
    assert f"FlashVideo Latent Degradation: preset {name}: strength {strength}" in caplog.text
    assert f"FlashVideo Stage II Refiner: {numbers}" in caplog.text
    by_hand = degrade(strength).result[0]
    assert torch.equal(by_hand["samples"], chosen.result[0]["samples"])
    by_hand = refine(by_hand, **preset.sampling)
    assert torch.equal(by_hand.result[0]["samples"], refined.result[0]["samples"])
    assert by_hand.ui is None


def test_custom_is_as_without_a_preset(degrade: Callable[..., Any], refine: Callable[..., Any]) -> None:
    """Also after the same latent was degraded by a preset: the newest counts."""
    degrade(-1, preset="balanced")
    for preset in ({}, {"preset": "custom"}):
        degraded = degrade(-1, **preset)
        assert degraded.ui.as_dict()["text"][0].endswith("(auto)")
        refined = refine(degraded.result[0], **IGNORED)
        assert refined.ui is None
        assert torch.equal(refined.result[0]["samples"], refine(degrade(-1).result[0], **IGNORED).result[0]["samples"])


def test_the_preset_is_found_where_another_node_made_a_new_latent(
    degrade: Callable[..., Any], refine: Callable[..., Any]
) -> None:
    """By the numbers alone, as the strength: of two presets with one strength the newest counts."""
    for name in ("fast", "balanced", "fast"):
        degraded = degrade(-1, preset=name).result[0]
        flipped = {"samples": degraded["samples"].flip(-1)}
        assert refine(flipped, **IGNORED).ui.as_dict()["text"][0].startswith(f"preset {name}")
    cached = degrade(-1, preset="balanced").result[0]
    degrade(-1, preset="fast")
    assert refine(cached, **IGNORED).ui.as_dict()["text"][0].startswith("preset balanced")  # the latent itself knows


def test_a_batch_of_several_presets_is_refused(degrade: Callable[..., Any], refine: Callable[..., Any]) -> None:
    parts = [degrade(-1, seed, preset=name).result[0] for seed, name in ((1, "fast"), (2, "balanced"))]
    batch = {"samples": torch.cat([part["samples"] for part in parts])}
    with pytest.raises(ValueError, match=r"^FlashVideo Stage II Refiner: .* different presets \(balanced, fast\)"):
        refine(batch, **IGNORED)
    same = [degrade(-1, seed, preset="fast").result[0] for seed in (1, 2)]
    batch = {"samples": torch.cat([part["samples"] for part in same])}
    assert refine(batch, **IGNORED).ui.as_dict()["text"][0].startswith("preset fast")


def test_a_strength_from_elsewhere_has_no_preset(
    degrade: Callable[..., Any], refine: Callable[..., Any], strength_of: Callable[[str], int]
) -> None:
    degraded = degrade(-1, preset="fast").result[0]
    assert refine(degraded, **IGNORED, degraded_strength=strength_of("fast")).ui is None


@pytest.mark.parametrize("name", NAMES)
def test_refiner_settings_take_strength_and_shift_and_show_the_rest(
    name: str,
    comfy_nodes: dict[str, Any],
    other_model: Any,
    text: dict[str, list],
    latent: dict,
    presets: Mapping[str, Any],
    strength_of: Callable[[str], int],
) -> None:
    settings, preset = comfy_nodes["FlashVideoRefinerSettings"], presets[name]

    def sample(ready: Any) -> Tensor:
        choices = {"seed": 2, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
        with torch.inference_mode():
            return comfy_nodes["KSampler"]().sample(model=ready, latent_image=latent, **text, **choices)[0]["samples"]

    chosen = settings.execute(other_model, 900, 7.0, preset=name)
    numbers = f"strength auto from {preset.strength}, shift 2.5. For KSampler: steps {preset.steps}, cfg {preset.cfg:g}"
    assert chosen.ui.as_dict()["text"] == (f"preset {name}: {numbers}",)
    by_hand = settings.execute(other_model, strength_of(name), preset.shift)
    assert by_hand.ui is None
    torch.testing.assert_close(sample(chosen.result[0]), sample(by_hand.result[0]), rtol=0, atol=1e-4)


def test_an_unknown_preset_is_refused(degrade: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="^FlashVideo Latent Degradation: preset must be one of custom, faithful"):
        degrade(-1, preset="best")
