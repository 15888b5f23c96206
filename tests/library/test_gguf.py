"""GGUF files: what `convert` writes, what the loaders read, and what they refuse."""

from __future__ import annotations

import builtins
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashvideo.checkpoints import CheckpointError, load_dit, open_checkpoint, read_dit, read_stored_dit
from flashvideo.checkpoints.convert import convert_file
from flashvideo.checkpoints.convert_text_encoder import convert_text_encoder
from flashvideo.checkpoints.gguf_writing import WRITTEN
from flashvideo.checkpoints.packed import PACKINGS, Packing
from flashvideo.checkpoints.text_encoder import open_text_encoder, t5_config
from flashvideo.checkpoints.weights import open_weights
from flashvideo.commands.main import main
from flashvideo.config import T5Config
from flashvideo.nano import nano_state
from flashvideo.t5 import t5_shapes

gguf = pytest.importorskip("gguf", reason="the package gguf, which writes such files, isn't installed")

WORST = {"gguf_q4_0": 0.11, "gguf_q4_1": 0.10, "gguf_q5_0": 0.055, "gguf_q5_1": 0.05, "gguf_q8_0": 0.008}


def random_packed(packing: Packing, rows: int, columns: int) -> np.ndarray:
    """Packed rows of any bits, whose factors are ordinary numbers."""
    make = np.random.default_rng(packing.number)
    blocks = make.integers(0, 256, (rows * columns // packing.numbers, packing.nbytes), dtype=np.uint8)
    start, end = packing.halves
    factors = make.standard_normal((len(blocks), (end - start) // 2)).astype(np.float16)
    blocks[:, start:end] = factors.view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.fixture(scope="module")
def stage2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nano's stage II as a file."""
    path = tmp_path_factory.mktemp("model") / "stage2.safetensors"
    save_file(dict(nano_state("stage2")), path)
    return path


@pytest.fixture(scope="module")
def q8(stage2: Path) -> Path:
    """The same as GGUF."""
    path = stage2.with_name("stage2.gguf")
    convert_file(stage2, path, dtype="gguf_q8_0")
    return path


def write(path: Path, tensors: dict[str, Any], architecture: str = "flashvideo", **facts: str) -> Path:
    """A GGUF file by the package: arrays as they are, or (bytes, packing)."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, text in facts.items():
        writer.add_string(name, text)
    for name, content in tensors.items():
        if isinstance(content, tuple):
            writer.add_tensor(name, content[0], raw_dtype=gguf.GGMLQuantizationType(content[1].number))
        else:
            writer.add_tensor(name, content)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=lambda packing: packing.name)
def test_every_packing_is_unpacked_as_the_package_does(packing: Packing) -> None:
    kind = gguf.GGMLQuantizationType[packing.name]
    assert (kind.value, gguf.GGML_QUANT_SIZES[kind]) == (packing.number, (packing.numbers, packing.nbytes))
    packed = random_packed(packing, 6, 512)
    assert packed.shape[1] == packing.row_bytes(512) and packing.columns(packed.shape[1]) == 512
    found = packing.unpack(torch.from_numpy(packed))
    assert torch.equal(found, torch.from_numpy(gguf.quants.dequantize(packed, kind)))
    assert packing.unpack(torch.from_numpy(packed), torch.bfloat16).dtype == torch.bfloat16
    assert packing.is_finite(torch.from_numpy(packed))
    start, end = packing.halves
    for at in range(start, end, 2):
        broken = packed.copy()
        broken[3, at : at + 2] = np.array([np.nan], dtype=np.float16).view(np.uint8)
        assert not packing.is_finite(torch.from_numpy(broken))
    with pytest.raises(ValueError, match=packing.name):
        packing.row_bytes(packing.numbers + 1)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_converted_file_is_small_and_near_the_original(
    name: str, stage2: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target = tmp_path / "small.gguf"
    assert main(["convert", str(stage2), str(target), "--to", name.replace("_", "-")]) == 0
    said = capsys.readouterr().out
    assert "error of the quantised weights" in said and "ff_out" in said
    original = load_file(stage2)
    by_package = gguf.GGUFReader(target)
    packed = [tensor for tensor in by_package.tensors if tensor.tensor_type.name == WRITTEN[name].name]
    assert len(packed) == 4 * 8
    for tensor in packed:
        matrix = original[tensor.name.removeprefix("flashvideo.")]
        back = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert 0 < (back - matrix).norm() / matrix.norm() < WORST[name]
    assert by_package.get_field("general.architecture").contents() == "flashvideo"
    assert main(["info", str(target)]) == 0
    said = capsys.readouterr().out
    assert f"{WRITTEN[name].name} (32 layers)" in said and "FlashVideo stage II" in said
    assert f"{sum(tensor.numel() for tensor in original.values()):,}" in said
    config, state = read_dit(target)
    assert config == read_dit(stage2)[0]
    for key, tensor in original.items():
        assert state[key].shape == tensor.shape
        assert (state[key].float() - tensor).norm() <= WORST[name] * tensor.norm()


def test_a_gguf_file_computes_as_the_original_without_comfyui(stage2: Path, q8: Path) -> None:
    make = torch.Generator().manual_seed(1)
    latent, text = torch.randn(1, 16, 3, 8, 12, generator=make), torch.randn(1, 20, 48, generator=make)
    with torch.no_grad():
        exact, found = (
            load_dit(path, dtype=torch.float32)(latent, torch.tensor([500.0]), text, degradation_step=300)
            for path in (stage2, q8)
        )
    assert 0 < (found - exact).norm() / exact.norm() < 0.02
    assert {weight.dtype for weight in load_dit(q8, stage=2).parameters()} == {torch.bfloat16}


def test_matrices_stay_packed_for_comfyui(stage2: Path, q8: Path) -> None:
    stored = read_stored_dit(q8)
    assert stored.layers == {} and set(stored.packings.values()) == {WRITTEN["gguf_q8_0"]}
    plain = read_dit(q8)[1]
    for name, packing in stored.packings.items():
        assert stored.state[name].dtype == torch.uint8
        assert torch.equal(packing.unpack(stored.state[name], torch.bfloat16), plain[name])
    assert read_stored_dit(stage2).packings == {}


def test_a_gguf_file_becomes_a_plain_one_again(q8: Path, tmp_path: Path) -> None:
    convert_file(q8, tmp_path / "plain.safetensors", dtype="bf16")
    expected = read_dit(q8)[1]
    for name, tensor in read_dit(tmp_path / "plain.safetensors")[1].items():
        assert torch.equal(tensor, expected[name].bfloat16())


def test_fused_matrices_of_other_layouts_are_taken_apart_while_packed(stage2: Path, tmp_path: Path) -> None:
    golden = Path(__file__).resolve().parents[1] / "data" / "golden" / "dit_stage2_weights.safetensors"
    original, tensors = load_file(golden), {}
    for name, tensor in original.items():
        matrix = tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and "lora" not in name
        packing = WRITTEN["gguf_q8_0"]
        kind = gguf.GGMLQuantizationType.Q8_0
        tensors[name] = (gguf.quants.quantize(tensor.numpy(), kind), packing) if matrix else tensor.numpy()
    path = write(tmp_path / "official.gguf", tensors)
    stored, plain, exact = read_stored_dit(path), read_dit(path)[1], read_dit(golden)[1]
    assert any(name.endswith("ff_proj.weight") for name in stored.packings)
    for name, packing in stored.packings.items():
        assert torch.equal(packing.unpack(stored.state[name], torch.bfloat16), plain[name])
    for name, tensor in exact.items():
        assert (plain[name].float() - tensor.float()).norm() <= 0.02 * tensor.float().norm() + 1e-6


LLAMA_CPPS_NAMES = {
    "shared.weight": "token_embd.weight",
    "encoder.final_layer_norm.weight": "enc.output_norm.weight",
    "SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.layer_norm": "attn_norm",
    "layer.1.layer_norm": "ffn_norm",
    "DenseReluDense.wi_0": "ffn_gate",
    "DenseReluDense.wi_1": "ffn_up",
    "DenseReluDense.wo": "ffn_down",
    **{f"SelfAttention.{part}.": f"attn_{part}." for part in "qkvo"},
    "layer.0.": "",
    "layer.1.": "",
    "encoder.block.": "enc.blk.",
}


def llama_cpps_name(name: str) -> str:
    """How llama.cpp's converter names a tensor of T5's encoder."""
    for usual, other in LLAMA_CPPS_NAMES.items():
        name = name.replace(usual, other)
    return name


@pytest.fixture()
def text_encoder() -> dict[str, Tensor]:
    """A T5 of 2 blocks whose every matrix can be packed, in the 16 bits of the official file."""
    config = T5Config(num_layers=2, d_model=64, d_kv=16, num_heads=4, d_ff=128)
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator).half() for name, shape in t5_shapes(config).items()}


def test_the_text_encoder_is_read_by_llama_cpps_names(tmp_path: Path, text_encoder: dict[str, Tensor]) -> None:
    tensors = {}
    for name, tensor in text_encoder.items():
        matrix = tensor.float().numpy()
        packs = tensor.ndim == 2 and tensor.shape[1] % 32 == 0
        if packs:
            matrix = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q8_0), WRITTEN["gguf_q8_0"]
        tensors[llama_cpps_name(name)] = matrix
    weights = open_text_encoder(write(tmp_path / "t5.gguf", tensors, "t5encoder"))
    assert t5_config(weights) == t5_config(open_text_encoder(text_encoder))
    assert weights.packings
    for name, shape in weights.shapes.items():
        expected = text_encoder[name].float()
        assert tuple(weights.read(name).shape) == shape == tuple(expected.shape)
        assert (weights.read(name).float() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize(("name", "error"), [("gguf_q8_0", 0.01), ("gguf_q4_0", 0.12)])
def test_a_text_encoder_is_packed_for_other_loaders_too(
    name: str, error: float, tmp_path: Path, text_encoder: dict[str, Tensor]
) -> None:
    source, target, errors = tmp_path / "t5.safetensors", tmp_path / "t5.gguf", {}
    twice = {"encoder.embed_tokens.weight": text_encoder["shared.weight"].clone()}  # as ComfyUI's own file has it
    save_file(text_encoder | twice, source)
    config = convert_text_encoder(source, target, dtype=name, on_error=errors.__setitem__)
    file = gguf.GGUFReader(target)
    assert file.fields["general.architecture"].contents() == "t5encoder"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in file.tensors}
    matrices = {each for each in text_encoder if text_encoder[each].ndim == 2 and ".layer." in each}
    packed = {llama_cpps_name(each) for each in matrices if "relative_attention_bias" not in each}
    assert {each for each, kind in kinds.items() if kind == WRITTEN[name].name} == packed
    assert kinds.keys() == {llama_cpps_name(each) for each in text_encoder}
    assert kinds["token_embd.weight"] == "F16"
    assert errors.keys() == {each.removesuffix(".weight") for each in packed}
    assert 0 < max(errors.values()) < error
    weights = open_text_encoder(target)
    assert t5_config(weights) == config == t5_config(open_text_encoder(text_encoder))
    for each, tensor in text_encoder.items():
        found = weights.read(each).float()
        assert (found - tensor.float()).norm() <= (error if llama_cpps_name(each) in packed else 0) * tensor.norm()


def test_what_a_text_encoder_is_not_made_into(tmp_path: Path, text_encoder: dict[str, Tensor]) -> None:
    source, target = tmp_path / "t5.safetensors", tmp_path / "t5.gguf"
    save_file(text_encoder, source)
    with pytest.raises(CheckpointError, match="only GGUF files are made"):
        convert_text_encoder(source, tmp_path / "int8.safetensors", dtype="int8")
    convert_text_encoder(source, target, dtype="gguf_q8_0")
    with pytest.raises(CheckpointError, match="quantised already"):
        convert_text_encoder(target, tmp_path / "again.gguf", dtype="gguf_q4_0")
    text_encoder["shared.weight"][7, 7] = math.nan
    save_file(text_encoder, source)
    with pytest.raises(CheckpointError, match=r"damaged: shared\.weight"):
        convert_text_encoder(source, tmp_path / "broken.gguf", dtype="gguf_q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t5.gguf", "t5.safetensors"]


def test_a_kept_shape_counts(tmp_path: Path) -> None:
    numbers = np.arange(64, dtype=np.float32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "any")
    writer.add_array("comfy.gguf.orig_shape.a", [2, 32])
    writer.add_tensor("a", numbers)
    writer.add_tensor("b", np.zeros(3, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights = open_weights(tmp_path / "a.gguf")
    assert weights.shapes == {"a": (2, 32), "b": (3,)} and weights.dtypes["b"] == torch.float16
    assert torch.equal(weights.read("a"), torch.from_numpy(numbers).reshape(2, 32))
    assert weights.metadata["general.architecture"] == "any"


@pytest.mark.parametrize("kept", [3, 4, 30, 0.1, 0.5, -1])
def test_a_truncated_file_is_refused(kept: float, q8: Path, tmp_path: Path) -> None:
    content = q8.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=r"^cut\.gguf is .*damaged or incomplete"):
        open_checkpoint(tmp_path / "cut.gguf")


def header(*parts: bytes, tensors: int = 0, facts: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, facts) + b"".join(parts)


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content)) + content.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(version=1), "version is 1"),
        (header(tensors=2**40), "claims 1,099,511,627,776 tensors"),
        (header(facts=2**63), "claims 0 tensors and 9,223,372,036,854,775,808 facts"),
        (header(text("a"), struct.pack("<I", 99), facts=1), "unknown type"),
        (header(text("a"), struct.pack("<IIQ", 9, 8, 2**60), facts=1), "ends within"),
        (header(text("a"), struct.pack("<IIQ", 9, 4, 2**60), facts=1), "ends within"),
        (header(text("a"), struct.pack("<IIQ", 9, 9, 1), facts=1), "unknown type"),
        (header(text("general.alignment"), struct.pack("<II", 4, 7), facts=1), "alignment is 7"),
        (header(text("x" * 9000), tensors=1), "a name of 9,000 letters"),
        (header(text("a"), struct.pack("<I", 99), tensors=1), "99 axes"),
        (header(text("a"), struct.pack("<I2QIQ", 2, 33, 2, 8, 0), tensors=1), "no whole number of blocks"),
        (header(text("a"), struct.pack("<I2QIQ", 2, 256, 2, 23, 0), tensors=1), "kind 23.*Q4_0.*Q6_K are read"),
        (header(text("a"), struct.pack("<I2QIQ", 2, 2**40, 2**40, 0, 0), tensors=1), "its header says"),
        (header(text("a"), struct.pack("<I1QIQ", 1, 8, 0, 2**62), tensors=1), "its header says"),
        (header(*[text("a"), struct.pack("<I1QIQ", 1, 0, 0, 0)] * 2, tensors=2), "one name"),
    ],
)
def test_a_malicious_header_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(content + bytes(64))
    with pytest.raises(CheckpointError, match=rf"^bad\.gguf is a GGUF file that can't be read: .*{message}"):
        open_checkpoint(tmp_path / "bad.gguf")


def test_factors_that_are_not_finite_are_refused(q8: Path, tmp_path: Path) -> None:
    content = bytearray(q8.read_bytes())
    last = max(gguf.GGUFReader(q8).tensors, key=lambda each: each.data_offset * (each.tensor_type.name == "Q8_0"))
    content[last.data_offset : last.data_offset + 2] = np.array([np.inf], dtype=np.float16).tobytes()
    (tmp_path / "nan.gguf").write_bytes(content)
    for read in (read_dit, read_stored_dit):
        with pytest.raises(CheckpointError, match=r"^nan\.gguf is damaged: .*not finite"):
            read(tmp_path / "nan.gguf")


def test_targets_end_as_what_they_are(stage2: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"should end in \.gguf"):
        convert_file(stage2, tmp_path / "a.safetensors", dtype="gguf_q8_0")
    with pytest.raises(CheckpointError, match=r"should end in \.safetensors"):
        convert_file(stage2, tmp_path / "a.gguf", dtype="bf16")
    assert not list(tmp_path.iterdir())


def test_without_the_package_a_sentence_says_what_to_install(
    stage2: Path, q8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "gguf":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CheckpointError, match="pip install gguf"):
        convert_file(stage2, tmp_path / "a.gguf", dtype="gguf_q4_0")
    assert not list(tmp_path.iterdir())
    assert read_dit(q8)[0] == read_dit(stage2)[0]  # reading needs nothing
