"""GGUF files in ComfyUI: weights stay packed in memory, LoRAs go on top, memory management and saving work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.sd
import pytest
import torch
from distances import distance
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("gguf", reason="the package gguf, which writes such files, isn't installed")

NEAR = {"gguf_q4_0": 0.35, "gguf_q8_0": 0.03}  # relative error of a stage II that has run four steps
KEY = "diffusion_model.blocks.1.ff_proj.weight"


@pytest.fixture(autouse=True)
def as_in_a_run() -> Iterator[None]:
    """ComfyUI runs nodes in inference mode, and loads models there."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def files(submodule: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Nano's stage II as it is, and packed."""
    folder = tmp_path_factory.mktemp("gguf")
    save_file(dict(submodule("flashvideo.nano").nano_state("stage2")), folder / "stage2.safetensors")
    paths = {"keep": folder / "stage2.safetensors", **{name: folder / f"{name}.gguf" for name in NEAR}}
    for name in NEAR:
        submodule("flashvideo.checkpoints.convert").convert_file(paths["keep"], paths[name], dtype=name)
    return paths


@pytest.fixture(scope="module")
def load(submodule: Callable[[str], ModuleType]) -> Callable[..., Any]:
    """Load a file as a MODEL."""
    return submodule("nodes.native.model").load_model


def with_change(model: Any, strength: float = 1.0) -> Any:
    """A clone with a LoRA's like: a change of one matrix."""
    change = 0.2 * torch.randn(512, 128, generator=torch.Generator().manual_seed(4))
    clone = model.clone()
    assert clone.add_patches({KEY: ("diff", (change,))}, strength) == [KEY]
    return clone


def packed(model: Any) -> set[bool]:
    """Whether the blocks' matrices are bytes."""
    return {block.ff_proj.weight.dtype == torch.uint8 for block in model.model.diffusion_model.blocks}


@pytest.mark.parametrize("name", NEAR)
def test_a_packed_stage_refines_as_the_original_does(name: str, files: dict, load: Callable, refined: Callable) -> None:
    exact, model = refined(load(files["keep"])), load(files[name])
    assert 0 < distance(refined(model), exact) < NEAR[name]
    assert packed(model) == {True}
    whole = comfy.model_management.module_size(load(files["keep"], torch.bfloat16).model)
    assert comfy.model_management.module_size(model.model) < 0.8 * whole


def test_the_packed_network_computes_what_its_plain_weights_do(
    files: dict, load: Callable, refined: Callable, submodule: Callable
) -> None:
    config_and_state = submodule("flashvideo.checkpoints").read_dit(files["gguf_q8_0"])
    plain = load(config_and_state[1], torch.float32)
    assert distance(refined(load(files["gguf_q8_0"])), refined(plain)) < 0.01  # plain ones were rounded to bfloat16


def test_a_weight_dtype_makes_plain_layers_of_them(files: dict, load: Callable) -> None:
    model = load(files["gguf_q8_0"], torch.float32)
    assert {weight.dtype for weight in model.model.diffusion_model.state_dict().values()} == {torch.float32}


def test_a_lora_goes_on_top_and_comes_off_again(files: dict, load: Callable, refined: Callable) -> None:
    keep, model = load(files["keep"]), load(files["gguf_q8_0"])
    without, with_it = refined(keep), refined(with_change(keep))
    plain = refined(model)
    assert distance(with_it, without) > 2 * NEAR["gguf_q8_0"]
    for _ in range(2):
        assert distance(refined(with_change(model)), with_it) < NEAR["gguf_q8_0"]
        assert packed(model) == {True}
        assert torch.equal(refined(model), plain)
    twice = with_change(with_change(model, 0.5), 0.5)
    assert distance(refined(twice), with_it) < NEAR["gguf_q8_0"]


def test_a_lora_counts_once_when_a_part_of_the_model_is_unloaded(
    files: dict, load: Callable, refined: Callable
) -> None:
    model = with_change(load(files["gguf_q8_0"]))
    whole = refined(model)
    device = torch.device("cpu")
    comfy.model_management.load_models_gpu([model])
    freed = model.partially_unload(device, 200_000)
    assert freed > 200_000
    layer = model.model.diffusion_model.blocks[1].ff_proj
    assert len(layer.weight_function) == 1
    model.partially_load(device, 1e9)
    assert len(layer.weight_function) == 1
    assert torch.equal(refined(model), whole)
    model.unpatch_model(device)
    assert layer.weight_function == [] and packed(model) == {True}


