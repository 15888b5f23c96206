"""LoRAs that ComfyUI's hooks add while a run goes on, also on packed and quantised weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from distances import distance
from safetensors.torch import save_file
from small_graphs import NANO_STAGE1, text_to_video
from torch import Tensor

FILES = {"default": None, "int8": "int8.safetensors", "gguf_q8_0": "q8_0.gguf"}
ROUNDED = {"default": 1e-5, "int8": 0.06, "gguf_q8_0": 0.03}


@pytest.fixture(scope="module")
def folder(comfy_base: Path, submodule: Callable[[str], ModuleType]) -> Iterator[Path]:
    """Stage I in each format among ComfyUI's models, and a LoRA for it."""
    models = comfy_base / "models"
    places = [models / "diffusion_models", models / "loras"]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    written = [places[0] / "plain.safetensors", places[1] / "hooked.safetensors"]
    save_file(dict(submodule("flashvideo.nano").nano_state("stage1")), written[0])
    for kind, name in FILES.items():
        if name is not None:
            written.append(places[0] / name)
            submodule("flashvideo.checkpoints.convert").convert_file(written[0], written[-1], dtype=kind)
    make, lora = torch.Generator().manual_seed(5), {}
    for layer in ("blocks.0.q", "blocks.3.attn_out", "blocks.5.ff_proj"):
        rows = 512 if layer.endswith("ff_proj") else 128
        lora[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(4, 128, generator=make)
        lora[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(rows, 4, generator=make)
    save_file(lora, written[1])
    yield models
    for path in written:
        path.unlink()


def graph(kind: str) -> dict[str, Any]:
    """Stage I alone, with the file of that format."""
    made = text_to_video(stage1__cfg=1.0, stage1__dynamic_cfg=False)
    for node in ("refined", "finish"):
        del made[node]
    made["model1"]["inputs"]["model_name"] = FILES[kind] or NANO_STAGE1
    return made


def hooked(made: dict[str, Any], strengths: dict[float, float] | None = None) -> dict[str, Any]:
    """The LoRA by hooks on both texts; `strengths` by the part of the run where each begins."""
    made["hook"] = node("CreateHookLoraModelOnly", lora_name="hooked.safetensors", strength_model=1.0)
    last: list[Any] = ["hook", 0]
    if strengths is not None:
        before: dict[str, Any] = {}
        for number, (begin, strength) in enumerate(strengths.items()):
            made[f"key{number}"] = node("CreateHookKeyframe", strength_mult=strength, start_percent=begin, **before)
            before = {"prev_hook_kf": [f"key{number}", 0]}
        made["keys"] = node("SetHookKeyframes", hooks=last, **{"hook_kf": before["prev_hook_kf"]})
        last = ["keys", 0]
    texts = {"positive_NEW": ["text", 0], "negative_NEW": ["text", 1]}
    made["with"] = node("PairConditioningSetProperties", strength=1.0, set_cond_area="default", hooks=last, **texts)
    made["stage1"]["inputs"] |= {"positive": ["with", 0], "negative": ["with", 1]}
    return made


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """A node in ComfyUI's API format."""
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture()
def refuses(submodule: Callable[[str], ModuleType], folder: Path) -> Callable[[str], bool]:
    """Whether ComfyUI's own quantised layers hold a file's weights, which hooks can't change."""
    load_model, host = submodule("nodes.native.model").load_model, submodule("nodes.native.host")

    def ask(kind: str) -> bool:
        return FILES[kind] is not None and host.holds_quantised(load_model(folder / "diffusion_models" / FILES[kind]))

    return ask


@pytest.mark.parametrize("kind", FILES)
def test_a_hooked_lora_does_what_a_loaded_one_does_and_leaves_nothing(
    kind: str, folder: Path, refuses: Callable[[str], bool], run_prompt: Any, captured: dict[str, Any]
) -> None:
    if refuses(kind):
        with pytest.raises(
            run_prompt.Failed, match="the positive prompt has a LoRA on a hook, .* GGUF file, or use Load"
        ):
            run_prompt(hooked(graph(kind)))
        return

    def draft(made: dict[str, Any]) -> Tensor:
        run_prompt(made)
        return captured["draft"]["samples"].clone()

    loaded = graph(kind)
    loaded["lora"] = node(
        "LoraLoaderModelOnly", model=["model1", 0], lora_name="hooked.safetensors", strength_model=1.0
    )
    loaded["stage1"]["inputs"]["model"] = ["lora", 0]
    plain, expected = draft(graph(kind)), draft(loaded)
    assert distance(expected, plain) > 2 * ROUNDED[kind]
    assert distance(draft(hooked(graph(kind))), expected) <= ROUNDED[kind]
    assert torch.equal(draft(graph(kind)), plain)
    assert torch.equal(draft(hooked(graph(kind), {0.0: 0.0})), plain)


@pytest.mark.parametrize("kind", FILES)
def test_a_hooked_lora_can_begin_in_the_middle_and_end(
    kind: str, folder: Path, refuses: Callable[[str], bool], run_prompt: Any, captured: dict[str, Any]
) -> None:
    if refuses(kind):
        pytest.skip("hooks are refused with ComfyUI's quantised layers")

    def draft(made: dict[str, Any]) -> Tensor:
        run_prompt(made)
        return captured["draft"]["samples"].clone()

    plain, whole = draft(graph(kind)), draft(hooked(graph(kind)))
    late = draft(hooked(graph(kind), {0.0: 0.0, 0.5: 1.0}))
    early = draft(hooked(graph(kind), {0.0: 1.0, 0.5: 0.0}))
    for part in (late, early):
        assert min(distance(part, plain), distance(part, whole)) > 2 * ROUNDED[kind]
    assert distance(late, early) > 2 * ROUNDED[kind]
    assert torch.equal(draft(hooked(graph(kind), {0.0: 1.0, 0.5: 1.0})), whole)
    assert torch.equal(draft(graph(kind)), plain)
