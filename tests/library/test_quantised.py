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
from flashvideo.checkpoints.quantised import FORMATS, Format, relative_error
from flashvideo.commands.main import main
from flashvideo.nano import nano_state

WORST = {"fp8_scaled": 0.027, "int8": 0.01, "mxfp8": 0.028, "nvfp4": 0.1}  # relative error of a layer of Nano
# Of a matrix's bytes in bfloat16, for rows of 64: 4 bytes of scales more in each, and one number for the matrix.
SHARE = {"fp8_scaled": 0.501, "int8": 68 / 128, "mxfp8": 68 / 128, "nvfp4": 36 / 128 + 0.001}
MATRIX = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 64)[:, None]
# A matrix, and what comfy-kitchen, which ComfyUI's quantised layers use, makes of it.
GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden" / "quantised.safetensors"


@pytest.fixture(scope="module")
def stage2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nano's stage II as a file."""
    path = tmp_path_factory.mktemp("model") / "stage2.safetensors"
    save_file(dict(nano_state("stage2")), path)
    return path


def steps(name: str, matrix: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """How far a number may be from the original [out, in], by the format's definition."""
    if name in ("fp8_scaled", "int8"):
        scale = parts["weight_scale"]
        # 4 bits of a number's own size, down to where float8 has no bits left.
        return scale / 2 if name == "int8" else torch.maximum(matrix.abs() / 16, scale * 2**-10)
    blocks = matrix.reshape(matrix.shape[0], -1, {"mxfp8": 32, "nvfp4": 16}[name])
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    if name == "mxfp8":
        bound = torch.maximum(blocks.abs() / 16, largest / 448 * 2 * 2**-10)
    else:
        # The scale of a block is rounded too: to 4 bits, or to a step of the smallest that there are.
        smallest = parts["weight_scale_2"] * 2**-10 * 6
        bound = torch.maximum(largest / 6 * (1 + 1 / 16) + largest / 16, smallest)
    return bound.expand_as(blocks).reshape(matrix.shape)


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_comes_back_to_half_a_step(name: str) -> None:
    form = FORMATS[name]
    parts = form.quantise(MATRIX)
    found = {what: (tensor.dtype, tuple(tensor.shape)) for what, tensor in parts.items()}
    assert found == form.layout((64, 96))
    assert set(form.scales) == set(found) - {"weight"}
    back = form.dequantise(parts)
    assert ((back - MATRIX).abs() <= 1.001 * steps(name, MATRIX, parts)).all()
    assert 0 < relative_error(MATRIX, form, parts) < WORST[name]
    assert back.abs().max() == pytest.approx(MATRIX.abs().max(), rel=0.07)


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_blocks_are_those_of_comfyui(name: str) -> None:
    golden = load_file(GOLDEN)
    parts = FORMATS[name].quantise(golden["matrix"])
    for what, found in parts.items():
        expected = golden[f"{name}.{what}"]
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert bytes(found.flatten().view(torch.uint8)) == bytes(expected.flatten().view(torch.uint8)), what
    stored = {what: golden[f"{name}.{what}"] for what in parts}
    assert torch.equal(FORMATS[name].dequantise(stored), golden[f"{name}.values"].float())


def test_powers_of_two_are_exact() -> None:
    codes = torch.arange(255, dtype=torch.uint8)
    expected = torch.tensor([2.0 ** (code - 127) for code in range(255)])
    assert torch.equal(FORMATS["mxfp8"].scale_values(codes), expected)
    assert not FORMATS["mxfp8"].scale_values(torch.tensor([255], dtype=torch.uint8)).isfinite()


def test_numbers_of_4_bits_are_rounded_to_the_nearest_and_ties_to_the_even_code() -> None:
    row = torch.tensor([6.0, 5.0, 5.01, 4.99, 3.5, 3.49, 2.5, 2.51, 1.75, 1.25, 0.75, 0.74, 0.25, 0.26, -0.25, -5.01])
    matrix = row.repeat(16, 1) * 448  # the whole matrix's scale is then 1, and a block's is 448
    back = FORMATS["nvfp4"].dequantise(FORMATS["nvfp4"].quantise(matrix)) / 448
    expected = [6.0, 4.0, 6.0, 4.0, 4.0, 3.0, 2.0, 3.0, 2.0, 1.0, 1.0, 0.5, 0.0, 0.5, -0.0, -6.0]
    assert torch.equal(back, torch.tensor(expected).repeat(16, 1))


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_tiny_numbers_stay_finite(name: str) -> None:
    for matrix in (torch.zeros(32, 64), torch.full((32, 64), 1e-40), torch.full((32, 64), 3e38)):
        parts = FORMATS[name].quantise(matrix)
        back = FORMATS[name].dequantise(parts)
        assert back.isfinite().all()
        assert torch.allclose(back, matrix, rtol=0.07, atol=1e-36)
        assert relative_error(matrix, FORMATS[name], parts) < 1


@pytest.mark.parametrize("name", FORMATS)
def test_a_converted_file_is_smaller_and_near_the_original(
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
        matrix, parts = original[layer.removeprefix("flashvideo.") + ".weight"], parts_of(small, layer, FORMATS[name])
        assert relative_error(matrix, FORMATS[name], parts) < WORST[name]
        assert sum(tensor.nbytes for tensor in parts.values()) <= SHARE[name] * 2 * matrix.numel()
    with safe_open(target, "pt") as file:
        assert file.metadata()["flashvideo.stage"] == "2"
    assert main(["info", str(target)]) == 0
    said = capsys.readouterr().out
    assert f"{FORMATS[name].core_name} (32 layers)" in said
    assert f"{sum(tensor.numel() for tensor in original.values()):,}" in said


def parts_of(state: dict[str, Tensor], layer: str, form: Format) -> dict[str, Tensor]:
    """What a file holds of a layer's matrix."""
    return {what: state[f"{layer}.{what}"] for what in ("weight", *form.scales)}


def evaluated(model: torch.nn.Module) -> Tensor:
    """A network's answer to one fixed input."""
    make = torch.Generator().manual_seed(1)
    latent, text = torch.randn(1, 16, 3, 8, 12, generator=make), torch.randn(1, 20, 48, generator=make)
    with torch.no_grad():
        return model(latent, torch.tensor([500.0]), text, degradation_step=300)


def test_int8_is_nearest_and_nvfp4_farthest_and_all_load_without_comfyui(stage2: Path, tmp_path: Path) -> None:
    exact, errors = evaluated(load_dit(stage2, dtype=torch.float32)), {}
    for name in FORMATS:
        convert_file(stage2, tmp_path / f"{name}.safetensors", dtype=name)
        model = load_dit(tmp_path / f"{name}.safetensors", dtype=torch.float32, stage=2)
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        errors[name] = float((evaluated(model) - exact).norm() / exact.norm())
        assert {tensor.dtype for tensor in load_dit(tmp_path / f"{name}.safetensors").parameters()} == {torch.bfloat16}
    assert 0 < errors["int8"] < 0.03 < min(errors["fp8_scaled"], errors["mxfp8"])
    assert max(errors["fp8_scaled"], errors["mxfp8"]) < 0.1 < errors["nvfp4"] < 0.3


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
    state[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "convrot_w4a4"}'), dtype=torch.uint8)


def _rotated(state: dict[str, Tensor], layer: str) -> None:
    said = json.dumps({"format": "int8_tensorwise", "convrot": True}).encode()
    state[f"{layer}.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)


def _smoothed(state: dict[str, Tensor], layer: str) -> None:
    state[f"{layer}.pre_quant_scale"] = torch.ones(128)


def _a_number(state: dict[str, Tensor], layer: str) -> None:
    state[f"{layer}.comfy_quant"] = torch.tensor(200, dtype=torch.uint8)


def _no_format(state: dict[str, Tensor], layer: str) -> None:
    del state[f"{layer}.comfy_quant"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_missing_scale, "its weight or its scale is missing"),
        (_other_scale, "its weight_scale has another data type or shape"),
        (_other_type, "its weight has another data type or shape"),
        (_other_shape, "its weight has another data type or shape"),
        (_no_json, "should say a format and is damaged"),
        (_unknown_format, r"in a way that FlashVideo's loaders don't read \(convrot_w4a4\)"),
        (_rotated, r"in a way that FlashVideo's loaders don't read \(int8_tensorwise with convrot\)"),
        (_smoothed, "in a way that FlashVideo's loaders don't read"),
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


def _add_input_scale(state: dict[str, Tensor], layer: str) -> None:
    state[f"{layer}.input_scale"] = torch.tensor(0.5)  # for products in 8 bits: changes no weight


def _name_the_bytes(state: dict[str, Tensor], layer: str) -> None:
    state[f"{layer}.weight_scale"] = state[f"{layer}.weight_scale"].view(torch.float8_e8m0fnu)


def _no_name_for_the_bytes(state: dict[str, Tensor], layer: str) -> None:
    state[f"{layer}.weight_scale"] = state[f"{layer}.weight_scale"].view(torch.uint8)


def _one_in_brackets(state: dict[str, Tensor], layer: str) -> None:
    state[f"{layer}.weight_scale_2"] = state[f"{layer}.weight_scale_2"].reshape(1)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("fp8_scaled", _add_input_scale),
        ("mxfp8", _add_input_scale),
        ("mxfp8", _name_the_bytes),
        ("nvfp4", _add_input_scale),
        ("nvfp4", _no_name_for_the_bytes),
        ("nvfp4", _one_in_brackets),
    ],
)
def test_other_tools_ways_to_say_the_same_are_read(
    name: str, change: Callable[[dict[str, Tensor], str], None], stage2: Path, tmp_path: Path
) -> None:
    convert_file(stage2, tmp_path / "q.safetensors", dtype=name)
    state = load_file(tmp_path / "q.safetensors")
    for key in [key for key in state if key.endswith(".comfy_quant")]:
        change(state, key.removesuffix(".comfy_quant"))
    save_file(state, tmp_path / "other.safetensors")
    first, other = (read_dit(tmp_path / f"{file}.safetensors")[1] for file in ("q", "other"))
    assert first.keys() == other.keys()
    assert all(torch.equal(first[key], other[key]) for key in first)


def test_scales_that_are_no_numbers_are_damage(stage2: Path, tmp_path: Path) -> None:
    for name in ("mxfp8", "nvfp4"):
        convert_file(stage2, tmp_path / f"{name}.safetensors", dtype=name)
        state = load_file(tmp_path / f"{name}.safetensors")
        state["flashvideo.blocks.1.ff_proj.weight_scale"].view(torch.uint8)[3, 2] = 255
        save_file(state, tmp_path / "damaged.safetensors")
        for read in (load_dit, read_dit, read_stored_dit):
            with pytest.raises(CheckpointError, match="not finite"):
                read(tmp_path / "damaged.safetensors")


def test_float8_with_fewer_bits_for_the_fraction_is_read(stage2: Path, tmp_path: Path) -> None:
    convert_file(stage2, tmp_path / "q.safetensors", dtype="fp8_scaled")
    state, expected = load_file(tmp_path / "q.safetensors"), read_dit(tmp_path / "q.safetensors")[1]
    for key in [key for key in state if key.endswith(".comfy_quant")]:
        layer = key.removesuffix(".comfy_quant")
        state[key] = torch.tensor(list(b'{"format": "float8_e5m2"}'), dtype=torch.uint8)
        state[f"{layer}.weight"] = state[f"{layer}.weight"].float().to(torch.float8_e5m2)
        expected[f"{layer.removeprefix('flashvideo.')}.weight"] = (
            state[f"{layer}.weight"].float() * state[f"{layer}.weight_scale"]
        ).bfloat16()
    save_file(state, tmp_path / "e5m2.safetensors")
    found = read_dit(tmp_path / "e5m2.safetensors")[1]
    assert all(torch.equal(found[key], expected[key]) for key in expected)
