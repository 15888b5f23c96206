"""A latent is degraded exactly once, whatever ComfyUI's own nodes make of it on the way to the sampler."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from draws import normal
from torch import Tensor

STRENGTH, OTHER = 675, 500
Wire = list[Any]


def smooth(*shape: int, seed: int) -> Tensor:
    """Numbers whose neighbours resemble each other, as in the latent of a picture."""
    coarse = normal(*shape[:-2], 3, 3, seed=seed)
    return torch.nn.functional.interpolate(coarse, (shape[2], *shape[-2:]), mode="trilinear")


class Rebuild:
    """What many packs do to a LATENT: a new dictionary around copied samples, in another data type if asked."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "make", "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """ComfyUI's declaration of inputs."""
        return {"required": {"samples": ("LATENT",), "dtype": ("STRING", {"default": "float32"})}}

    def make(self, samples: dict[str, Any], dtype: str) -> tuple[dict[str, Tensor]]:
        """The same numbers, as far as the data type holds them."""
        return ({"samples": samples["samples"].to(getattr(torch, dtype)).clone()},)


class Enlarge(Rebuild):
    """A nearest-neighbour upscale: every number of the degraded latent is still there, but its noise is coarse."""

    def make(self, samples: dict[str, Any], dtype: str = "float32") -> tuple[dict[str, Tensor]]:
        """Twice as wide and high."""
        large = samples["samples"].repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
        return ({**samples, "samples": large.to(getattr(torch, dtype))},)


@pytest.fixture()
def graph(comfy_nodes: dict[str, Any], values: dict[str, Any], model: Any, text: dict[str, list]) -> dict[str, Any]:
    """Two videos, degraded, and the refiner set up for KSampler with the same strength; nodes by name."""
    comfy_nodes["TestRebuild"] = Rebuild
    values.update(model=model, positive=text["positive"], negative=text["negative"])
    values.update(clean={"samples": smooth(2, 16, 2, 4, 6, seed=1)})
    nodes = {name: {"class_type": "TestValue", "inputs": {"name": name}} for name in values}
    degrade = {"latent": ["clean", 0], "strength": STRENGTH, "seed": 5}
    nodes["degraded"] = {"class_type": "FlashVideoLatentDegradation", "inputs": degrade}
    settings = {"model": ["model", 0], "strength": STRENGTH, "shift": 2.5}
    nodes["settings"] = {"class_type": "FlashVideoRefinerSettings", "inputs": settings}
    return nodes


