"""Load FlashVideo VAE: which files, one VAE of one file, a budget, and what is said of Nano's."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

BUILT_IN = "FlashVideo-Nano (built-in)"
FOR_FOOTAGE = "FlashVideo-Nano for real footage (built-in)"
LOADER = {"class_type": "FlashVideoVAELoader", "inputs": {"vae_name": BUILT_IN}}


def test_the_built_in_vae_is_the_default_and_files_follow(comfy_nodes: dict, vae_folder: Path) -> None:
    (vae_folder / "3d-vae.pt").write_bytes(b"x")
    choices, more = comfy_nodes["FlashVideoVAELoader"].INPUT_TYPES()["required"]["vae_name"]
    assert (more.get("options") or choices) == [BUILT_IN, FOR_FOOTAGE, "3d-vae.pt"]
    assert more["default"] == BUILT_IN


def test_a_budget_is_an_option_and_makes_a_vae_of_its_own(
    comfy_nodes: dict, run_prompt: Callable, captured: dict
) -> None:
    choices, more = comfy_nodes["FlashVideoVAELoader"].INPUT_TYPES()["optional"]["memory_budget"]
    assert (more.get("options") or choices)[0] == more["default"] == "auto"
    small = {**LOADER, "inputs": {**LOADER["inputs"], "memory_budget": "4 GB"}}
    graph = {"a": LOADER, "b": small}
    graph |= {
        f"end {name}": {"class_type": "TestCapture", "inputs": {"value": [name, 0], "name": name}} for name in "ab"
    }
    run_prompt(graph)
    assert captured["a"].first_stage_model.budget is None
    assert captured["b"].first_stage_model.budget == 4 * 2**30
    shape = (1, 16, 13, 136, 240)
    assert captured["a"].memory_used_decode(shape, torch.float16) > captured["b"].memory_used_decode(
        shape, torch.float16
    )


def test_every_input_and_output_is_explained(comfy_nodes: dict) -> None:
    schema = comfy_nodes["FlashVideoVAELoader"].GET_SCHEMA()
    assert (schema.display_name, schema.category) == ("Load FlashVideo VAE", "FlashVideo")
    assert all(str(port.tooltip).endswith(".") for port in [*schema.inputs, *schema.outputs])


@pytest.mark.parametrize("trained", [True, False])
def test_loading_says_if_the_built_in_vae_is_untrained_and_nothing_misleading(
    run_prompt: Callable, submodule: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    trained: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(submodule("nodes.native.files"), "nano_is_trained", lambda: trained)
    end = {"class_type": "TestCapture", "inputs": {"value": ["1", 0], "name": "vae"}}
    outputs, _ = run_prompt({"1": LOADER, "2": end})
    said = [text for output in outputs.values() for text in output.get("text", ())]
    assert [text.split(":")[0] for text in said] == ([] if trained else ["FlashVideo-Nano is untrained"])
    assert ("FlashVideo-Nano is untrained" in caplog.text) is not trained
    assert "VAE not initalized" not in caplog.text


def test_two_loaders_give_one_vae_and_nothing_keeps_it(run_prompt: Callable, captured: dict) -> None:
    graph = {"a": LOADER, "b": LOADER}
    graph |= {
        f"end {name}": {"class_type": "TestCapture", "inputs": {"value": [name, 0], "name": name}} for name in "ab"
    }
    run_prompt(graph)
    assert captured["a"] is captured["b"]
    vae = weakref.ref(captured["a"])
    captured.clear()
    run_prompt({"1": {"class_type": "TestCapture", "inputs": {"value": ["2", 0], "name": "x"}}, "2": _EMPTY_LATENT})
    gc.collect()
    assert vae() is None


def test_the_networks_for_real_footage_are_others(run_prompt: Callable, captured: dict, submodule: Callable) -> None:
    config = submodule("flashvideo.config")
    footage = {"class_type": "FlashVideoVAELoader", "inputs": {"vae_name": FOR_FOOTAGE}}
    stage2 = {
        "class_type": "FlashVideoModelLoader",
        "inputs": {"model_name": "FlashVideo-Nano Stage II for real footage (built-in)", "weight_dtype": "default"},
    }
    graph = {"scenes": LOADER, "footage": footage, "again": footage, "stage2": stage2}
    ends = {
        f"end {name}": {"class_type": "TestCapture", "inputs": {"value": [name, 0], "name": name}} for name in graph
    }
    run_prompt(graph | ends)
    assert captured["scenes"].first_stage_model.config == config.NANO_VAE
    assert captured["footage"].first_stage_model.config == config.NANO_FOOTAGE_VAE
    assert captured["again"] is captured["footage"]
    assert captured["stage2"].model.diffusion_model.config == config.NANO_FOOTAGE_STAGE2
    preview = submodule("flashvideo.nano").nano_preview
    colours = captured["stage2"].model.latent_format.latent_rgb_factors_bias
    assert colours == preview(config.NANO_FOOTAGE_STAGE2)[-1].tolist() != preview(config.NANO_STAGE2)[-1].tolist()


_EMPTY_LATENT = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}


def test_a_replaced_file_is_read_again(submodule: Callable, vae_folder: Path) -> None:
    files, native = submodule("nodes.native.files"), submodule("nodes.native.vae")
    state = submodule("flashvideo.nano").nano_state("vae")
    path = vae_folder / "nano.safetensors"
    save_file(state, path)
    first = files.shared(path, lambda: native.load_vae_native(path))
    assert files.shared(path, lambda: native.load_vae_native(path)) is first
    assert first.get_sd().keys() == state.keys()
    save_file({name: tensor * 2 for name, tensor in state.items()}, path)
    second = files.shared(path, lambda: native.load_vae_native(path))
    name = "decoder.conv_in.conv.weight"
    assert torch.equal(second.get_sd()[name], 2 * first.get_sd()[name])
    assert torch.equal(first.get_sd()[name], state[name].float())


def test_norm_groups_come_from_the_file(submodule: Callable, vae_folder: Path) -> None:
    """Nano's widths divide by 16, which a file means that doesn't say 4."""
    native, state = submodule("nodes.native.vae"), submodule("flashvideo.nano").nano_state("vae")
    for groups, metadata in ((16, {}), (4, {"flashvideo.norm_groups": "4"})):
        save_file(dict(state), vae_folder / f"groups{groups}.safetensors", metadata)
        vae = native.load_vae_native(vae_folder / f"groups{groups}.safetensors")
        assert vae.first_stage_model.config.norm_groups == groups


def test_the_vae_runs_in_float32_on_the_cpu(vae: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert vae.vae_dtype == torch.float32
    assert all(record.levelno < logging.WARNING for record in caplog.get_records("setup"))
