"""Strength auto: the number that suits the size, the same whichever way the graph is wired, and shown."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from draws import normal
from torch import Tensor

AUTO = -1
HEIGHT, WIDTH = 48, 64  # pixels


@pytest.fixture(scope="module")
def chosen(submodule: Callable[[str], ModuleType]) -> int:
    """The strength for the latents below."""
    return submodule("flashvideo.degradation").auto_strength(HEIGHT, WIDTH)


@pytest.fixture()
def latent() -> dict[str, Tensor]:
    """A LATENT of HEIGHT x WIDTH pixels, nine frames."""
    return {"samples": normal(1, 16, 3, HEIGHT // 8, WIDTH // 8, seed=1)}


@pytest.fixture()
def settings(comfy_nodes: dict[str, Any], other_model: Any) -> Callable[[int], Any]:
    """A refiner with a strength, by Refiner Settings."""
    return lambda strength: comfy_nodes["FlashVideoRefinerSettings"].execute(other_model, strength, 2.5).result[0]


@pytest.fixture()
def sample(comfy_nodes: dict[str, Any], text: dict[str, list]) -> Callable[..., Tensor]:
    """KSampler (Advanced) on a MODEL."""

    def run(model: Any, latent: dict[str, Any], sampler: str = "euler", **changes: Any) -> Tensor:
        choices = {"add_noise": "enable", "noise_seed": 7, "steps": 4, "cfg": 3.0, "scheduler": "simple"}
        choices |= {"start_at_step": 0, "end_at_step": 10000, "return_with_leftover_noise": "disable"}
        inputs = {"sampler_name": sampler, "latent_image": latent, **text, **choices, **changes}
        with torch.inference_mode():
            return comfy_nodes["KSamplerAdvanced"]().sample(model, **inputs)[0]["samples"]

    return run


def test_latent_degradation_tells_the_strength_it_chose(
    comfy_nodes: dict[str, Any], latent: dict[str, Tensor], chosen: int, caplog: pytest.LogCaptureFixture
) -> None:
    node = comfy_nodes["FlashVideoLatentDegradation"]
    with caplog.at_level(logging.INFO):
        automatic = node.execute(latent, AUTO, 3)
    by_hand = node.execute(latent, chosen, 3)
    assert 0 < chosen < 200
    assert torch.equal(automatic.result[0]["samples"], by_hand.result[0]["samples"])
    assert automatic.ui.as_dict()["text"] == (f"strength {chosen} (auto)",)
    assert f"FlashVideo Latent Degradation: strength {chosen} (auto)" in caplog.text
    assert by_hand.ui is None


@pytest.mark.parametrize("part", ["vae", "footage_vae"])
@pytest.mark.parametrize("preset", ["custom", "rich"])
def test_a_latent_of_nanos_gets_nanos_strength(
    part: str,
    preset: str,
    comfy_nodes: dict[str, Any],
    submodule: Callable[[str], ModuleType],
    latent: dict[str, Tensor],
    chosen: int,
) -> None:
    """Also where another node has flipped it; what isn't known to be Nano's gets the number of its size."""
    nano = submodule("flashvideo.config").NANO_STRENGTH
    degrade = comfy_nodes["FlashVideoLatentDegradation"].execute
    vae = submodule("nodes.native.vae").load_vae_native(part)
    pixels = torch.rand((9, HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        (encoded,) = comfy_nodes["VAEEncode"]().encode(vae, pixels)
    for own in (encoded, {"samples": encoded["samples"].flip(-1)}):
        automatic = degrade(own, AUTO, 3, preset)
        assert torch.equal(automatic.result[0]["samples"], degrade(own, nano, 3).result[0]["samples"])
        shown = f"strength {nano} (auto)" if preset == "custom" else f"preset rich: strength {nano}"
        assert automatic.ui.as_dict()["text"] == (shown,)
    assert degrade(encoded, 300, 3).ui is None
    changed = degrade({"samples": encoded["samples"] + 1}, AUTO, 3)
    assert changed.ui.as_dict()["text"] == (f"strength {chosen} (auto)",)


def test_a_latent_stays_nanos_however_often_it_is_used(
    comfy_nodes: dict[str, Any], submodule: Callable[[str], ModuleType]
) -> None:
    """ComfyUI keeps what a node has made: another seed runs the nodes after VAE Encode alone."""
    nano = submodule("flashvideo.config").NANO_STRENGTH
    pixels = torch.rand((1, 16, 32, 3), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        (encoded,) = comfy_nodes["VAEEncode"]().encode(submodule("nodes.native.vae").load_vae_native("vae"), pixels)
    for seed in range(100):
        run = comfy_nodes["FlashVideoLatentDegradation"].execute(encoded, AUTO, seed)
        assert run.ui.as_dict()["text"] == (f"strength {nano} (auto)",)


def test_refiner_settings_give_nano_its_own_strength_and_show_it(
    comfy_nodes: dict[str, Any],
    model: Any,
    submodule: Callable[[str], ModuleType],
    sample: Callable[..., Tensor],
    latent: dict[str, Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the log, when the sampler starts; a preset's on the node, too. A degraded latent brings its own."""
    nano = submodule("flashvideo.config").NANO_STRENGTH
    settings = comfy_nodes["FlashVideoRefinerSettings"].execute
    automatic, rich, by_hand = (
        settings(model, AUTO, 2.5),
        settings(model, 7, 9, preset="rich"),
        settings(model, nano, 2.5),
    )
    expected = sample(by_hand.result[0], latent)
    for chosen in (automatic, rich):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            torch.testing.assert_close(sample(chosen.result[0], latent), expected, rtol=0, atol=1e-4)
        assert f"strength {nano} (auto, for FlashVideo-Nano)" in caplog.text
    assert rich.ui.as_dict()["text"] == (f"preset rich: strength {nano}, shift 2.5. For KSampler: steps 6, cfg 13",)
    assert automatic.ui is None and by_hand.ui is None
    degraded = comfy_nodes["FlashVideoLatentDegradation"].execute(latent, 500, 3).result[0]
    ready = (settings(model, strength, 2.5).result[0] for strength in (AUTO, 500))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        followed, typed = (sample(each, degraded, add_noise="disable") for each in ready)
    assert "strength 500 (auto, the latent's)" in caplog.text
    torch.testing.assert_close(followed, typed, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m"])
def test_a_stock_sampler_with_auto_does_what_it_does_with_that_number(
    settings: Callable[[int], Any], sample: Callable[..., Tensor], latent: dict, chosen: int, sampler: str
) -> None:
    automatic, by_hand = (sample(settings(strength), latent, sampler) for strength in (AUTO, chosen))
    torch.testing.assert_close(automatic, by_hand, rtol=0, atol=1e-4)
    assert (automatic - sample(settings(675), latent, sampler)).abs().mean() > 0.1


def test_auto_goes_on_in_a_second_sampler(
    settings: Callable[[int], Any], sample: Callable[..., Tensor], latent: dict
) -> None:
    model = settings(AUTO)
    first = sample(model, latent, end_at_step=2, return_with_leftover_noise="enable")
    second = sample(model, {"samples": first}, add_noise="disable", start_at_step=2)
    torch.testing.assert_close(second, sample(model, latent), rtol=0, atol=1e-4)


def test_noise_that_another_node_adds_is_that_of_the_chosen_strength(
    comfy_nodes: dict[str, Any], settings: Callable[[int], Any], latent: dict, chosen: int
) -> None:
    def noised(model: Any) -> Tensor:
        sigmas = comfy_nodes["BasicScheduler"].execute(model, "simple", 4, 0.5).result[0]
        noise = comfy_nodes["RandomNoise"].execute(5).result[0]
        return comfy_nodes["AddNoise"].execute(model, noise, sigmas, latent).result[0]["samples"]

    torch.testing.assert_close(noised(settings(AUTO)), noised(settings(chosen)), rtol=0, atol=1e-5)


def test_a_degraded_latent_brings_its_own_strength(
    comfy_nodes: dict[str, Any], settings: Callable[[int], Any], sample: Callable[..., Tensor], latent: dict
) -> None:
    degraded = comfy_nodes["FlashVideoLatentDegradation"].execute(latent, 500, 3).result[0]
    automatic, by_hand = (sample(settings(strength), degraded, add_noise="disable") for strength in (AUTO, 500))
    torch.testing.assert_close(automatic, by_hand, rtol=0, atol=1e-4)


def test_the_guiders_model_is_its_own_again(
    comfy_nodes: dict[str, Any], settings: Callable[[int], Any], text: dict[str, list], latent: dict
) -> None:
    model = settings(AUTO)
    guider = comfy_nodes["CFGGuider"].execute(model, text["positive"], text["negative"], 3.0).result[0]
    before = guider.model_patcher
    sigmas = comfy_nodes["BasicScheduler"].execute(model, "simple", 2, 1.0).result[0]
    sampler, noise = (
        comfy_nodes[name].execute(value).result[0] for name, value in (("KSamplerSelect", "euler"), ("RandomNoise", 5))
    )
    runs = []
    for latents in (latent, {"samples": normal(1, 16, 3, 8, 8, seed=2)}, latent):  # another size in between
        with torch.inference_mode():
            run = comfy_nodes["SamplerCustomAdvanced"].execute(noise, guider, sampler, sigmas, latents)
        runs.append(run.result[0]["samples"])
        assert guider.model_patcher is before
    assert torch.equal(runs[0], runs[2])
