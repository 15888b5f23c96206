"""Quantised weights: what `convert` makes, what the loaders read, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashvideo.checkpoints import CheckpointError, load_dit, open_checkpoint, read_dit, read_stored_dit
from flashvideo.checkpoints.convert import convert_file
from flashvideo.checkpoints.quantised import FORMATS, dequantise, relative_error
from flashvideo.commands.main import main
from flashvideo.nano import nano_state

WORST = {"fp8_scaled": 0.027, "int8": 0.01}  # relative error of a layer of Nano
MATRIX = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 24)[:, None]


@pytest.fixture(scope="module")
def stage2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nano's stage II as a file."""
    path = tmp_path_factory.mktemp("model") / "stage2.safetensors"
    save_file(dict(nano_state("stage2")), path)
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_comes_back_to_half_a_step(name: str) -> None:
    form = FORMATS[name]
    weight, scale = form.quantise(MATRIX)
    assert weight.dtype == form.dtype and scale.dtype == torch.float32
    assert tuple(scale.shape) == form.scale_shape(24)
    back = dequantise(weight, scale)
    if form.by_row:  # every row of its own size
        assert ((back - MATRIX).abs() <= 0.501 * scale).all()
        assert relative_error(MATRIX, weight, scale) < 0.01
    else:
        fine = MATRIX.abs() > scale * 2**-6  # below it, float8 has no bits left
        assert ((back - MATRIX).abs()[fine] <= MATRIX.abs()[fine] / 16 * 1.001).all()
    assert back.abs().max() == pytest.approx(MATRIX.abs().max(), rel=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_tiny_numbers_stay_finite(name: str) -> None:
    for matrix in (torch.zeros(3, 4), torch.full((3, 4), 1e-40), torch.full((3, 4), 3e38)):
        weight, scale = FORMATS[name].quantise(matrix)
        back = dequantise(weight, scale)
        assert back.isfinite().all()
        assert torch.allclose(back, matrix, rtol=0.07, atol=1e-36)
        assert relative_error(matrix, weight, scale) < 1


@pytest.mark.parametrize("name", FORMATS)
def test_a_converted_file_is_half_as_large_and_near_the_original(
    name: str, stage2: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target = tmp_path / "small.safetensors"
    assert main(["convert", str(stage2), str(target), "--to", name.replace("_", "-")]) == 0
    said = capsys.readouterr().out
    assert "error of the quantised weights" in said and "ff_out" in said
    original, small = load_file(stage2), load_file(target)
    layers = [key.removesuffix(".comfy_quant") for key in small if key.endswith(".comfy_quant")]
    assert len(layers) == 4 * 8
    for layer in layers:
        assert json.loads(bytes(small[f"{layer}.comfy_quant"].tolist())) == {"format": FORMATS[name].core_name}
        matrix = original[layer.removeprefix("flashvideo.") + ".weight"]
        assert relative_error(matrix, small[f"{layer}.weight"], small[f"{layer}.weight_scale"]) < WORST[name]
    with safe_open(target, "pt") as file:
        assert file.metadata()["flashvideo.stage"] == "2"
    assert main(["info", str(target)]) == 0
    said = capsys.readouterr().out
    assert f"{FORMATS[name].core_name} (32 layers)" in said
    assert f"{sum(tensor.numel() for tensor in original.values()):,}" in said


def evaluated(model: torch.nn.Module) -> Tensor:
    """A network's answer to one fixed input."""
    make = torch.Generator().manual_seed(1)
    latent, text = torch.randn(1, 16, 3, 8, 12, generator=make), torch.randn(1, 20, 48, generator=make)
    with torch.no_grad():
        return model(latent, torch.tensor([500.0]), text, degradation_step=300)


def test_int8_is_nearer_than_scaled_fp8_and_both_load_without_comfyui(stage2: Path, tmp_path: Path) -> None:
    exact, errors = evaluated(load_dit(stage2, dtype=torch.float32)), {}
    for name in FORMATS:
        convert_file(stage2, tmp_path / f"{name}.safetensors", dtype=name)
        model = load_dit(tmp_path / f"{name}.safetensors", dtype=torch.float32, stage=2)
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        errors[name] = float((evaluated(model) - exact).norm() / exact.norm())
        assert {tensor.dtype for tensor in load_dit(tmp_path / f"{name}.safetensors").parameters()} == {torch.bfloat16}
    assert 0 < errors["int8"] < 0.03 < errors["fp8_scaled"] < 0.1


def test_quantised_layers_are_read_as_they_are_for_comfyui(stage2: Path, tmp_path: Path) -> None:
    convert_file(stage2, tmp_path / "q.safetensors", dtype="int8")
    stored = read_stored_dit(tmp_path / "q.safetensors")
    config, state, layers = stored.config, stored.state, stored.layers
    assert config == read_dit(stage2)[0]
    assert {layer.rpartition(".")[2] for layer in layers} == {"q", "k", "v", "attn_out", "ff_proj", "ff_out", "linear"}
    assert all(state[f"{layer}.weight"].dtype == torch.int8 for layer in layers)
    assert read_stored_dit(stage2).layers == {}


def test_a_quantised_file_and_the_vae_are_not_quantised(stage2: Path, tmp_path: Path) -> None:
    convert_file(stage2, tmp_path / "q.safetensors", dtype="int8")
    with pytest.raises(CheckpointError, match="is quantised already"):
        convert_file(tmp_path / "q.safetensors", tmp_path / "again.safetensors", dtype="fp8_scaled")
    save_file(dict(nano_state("vae")), tmp_path / "vae.safetensors", metadata=nano_state("vae").metadata)
    for name in (*FORMATS, "fp8_e4m3fn"):
        with pytest.raises(CheckpointError, match="the VAE loses too much in 8 bits"):
            convert_file(tmp_path / "vae.safetensors", tmp_path / "small.safetensors", dtype=name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.safetensors", "vae.safetensors"]


def _missing_scale(state: dict[str, Tensor], layer: str) -> None:
    del state[f"{layer}.weight_scale"]


def _other_scale(state: dict[str, Tensor], layer: str) -> None:
    state[f"{layer}.weight_scale"] = torch.ones(7, 1)


def _other_type(state: dict[str, Tensor], layer: str) -> None:
    state[f"{layer}.weight"] = state[f"{layer}.weight"].float()


def _other_shape(state: dict[str, Tensor], layer: str) -> None:
    state[f"{layer}.weight"] = state[f"{layer}.weight"][:, :-1].contiguous()


def _no_json(state: dict[str, Tensor], layer: str) -> None:
    state[f"{layer}.comfy_quant"] = torch.tensor(list(b"{{{{"), dtype=torch.uint8)


def _unknown_format(state: dict[str, Tensor], layer: str) -> None:
    state[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)


def _rotated(state: dict[str, Tensor], layer: str) -> None:
    said = json.dumps({"format": "int8_tensorwise", "convrot": True}).encode()
    state[f"{layer}.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)


def _a_number(state: dict[str, Tensor], layer: str) -> None:
    state[f"{layer}.comfy_quant"] = torch.tensor(200, dtype=torch.uint8)


def _no_format(state: dict[str, Tensor], layer: str) -> None:
    del state[f"{layer}.comfy_quant"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_missing_scale, "its weight or its scale is missing"),
        (_other_scale, "its weight or scale isn't"),
        (_other_type, "its weight or scale isn't"),
        (_other_shape, "of a wrong shape"),
        (_no_json, "should say a format and is damaged"),
        (_unknown_format, "in a way that FlashVideo's loaders don't read"),
        (_rotated, "in a way that FlashVideo's loaders don't read"),
        (_a_number, "in a way that FlashVideo's loaders don't read"),
        (_no_format, "in a way that FlashVideo's loaders don't read"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    stage2: Path, tmp_path: Path, damage: Callable[[dict[str, Tensor], str], None], words: str
) -> None:
    convert_file(stage2, tmp_path / "q.safetensors", dtype="int8")
    state = load_file(tmp_path / "q.safetensors")
    damage(state, "flashvideo.blocks.1.ff_proj")
    save_file(state, tmp_path / "damaged.safetensors")
    for read in (load_dit, read_dit, read_stored_dit):
        with pytest.raises(CheckpointError, match=words):
            read(tmp_path / "damaged.safetensors")
    assert open_checkpoint(tmp_path / "damaged.safetensors").quantised