@pytest.fixture()
def refine(graph: dict[str, Any], run_prompt: Callable, captured: dict[str, Any]) -> Callable[..., Tensor]:
    """The Stage II Refiner at the end of a wire."""

    def run(wire: Wire, **changes: Any) -> Tensor:
        inputs = {"model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0], "latent": wire}
        inputs |= {"steps": 1, "cfg": 1.0, "shift": 2.5, "solver": "euler", **changes}
        graph["refined"] = {"class_type": "FlashVideoStage2Refiner", "inputs": inputs}
        graph["end"] = {"class_type": "TestCapture", "inputs": {"value": ["refined", 0], "name": "refined"}}
        run_prompt(graph)
        return captured["refined"]["samples"]

    return run


@pytest.fixture()
def sample(graph: dict[str, Any], run_prompt: Callable, captured: dict[str, Any]) -> Callable[..., Tensor]:
    """KSampler (Advanced) at the end of a wire."""

    def run(wire: Wire, add_noise: str) -> Tensor:
        inputs = {"model": ["settings", 0], "positive": ["positive", 0], "negative": ["negative", 0]}
        inputs |= {"latent_image": wire, "add_noise": add_noise, "noise_seed": 5, "steps": 1, "cfg": 1.0}
        inputs |= {"sampler_name": "euler", "scheduler": "simple", "start_at_step": 0, "end_at_step": 10000}
        inputs |= {"return_with_leftover_noise": "disable"}
        graph["sampled"] = {"class_type": "KSamplerAdvanced", "inputs": inputs}
        graph["end"] = {"class_type": "TestCapture", "inputs": {"value": ["sampled", 0], "name": "sampled"}}
        run_prompt(graph)
        return captured["sampled"]["samples"]

    return run


def behind(graph: dict[str, Any], kind: str, **inputs: Any) -> Wire:
    """A node behind the degraded latent."""
    graph["between"] = {"class_type": kind, "inputs": inputs}
    return ["between", 0]


KEEPING = {
    "from batch": ("LatentFromBatch", {"samples": ["degraded", 0], "batch_index": 1, "length": 1}),
    "repeat": ("RepeatLatentBatch", {"samples": ["degraded", 0], "amount": 2}),
    "flip": ("LatentFlip", {"samples": ["degraded", 0], "flip_method": "y-axis: horizontally"}),
    "rebatch": ("RebatchLatents", {"latents": ["degraded", 0], "batch_size": 1}),
    "batch": ("LatentBatch", {"samples1": ["degraded", 0], "samples2": ["degraded", 0]}),
    "rebuilt": ("TestRebuild", {"samples": ["degraded", 0], "dtype": "float32"}),
    "half": ("TestRebuild", {"samples": ["degraded", 0], "dtype": "float16"}),
    "brain": ("TestRebuild", {"samples": ["degraded", 0], "dtype": "bfloat16"}),
}


@pytest.mark.parametrize("way", KEEPING)
def test_a_degraded_latent_is_known_behind_stock_nodes(
    way: str, graph: dict[str, Any], refine: Callable, sample: Callable, run_prompt: Any
) -> None:
    wire = behind(graph, KEEPING[way][0], **KEEPING[way][1])
    assert torch.isfinite(refine(wire)).all()
    with pytest.raises(run_prompt.Failed, match="would be degraded twice"):
        sample(wire, "enable")
    assert torch.isfinite(sample(wire, "disable")).all()


def test_what_is_behind_a_stock_node_is_refined_as_before_it(graph: dict[str, Any], refine: Callable) -> None:
    alone = refine(["degraded", 0])
    wire = behind(graph, "LatentFromBatch", samples=["degraded", 0], batch_index=1, length=1)
    torch.testing.assert_close(refine(wire), alone[1:], rtol=0, atol=1e-4)  # float32, in another batch


def save_and_load(graph: dict[str, Any], run_prompt: Any, base: Path) -> Wire:
    """Save Latent, and a wire from Load Latent."""
    save = {"samples": ["degraded", 0], "filename_prefix": "degraded"}
    run_prompt({**graph, "saved": {"class_type": "SaveLatent", "inputs": save}})
    (file,) = (base / "output").glob("degraded_*.latent")
    shutil.move(file, base / "input" / "degraded.latent")
    return behind(graph, "LoadLatent", latent="degraded.latent")


def test_a_saved_and_loaded_latent(
    graph: dict[str, Any],
    refine: Callable,
    sample: Callable,
    run_prompt: Any,
    comfy_base: Path,
    submodule: Callable[[str], ModuleType],
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = refine(["degraded", 0])
    wire = save_and_load(graph, run_prompt, comfy_base)
    assert torch.equal(refine(wire), before)
    with pytest.raises(run_prompt.Failed, match="would be degraded twice"):
        sample(wire, "enable")

    # In a ComfyUI that was started anew nothing is known of it.
    submodule("nodes.native.degradation")._remembered.clear()
    graph.pop("degraded")
    run_prompt.forget()
    with pytest.raises(run_prompt.Failed, match=r"never degraded.*isn't known here, for example after Load Latent"):
        refine(wire)
    with pytest.raises(run_prompt.Failed, match=r"never degraded.*isn't known here, for example after Load Latent"):
        sample(wire, "disable")
    assert torch.equal(refine(wire, degraded_strength=STRENGTH), before)
    assert not torch.equal(refine(wire, degraded_strength=OTHER), before)
    assert "looks like noise" not in caplog.text
    sample(wire, "enable")  # what the user said held for that run
    assert "looks like noise" in caplog.text


def test_a_clean_latent_does_not_look_like_noise(sample: Callable, caplog: pytest.LogCaptureFixture) -> None:
    sample(["clean", 0], "enable")
    assert "looks like noise" not in caplog.text


def test_a_strength_that_contradicts_the_latent_is_refused(refine: Callable, run_prompt: Any) -> None:
    message = f"degraded with strength {STRENGTH}, and degraded_strength says {OTHER}"
    with pytest.raises(run_prompt.Failed, match=message):
        refine(["degraded", 0], degraded_strength=OTHER)


@pytest.mark.parametrize(("second", "message"), [("clean", "only a part of this latent"), ("other", "500, 675")])
def test_a_batch_of_unlike_latents_is_refused(
    second: str, message: str, graph: dict[str, Any], refine: Callable, sample: Callable, run_prompt: Any
) -> None:
    other = {"latent": ["clean", 0], "strength": OTHER, "seed": 6}
    graph["other"] = {"class_type": "FlashVideoLatentDegradation", "inputs": other}
    for pair in (["degraded", second], [second, "degraded"]):
        wire = behind(graph, "LatentBatch", samples1=[pair[0], 0], samples2=[pair[1], 0])
        for run, how in ((refine, ()), (sample, ("enable",)), (sample, ("disable",))):
            with pytest.raises(run_prompt.Failed, match=message):
                run(wire, *how)


CHANGING = {
    "enlarged": ("TestEnlarge", {"samples": ["degraded", 0], "dtype": "float32"}),
    "weakened": ("LatentMultiply", {"samples": ["degraded", 0], "multiplier": 0.9}),
}


@pytest.mark.parametrize("kind", CHANGING)
def test_what_was_changed_since_is_not_taken_for_degraded(
    kind: str, graph: dict[str, Any], comfy_nodes: dict[str, Any], refine: Callable, run_prompt: Any
) -> None:
    comfy_nodes["TestEnlarge"] = Enlarge
    wire = behind(graph, CHANGING[kind][0], **CHANGING[kind][1])
    with pytest.raises(run_prompt.Failed, match="another node .* has changed this latent"):
        refine(wire)


def test_a_refined_latent_may_be_degraded_again(graph: dict[str, Any], refine: Callable) -> None:
    first = refine(["degraded", 0])
    graph["first"] = graph["refined"]
    again = {"latent": ["first", 0], "strength": OTHER, "seed": 6}
    graph["again"] = {"class_type": "FlashVideoLatentDegradation", "inputs": again}
    assert not torch.equal(refine(["again", 0]), first)
