"""The two-stage graph: loaded once, the same on every run, stopped by Cancel, shown in progress and previews."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_graphs import text_to_video

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"


@pytest.fixture()
def loads(submodule: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read from disk or built while a test ran; the real readers still run. Nothing is loaded at first."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    seen: list[str] = []

    def count(module: str, name: str) -> None:
        target = submodule(module)
        real = getattr(target, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(target, name, counted)

    count("nodes.models", "load_model")
    count("nodes.text", "load_clip_native")
    count("nodes.vae", "load_vae_native")
    return seen


def test_text_to_refined_video(run_prompt: Any, captured: dict[str, Any]) -> None:
    run_prompt(text_to_video())
    frames = captured["refined"]
    assert frames.shape == (5, 64, 128, 3)
    assert frames.min() >= 0 and frames.max() <= 1 and torch.isfinite(frames).all()


def test_another_seed_loads_nothing_again(run_prompt: Any, captured: dict[str, Any], loads: list[str]) -> None:
    run_prompt(text_to_video())
    first = captured["draft"]["samples"].clone()
    assert sorted(loads) == ["load_clip_native", "load_model", "load_model", "load_vae_native"]
    run_prompt(text_to_video(stage1__seed=2))
    assert len(loads) == 4
    assert not torch.equal(captured["draft"]["samples"], first)


def test_two_graphs_in_turn_share_their_models(run_prompt: Any, captured: dict[str, Any], loads: list[str]) -> None:
    """A second graph with loaders of its own, under other ids, reads nothing; nor does the first one afterwards."""
    other = {f"other-{node}": entry for node, entry in text_to_video(stage1__steps=3).items()}
    for entry in other.values():
        for name, value in entry["inputs"].items():
            if isinstance(value, list):
                entry["inputs"][name] = [f"other-{value[0]}", value[1]]
    run_prompt(text_to_video())
    run_prompt(other)
    run_prompt(text_to_video(stage1__seed=9))
    assert sorted(loads) == ["load_clip_native", "load_model", "load_model", "load_vae_native"]


def test_two_loaders_of_one_file_give_one_model(
    run_prompt: Any, captured: dict[str, Any], comfy_base: Path, loads: list[str]
) -> None:
    folder = comfy_base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(load_file(GOLDEN / "dit_stage2_weights.safetensors"), folder / "golden_stage2.safetensors")
    load = {"model_name": "golden_stage2.safetensors", "weight_dtype": "default"}
    graph: dict[str, Any] = {}
    for name in ("a", "b"):
        graph[f"load-{name}"] = {"class_type": "FlashVideoModelLoader", "inputs": dict(load)}
        settings = {"model": [f"load-{name}", 0], "strength": 650 if name == "a" else 700, "shift": 2.5}
        graph[f"settings-{name}"] = {"class_type": "FlashVideoRefinerSettings", "inputs": settings}
        graph[name] = {"class_type": "TestCapture", "inputs": {"value": [f"settings-{name}", 0], "name": name}}
    run_prompt(graph)
    assert loads == ["load_model"]
    assert captured["a"].model is captured["b"].model
    assert captured["a"].get_model_object("model_sampling").degradation_step == 650
    assert captured["b"].get_model_object("model_sampling").degradation_step == 700


def test_progress_moves_in_every_phase_and_previews_arrive(
    run_prompt: Any, captured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Auto)
    # Newer versions set what a prompt asks for, or else this.
    monkeypatch.setattr(latent_preview, "default_preview_method", LatentPreviewMethod.Auto, raising=False)
    _, events = run_prompt(text_to_video(empty__length=17))
    progress: dict[str, list[tuple[float, float]]] = {}
    previews = set()
    for name, data in events:
        if name == "progress":
            progress.setdefault(data["node"], []).append((data["value"], data["max"]))
            if data["preview"] is not None:
                previews.add(data["node"])
    assert set(progress) >= {"text", "stage1", "decode1", "encode", "stage2", "decode2"}
    for node, moves in progress.items():
        assert moves[-1][0] == moves[-1][1], f"{node} ends at {moves[-1]}"
        assert moves == sorted(moves), f"{node} runs backwards"
    assert previews >= {"stage1", "stage2"}


@pytest.mark.parametrize("node", ["stage1", "decode1", "encode", "stage2", "decode2"])
def test_cancel_answers_within_a_step_and_the_next_run_works(
    run_prompt: Any, captured: dict[str, Any], monkeypatch: pytest.MonkeyPatch, node: str
) -> None:
    """Cancel arrives while a node is at its first step or chunk; no second one may end."""
    import comfy.utils

    import nodes

    moves: list[str] = []

    def cancelling(value: float, total: float, preview: object, *rest: Any, **named: Any) -> None:
        at = run_prompt.server.last_node_id
        if at == node:
            moves.append(at)
            if len(moves) == 1:
                nodes.interrupt_processing(True)
        run_prompt.progress_hook(value, total, preview, *rest, **named)

    comfy.utils.set_progress_bar_global_hook(cancelling)
    graph = text_to_video(empty__length=33)
    with pytest.raises(run_prompt.Failed, match="interrupted"):
        run_prompt(graph)
    assert len(moves) == 1
    comfy.utils.set_progress_bar_global_hook(run_prompt.progress_hook)
    run_prompt(graph)
    assert captured["refined"].shape[0] == 33