@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_model_has_plain_weights(
    lora: bool, files: dict, load: Callable, refined: Callable, tmp_path: Path
) -> None:
    model = load(files["gguf_q8_0"])
    model = with_change(model) if lora else model
    first = refined(model)
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), model)
    saved = load_file(tmp_path / "saved.safetensors")
    assert {tensor.dtype for name, tensor in saved.items() if ".ff_proj.weight" in name} == {torch.bfloat16}
    assert not any("gguf" in name for name in saved)
    assert distance(refined(load(tmp_path / "saved.safetensors")), first) < 0.02
    assert torch.equal(refined(model), first) or distance(refined(model), first) < 0.02


def test_a_merge_takes_the_plain_weights(comfy_nodes: dict, files: dict, load: Callable, refined: Callable) -> None:
    other = with_change(load(files["keep"]))
    merged = comfy_nodes["ModelMergeSimple"]().merge(load(files["keep"]), load(files["gguf_q8_0"]), 0.0)[0]
    assert distance(refined(merged), refined(load(files["keep"]))) < NEAR["gguf_q8_0"]
    half = comfy_nodes["ModelMergeSimple"]().merge(load(files["gguf_q8_0"]), other, 0.0)[0]
    assert distance(refined(half), refined(other)) < NEAR["gguf_q8_0"]


@pytest.fixture()
def text_file(submodule: Callable[[str], ModuleType], tmp_path: Path) -> Path:
    """Nano's text encoder as GGUF, by its usual names."""
    import gguf

    state = submodule("flashvideo.nano").nano_state("text_encoder")
    path = tmp_path / "t5.gguf"
    writer, kind = gguf.GGUFWriter(path, "t5encoder"), gguf.GGMLQuantizationType.Q8_0
    for name, tensor in state.items():
        matrix = tensor.float().contiguous().numpy()
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(matrix, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_packed_text_encoder_reads_prompts_and_is_saved(
    text_file: Path, submodule: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    load_clip = submodule("nodes.native.clip").load_clip_native

    def encoded(clip: Any) -> Tensor:
        return clip.encode_from_tokens(clip.tokenize("a red ball rolls to the left"))

    exact, clip = encoded(load_clip(None)), load_clip(text_file)
    found = encoded(clip)
    assert 0 < distance(found, exact) < 0.05
    kinds = {name.rpartition(".")[2] for name in clip.cond_stage_model.state_dict()}
    assert "gguf_type" in kinds
    save_file({name: each.contiguous() for name, each in clip.get_sd().items()}, tmp_path / "saved.safetensors")
    assert torch.equal(encoded(load_clip(tmp_path / "saved.safetensors")), found)


def test_a_hooked_lora_changes_a_packed_text_encoder_as_a_loaded_one_does(
    text_file: Path, comfy_nodes: dict[str, Any], submodule: Callable[[str], ModuleType]
) -> None:
    clip = submodule("nodes.native.clip").load_clip_native(text_file)

    def encoded(clip: Any) -> Tensor:
        return comfy_nodes["CLIPTextEncode"]().encode(clip, "a red ball rolls to the left")[0][0][0]

    key = next(key for key, module in clip.cond_stage_model.named_modules() if getattr(module, "packing", None))
    rows = clip.cond_stage_model.get_submodule(key)
    change = torch.randn(rows.out_features, rows.in_features, generator=torch.Generator().manual_seed(4))
    lora = {f"text_encoders.{key}.diff": change}
    plain = encoded(clip)
    _, loaded = comfy.sd.load_lora_for_models(None, clip, lora, 0.0, 1.0)
    expected = encoded(loaded)
    assert distance(expected, plain) > 0.01
    hooked = comfy_nodes["SetClipHooks"]().apply_hooks(
        clip, False, False, comfy.hooks.create_hook_lora(lora, 0.0, 1.0)
    )[0]
    assert distance(encoded(hooked), expected) < 1e-5
    assert torch.equal(encoded(clip), plain)


def test_the_loaders_offer_gguf_files(
    our_nodes: dict[str, Any], model_folder: Callable[[str], Path], files: dict[str, Path]
) -> None:
    folder = model_folder("diffusion_models")
    (folder / "mine.gguf").write_bytes(files["gguf_q8_0"].read_bytes())
    node = our_nodes["FlashVideoModelLoader"]
    offered = next(each for each in node.define_schema().inputs if each.id == "model_name").options
    assert offered.count("mine.gguf") == 1
    assert node.validate_inputs("mine.gguf") is True
    assert packed(node.execute("mine.gguf", "default").result[0]) == {True}
