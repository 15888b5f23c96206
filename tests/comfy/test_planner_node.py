"""The planner node inside the real ComfyUI."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

QUESTION = {
    "width": 320,
    "height": 180,
    "length": 9,
    "draft_steps": 2,
    "steps": 4,
    "cfg": 13.0,
    "models": "FlashVideo-Nano",
    "precision": "32-bit",
    "memory_budget": 8.0,
    "time_budget": 0.0,
}


def plan(node: Any, **changes: Any) -> tuple[str, torch.Tensor]:
    output = node.execute(**{**QUESTION, **changes})
    assert output.ui.as_dict()["text"] == (output.result[0],)
    return output.result


def loader(kind: str) -> dict[str, Any]:
    """A prompt's node that loads a part of FlashVideo-Nano."""
    if kind == "VAE":
        return {"class_type": "FlashVideoVAELoader", "inputs": {"vae_name": "FlashVideo-Nano (built-in)"}}
    name = f"FlashVideo-Nano {kind} (built-in)"
    return {"class_type": "FlashVideoModelLoader", "inputs": {"model_name": name, "weight_dtype": "default"}}


def rows(report: str) -> dict[str, list[str]]:
    """Each phase's cells: tokens, operations, memory, time."""
    table = report.split("\n\n")[1].splitlines()[1:]
    return {line[:14].strip(): line[14:].split(maxsplit=2) for line in table}


def test_plan_is_text_and_a_picture(comfy_nodes: dict) -> None:
    report, picture = plan(comfy_nodes["FlashVideoPlanner"])
    for phase in ("text", "stage I", "draft decode", "VAE encode", "stage II", "VAE decode"):
        assert f"\n{phase} " in report
    assert "This is within a budget of 8 GiB." in report
    assert picture.dtype == torch.float32
    assert picture.ndim == 4 and picture.shape[0] == 1 and picture.shape[3] == 3
    assert 0 <= picture.min() < 0.2 and 0.5 < picture.max() <= 1


def test_runs_alone_in_a_graph(run_prompt: Any) -> None:
    outputs, _ = run_prompt({"1": {"class_type": "FlashVideoPlanner", "inputs": QUESTION}})
    assert "FlashVideo plan: 320x180, 9 frames" in outputs["1"]["text"][0]


def test_plans_for_what_is_connected(comfy_nodes: dict, run_prompt: Any) -> None:
    prompt = {
        "1": loader("Stage I"),
        "2": loader("Stage II"),
        "3": loader("VAE"),
        "4": {
            "class_type": "FlashVideoPlanner",
            "inputs": {
                **QUESTION,
                "models": "FlashVideo",
                "draft_model": ["1", 0],
                "refiner_model": ["2", 0],
                "vae": ["3", 0],
            },
        },
    }
    (connected,) = run_prompt(prompt)[0]["4"]["text"]
    nano, _ = plan(comfy_nodes["FlashVideoPlanner"])
    official, _ = plan(comfy_nodes["FlashVideoPlanner"], models="FlashVideo")
    assert "connected models" in connected
    for phase in ("stage I", "draft decode", "VAE encode", "stage II", "VAE decode"):
        assert rows(connected)[phase][:2] == rows(nano)[phase][:2] != rows(official)[phase][:2]
    assert rows(connected)["text"][:2] == rows(official)["text"][:2]  # no text encoder can be connected


def test_plans_for_the_tiles_of_a_connected_refiner(comfy_nodes: dict, run_prompt: Any) -> None:
    inputs = {**QUESTION, "width": 640, "height": 360, "refiner_model": ["2", 0]}
    prompt = {
        "1": loader("Stage II"),
        "2": {"class_type": "FlashVideoSpatialTiles", "inputs": {"model": ["1", 0], "tile": 256}},
        "3": {"class_type": "FlashVideoFastAttention", "inputs": {"model": ["2", 0], "attention": "wide view"}},
        "4": {"class_type": "FlashVideoPlanner", "inputs": inputs},
        "5": {"class_type": "FlashVideoPlanner", "inputs": {**inputs, "refiner_model": ["3", 0]}},
        "6": {"class_type": "FlashVideoPlanner", "inputs": {**inputs, "refiner_model": ["1", 0]}},
    }
    outputs, _ = run_prompt(prompt)
    tiled, behind, whole = (outputs[node]["text"][0] for node in "456")
    assert rows(tiled)["stage II"][0] == rows(behind)["stage II"][0] == str(226 + 3 * 32 * 32)
    assert "stage II sees tiles of 256 pixels" in tiled
    assert rows(whole)["stage II"][0] == f"{226 + 3 * 46 * 80}"


def test_refuses_the_wrong_model(run_prompt: Any) -> None:
    planner = {"class_type": "FlashVideoPlanner", "inputs": {**QUESTION, "refiner_model": ["1", 0]}}
    with pytest.raises(run_prompt.Failed) as failure:
        run_prompt({"1": loader("Stage I"), "2": planner})
    assert failure.value.message.startswith("FlashVideo Planner: model must be FlashVideo stage II (the refiner)")


def test_an_impossible_budget_is_answered(comfy_nodes: dict) -> None:
    report, _ = plan(comfy_nodes["FlashVideoPlanner"], memory_budget=0.5, models="FlashVideo", width=1920, height=1080)
    assert "This is beyond a budget of 0.5 GiB." in report
    assert "No setting is: even 540p (960x540), 1 frame" in report


def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def test_text_operations_are_those_of_comfyui(pack: ModuleType) -> None:
    library = f"{pack.__name__}.flashvideo.planner"
    planner, flops = (importlib.import_module(name) for name in (library, f"{library}.flops"))
    clip = importlib.import_module(f"{pack.__name__}.nodes.native.clip").load_clip_native(None)
    tokens = clip.tokenize("a red boat on a lake")
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the counter doesn't know it
    with FlopCounterMode(display=False, custom_mapping={attention: attention_flops}) as counter:
        clip.encode_from_tokens(tokens)
    predicted = flops.t5_flops(planner.NANO.text).total
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.1)
