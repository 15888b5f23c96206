"""Quantised stages in ComfyUI: its own quantised layers where it has them, plain ones elsewhere, the same pictures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import pytest
import torch
from distances import distance
from torch import Tensor

# Relative error of a stage II that has run four steps; and of one whose layers also round what flows through them.
ALLOWED = {"fp8_scaled": 0.12, "int8": 0.06, "mxfp8": 0.12, "nvfp4": 0.3}
PLAIN = {"fp8_scaled": 0.03, "int8": 0.03, "mxfp8": 0.03, "nvfp4": 0.1}  # of a matrix
CORE_NAMES = {"fp8_scaled": "float8_e4m3fn", "int8": "int8_tensorwise", "mxfp8": "mxfp8", "nvfp4": "nvfp4"}


@pytest.fixture(autouse=True)
def as_in_a_run() -> Iterator[None]:
    """ComfyUI runs nodes in inference mode, and loads models there."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def files(submodule: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Nano's stage II as it is, and quantised."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("quantised")
    paths = {name: folder / f"{name}.safetensors" for name in ("keep", *ALLOWED)}
    state = {name: tensor.contiguous() for name, tensor in submodule("flashvideo.nano").nano_state("stage2").items()}
    save_file(state, folder / "stage2.safetensors")
    for name, path in paths.items():
        submodule("flashvideo.checkpoints.convert").convert_file(folder / "stage2.safetensors", path, dtype=name)
    return paths


def keeps(name: str) -> bool:
    """Whether this ComfyUI has quantised layers of that format."""
    options = inspect.signature(comfy.ops.mixed_precision_ops).parameters
    return "quant_config" in options and CORE_NAMES[name] in comfy.ops.QUANT_ALGOS


@pytest.mark.parametrize("name", ALLOWED)
def test_a_quantised_stage_refines_as_the_original_does(
    name: str, files: dict[str, Path], refined: Callable[[Any], Tensor], submodule: Callable[[str], ModuleType]
) -> None:
    load_model = submodule("nodes.native.model").load_model
    exact, model = refined(load_model(files["keep"])), load_model(files[name])
    assert 0 < distance(refined(model), exact) < ALLOWED[name]
    layer = model.model.diffusion_model.blocks[0].ff_proj
    assert hasattr(layer, "layout_type") == keeps(name)
    size = comfy.model_management.module_size(model.model)
    whole = comfy.model_management.module_size(load_model(files["keep"], torch.bfloat16).model)
    assert (size < 0.75 * whole) == keeps(name)


@pytest.mark.parametrize("name", ALLOWED)
def test_a_weight_dtype_makes_plain_layers_of_them(
    name: str, files: dict[str, Path], submodule: Callable[[str], ModuleType]
) -> None:
    model = submodule("nodes.native.model").load_model(files[name], torch.float32)
    original = submodule("flashvideo.nano").nano_state("stage2")
    for key, weight in model.model.diffusion_model.state_dict().items():
        assert weight.dtype == torch.float32
        assert distance(weight, original[key].float()) < PLAIN[name]


@pytest.mark.parametrize("name", ALLOWED)
def test_comfyuis_layers_hold_the_numbers_of_the_file(
    name: str, files: dict[str, Path], refined: Callable[[Any], Tensor], submodule: Callable[[str], ModuleType]
) -> None:
    load_model = submodule("nodes.native.model").load_model
    model, plain = load_model(files[name]), load_model(files[name], torch.bfloat16)
    layers = dict(model.model.diffusion_model.named_modules())
    expected = dict(submodule("flashvideo.checkpoints.reading").open_checkpoint(files[name]).full_tensors())
    for layer in submodule("flashvideo.checkpoints.reading").open_checkpoint(files[name]).layers:
        weight = layers[layer].weight
        weight = weight.dequantize() if keeps(name) else weight
        assert torch.equal(weight.bfloat16(), expected[f"{layer}.weight"])
    assert distance(refined(model), refined(plain)) < 0.02  # they round to bfloat16 in another order


@pytest.mark.parametrize("name", ALLOWED)
def test_a_lora_goes_on_top(
    name: str, files: dict[str, Path], refined: Callable[[Any], Tensor], submodule: Callable[[str], ModuleType]
) -> None:
    load_model = submodule("nodes.native.model").load_model
    key = "diffusion_model.blocks.1.ff_proj.weight"
    make = torch.Generator().manual_seed(4)
    size = 0.5 if name == "nvfp4" else 0.2  # what 4 bits get wrong is nearly as much as 0.2 changes
    change = size * torch.randn(512, 128, generator=make)

    def changed(path: Path) -> Any:
        model = load_model(path)
        assert model.add_patches({key: ("diff", (change,))}, 1.0) == [key]
        return model

    plain, exact = refined(load_model(files["keep"])), refined(changed(files["keep"]))
    found = refined(changed(files[name]))
    assert distance(found, exact) < ALLOWED[name] < distance(plain, exact)


@pytest.mark.parametrize("name", ALLOWED)
def test_a_quantised_model_is_saved_and_loaded_again(
    name: str,
    files: dict[str, Path],
    refined: Callable[[Any], Tensor],
    submodule: Callable[[str], ModuleType],
    tmp_path: Path,
) -> None:
    load_model = submodule("nodes.native.model").load_model
    model = load_model(files[name])
    first = refined(model)
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), model)
    assert distance(refined(load_model(tmp_path / "saved.safetensors")), first) < 0.01
