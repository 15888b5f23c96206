"""Converting to safetensors: same weights, right header, all or nothing; and the two commands."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import finished
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashvideo.atomic_files import WriteError
from flashvideo.checkpoints import CheckpointError, convert, load_dit, read_dit, read_vae
from flashvideo.checkpoints.convert import convert_file
from flashvideo.checkpoints.gguf_writing import WRITTEN
from flashvideo.checkpoints.lora import convert_lora, read_lora
from flashvideo.checkpoints.weights import read_safetensors_header
from flashvideo.commands import main as cli
from flashvideo.commands.terminal import CANCELLED, TERMINATED, ProgressBars

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = REPOSITORY / "tests" / "data" / "golden"
EIGHT_BIT = torch.float8_e4m3fn


def official_vae() -> dict[str, Tensor]:
    halves = (load_file(GOLDEN / f"vae_stored_weights_{half}.safetensors") for half in ("encoder", "decoder"))
    return {key: value for half in halves for key, value in half.items()}


@pytest.fixture
def stage1(tmp_path: Path) -> Path:
    torch.save({"module": load_file(GOLDEN / "dit_stage1_weights.safetensors")}, tmp_path / "stage1.pt")
    return tmp_path / "stage1.pt"


@pytest.fixture
def stage2(tmp_path: Path) -> Path:
    torch.save({"module": load_file(GOLDEN / "dit_stage2_weights.safetensors")}, tmp_path / "stage2.pt")
    return tmp_path / "stage2.pt"


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    torch.save({"state_dict": official_vae()}, tmp_path / "3d-vae.pt")
    return tmp_path / "3d-vae.pt"


def stored(path: Path) -> dict[str, Tensor]:
    """A converted network's tensors, without the prefix of their names."""
    return {name.removeprefix("flashvideo."): tensor for name, tensor in load_file(path).items()}


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(state) == set(expected)
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("name", "stage", "read"), [("stage1", "1", read_dit), ("stage2", "2", read_dit), ("vae", "vae", read_vae)]
)
def test_converted_file_holds_the_same_network(
    name: str, stage: str, read: Callable[..., Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(name)
    convert_file(source, tmp_path / "out.safetensors")
    config, state = read(tmp_path / "out.safetensors")
    assert config == read(source)[0]
    assert_same(state, read(source)[1])
    assert_same(stored(tmp_path / "out.safetensors"), state)
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["flashvideo.stage"] == stage
    assert metadata["flashvideo.version"] == convert.LAYOUT_VERSION
    assert metadata["flashvideo.source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_comfyui_does_not_take_a_converted_network_for_cogvideox(
    stage: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    convert_file(request.getfixturevalue(stage), tmp_path / "out.safetensors")
    names = set(load_file(tmp_path / "out.safetensors"))
    # ComfyUI looks for this one, behind any of these.
    looked_for = {
        f"{prefix}blocks.0.norm1.linear.weight" for prefix in ("", "model.diffusion_model.", "model.", "net.")
    }
    assert not names & looked_for
    assert "flashvideo.blocks.0.norm1.linear.weight" in names


@pytest.mark.parametrize("prefix", ["", "flashvideo.", "model.diffusion_model.", "model.diffusion_model.flashvideo."])
def test_files_of_all_versions_are_read(prefix: str, stage2: Path, tmp_path: Path) -> None:
    config, state = read_dit(stage2)
    save_file({prefix + name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "out.safetensors")
    assert read_dit(tmp_path / "out.safetensors")[0] == config
    assert_same(read_dit(tmp_path / "out.safetensors")[1], state)


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_official_and_converted_files_load_the_same(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = request.getfixturevalue(name)
    convert_file(source, tmp_path / "out.safetensors")
    assert_same(load_dit(tmp_path / "out.safetensors").state_dict(), load_dit(source).state_dict())


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_dtype_casts_every_weight(name: str, dtype: torch.dtype | None, stage1: Path, tmp_path: Path) -> None:
    convert_file(stage1, tmp_path / "out.safetensors", dtype=name)
    expected = {key: value.to(dtype) for key, value in read_dit(stage1)[1].items()}
    assert_same(stored(tmp_path / "out.safetensors"), expected)


def test_eight_bits_are_for_the_matrices_of_the_layers(stage2: Path, tmp_path: Path) -> None:
    convert_file(stage2, tmp_path / "out.safetensors", dtype="fp8_e4m3fn")
    state = stored(tmp_path / "out.safetensors")
    for key, value in read_dit(stage2)[1].items():
        eight_bit = key.startswith("blocks.") and value.ndim == 2
        assert state[key].dtype == (EIGHT_BIT if eight_bit else torch.bfloat16), key
        assert torch.equal(state[key].float(), value.to(state[key].dtype).float()), key


def test_numbers_too_large_for_the_new_type_become_its_largest(stage1: Path, tmp_path: Path) -> None:
    weights = torch.load(stage1)["module"]
    key = "model.diffusion_model.transformer.layers.0.mlp.dense_h_to_4h.weight"
    weights[key][0, :2] = torch.tensor([1e6, -1e6])
    for name, largest in (("fp16", 65504), ("fp8_e4m3fn", 448)):
        torch.save({"module": weights}, stage1)
        convert_file(stage1, tmp_path / "out.safetensors", dtype=name, force=True)
        row = stored(tmp_path / "out.safetensors")["blocks.0.ff_proj.weight"][0, :2]
        assert row.float().tolist() == [largest, -largest]


def test_every_tensor_stands_aligned_for_its_data_type(stage2: Path, tmp_path: Path) -> None:
    for dtype in convert.DTYPES.keys() - WRITTEN.keys():
        out = tmp_path / f"{dtype}.safetensors"
        convert_file(stage2, out, dtype=dtype)
        header, start = read_safetensors_header(out, out.stat().st_size)
        assert start % 8 == 0
        header.pop("__metadata__")
        for entry in header.values():
            assert entry["data_offsets"][0] % convert.SAFETENSORS_DTYPES[entry["dtype"]].itemsize == 0


def test_converting_again_changes_the_data_type_and_keeps_metadata(stage2: Path, tmp_path: Path) -> None:
    convert_file(stage2, tmp_path / "a.safetensors")
    state = stored(tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.safetensors", metadata={"author": "someone", "flashvideo.stage": "2"})
    convert_file(tmp_path / "b.safetensors", tmp_path / "c.safetensors", dtype="bf16")
    assert_same(stored(tmp_path / "c.safetensors"), {name: value.bfloat16() for name, value in state.items()})
    with safe_open(tmp_path / "c.safetensors", framework="pt") as file:
        assert file.metadata()["author"] == "someone"


def test_source_is_let_go_of_while_converting(stage1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "WINDOW", 100_000)
    opened = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: opened.append(1) or load(*a, **k))
    convert_file(stage1, tmp_path / "out.safetensors")
    assert len(opened) > 5
    monkeypatch.undo()
    assert_same(stored(tmp_path / "out.safetensors"), read_dit(stage1)[1])


# What is refused


def test_an_existing_file_is_only_replaced_with_force(stage1: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    with pytest.raises(WriteError, match="exists already"):
        convert_file(stage1, out)
    assert out.read_bytes() == b"precious"
    convert_file(stage1, out, force=True)
    assert_same(stored(out), read_dit(stage1)[1])


def test_source_and_target_must_differ(stage2: Path, tmp_path: Path) -> None:
    convert_file(stage2, tmp_path / "a.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    for target in ("a.safetensors", "link.safetensors", "../" + tmp_path.name + "/a.safetensors"):
        with pytest.raises(WriteError, match="is the file to be read"):
            convert_file(tmp_path / "a.safetensors", tmp_path / target, force=True)
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_targets_that_cannot_be_written(stage2: Path, vae: Path, tmp_path: Path) -> None:
    for target, message in (
        (tmp_path / "nowhere" / "out.safetensors", "no folder"),
        (tmp_path, "is a folder"),
        (tmp_path / "out.pt", "should end in .safetensors"),
    ):
        with pytest.raises((WriteError, CheckpointError), match=message):
            convert_file(stage2, target)
    with pytest.raises(CheckpointError, match="unknown data type int4"):
        convert_file(stage2, tmp_path / "out.safetensors", dtype="int4")
    with pytest.raises(CheckpointError, match="loses too much in 8 bits"):
        convert_file(vae, tmp_path / "out.safetensors", dtype="fp8_e4m3fn")
    assert not list(tmp_path.glob("out*"))


def test_a_failure_half_way_leaves_nothing(stage1: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")

    def fail(phase: str, done: int, total: int) -> None:
        if phase == "convert" and done > total // 2:
            assert next(tmp_path.glob("out.safetensors.*.part")).stat().st_size > 0
            raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        convert_file(stage1, out, force=True, progress=fail)
    assert out.read_bytes() == b"precious"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.safetensors", "stage1.pt"]


# The commands


@pytest.mark.parametrize(
    ("start", "words", "said"),
    [
        (("-m", "flashvideo"), ("--version",), "ComfyUI-FlashVideo "),
        (("-I", "flashvideo"), ("--version",), "ComfyUI-FlashVideo "),
        (("-I", str(REPOSITORY / "flashvideo")), ("info", "stage1.pt"), "stage1.pt: "),
    ],
)
def test_the_commands_start(
    start: tuple[str, ...], words: tuple[str, ...], said: str, stage1: Path, tmp_path: Path
) -> None:
    """Also where Python doesn't look for modules in the current folder (-I), as in ComfyUI's portable build."""
    folder = tmp_path if Path(start[-1]).is_absolute() else REPOSITORY
    done = subprocess.run([sys.executable, *start, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(said)


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [
        ("transformer.transformer_blocks.{}.attn1.to_{}", "lora_B", "lora_A"),
        ("lora_unet_transformer_blocks_{}_attn1_to_{}", "lora_up", "lora_down"),
    ],
    ids=["diffusers", "kohya"],
)
def test_a_published_lora_gets_comfyuis_names(name: str, up: str, down: str, tmp_path: Path) -> None:
    state, expected = {}, {}
    for index, (block, layer) in enumerate((block, layer) for block in (0, 11) for layer in "qkv"):
        for part, shape in ((up, (8, 2)), (down, (2, 8))):
            tensor = torch.full(shape, float(index))
            state[f"{name.format(block, layer)}.{part}.weight"] = tensor
            expected[f"diffusion_model.blocks.{block}.{layer}.{part}.weight"] = tensor
    if name.startswith("lora_unet"):
        state[f"{name.format(0, 'q')}.alpha"] = expected["diffusion_model.blocks.0.q.alpha"] = torch.tensor(4.0)
    save_file(state, tmp_path / "in.safetensors")
    assert cli.main(["convert", str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]) == 0
    assert_same(stored(tmp_path / "out.safetensors"), expected)
    assert cli.main(["convert", str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]) == 1


def test_a_loras_strength_stays_and_strange_layers_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stem = "transformer.transformer_blocks.3.attn1.to_out.0"
    state = {f"{stem}.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 2, "transformer.r": 4})}
    save_file(state, tmp_path / "in.safetensors", metadata=metadata)
    convert_lora(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["diffusion_model.blocks.3.attn_out.alpha"] == 2

    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 2, "transformer.use_rslora": True})}
    save_file(state, tmp_path / "in.safetensors", metadata=metadata)
    convert_lora(tmp_path / "in.safetensors", tmp_path / "out.safetensors", force=True)
    assert load_file(tmp_path / "out.safetensors")["diffusion_model.blocks.3.attn_out.alpha"] == 2 * 4**0.5
    for settings, refusal in (({"lora_alpha": 1, "alpha_pattern": {"to_q": 2}}, "several strengths"), ([], "metadata")):
        text = json.dumps(settings and {f"transformer.{name}": value for name, value in settings.items()})
        save_file(state, tmp_path / "in.safetensors", metadata={"lora_adapter_metadata": text})
        with pytest.raises(CheckpointError, match=rf"in\.safetensors.*{refusal}"):
            read_lora(tmp_path / "in.safetensors")

    save_file(state, tmp_path / "in.safetensors")
    precious = (tmp_path / "out.safetensors").read_bytes()
    with monkeypatch.context() as broken, pytest.raises(OSError, match="full"):
        broken.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "the disk is full")))
        convert_lora(tmp_path / "in.safetensors", tmp_path / "out.safetensors", force=True)
    assert (tmp_path / "out.safetensors").read_bytes() == precious
    assert not list(tmp_path.glob("*.part*"))

    state["transformer.transformer_blocks.3.attn9.to_q.lora_A.weight"] = torch.ones(4, 4)
    save_file(state, tmp_path / "strange.safetensors")
    assert cli.main(["convert", str(tmp_path / "strange.safetensors"), str(tmp_path / "new.safetensors")]) == 1
    assert "attn9" in capsys.readouterr().err
    assert not (tmp_path / "new.safetensors").exists()


# Runs the command as `python -m flashvideo` does, and waits in the middle of writing.
PAUSED = """
import sys, time
from flashvideo.commands import run_convert
from flashvideo.commands.main import main

class Pause(run_convert.ProgressBars):
    def __call__(self, phase, done, total):
        if phase == "convert" and done > total // 2:
            sys.stdout.write("half way\\n")
            sys.stdout.flush()
            time.sleep(3600)

run_convert.ProgressBars = Pause
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_in_a_conversion_leaves_no_half_file(
    stage1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, unfinished = tmp_path / "out.safetensors", []
    out.write_bytes(b"precious")

    class CtrlC(ProgressBars):
        def __call__(self, phase: str, done: int, total: int) -> None:
            if phase == "convert" and done > total // 2:
                unfinished.extend(tmp_path.glob("out.safetensors.*.part"))
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("flashvideo.commands.run_convert.ProgressBars", CtrlC)
    assert cli.main(["convert", str(stage1), str(out), "--force"]) == CANCELLED
    assert len(unfinished) == 1
    assert "Cancelled; nothing was written." in capsys.readouterr().err
    assert out.read_bytes() == b"precious"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.safetensors", "stage1.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_a_conversion_that_is_ended_leaves_no_half_file(stage1: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    command = [sys.executable, "-c", textwrap.dedent(PAUSED), "convert", str(stage1), str(out), "--force"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "half way\n"
        assert len(list(tmp_path.glob("out.safetensors.*.part"))) == 1
        process.send_signal(signal.SIGTERM)
        errors = finished(process)[1]
    assert process.returncode == TERMINATED
    assert "Traceback" not in errors
    assert out.read_bytes() == b"precious"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.safetensors", "stage1.pt"]


def test_convert_command_runs_as_a_module(stage2: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "flashvideo", "convert", str(stage2), str(out), "--dtype", "bf16"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "FlashVideo stage II (2 layers of 128" in done.stdout
    assert "checksum: 100%" in done.stderr and "convert: 100%" in done.stderr
    assert stored(out)["proj_out.weight"].dtype == torch.bfloat16


def test_info_tells_what_a_file_is(stage1: Path, stage2: Path, vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = {
        stage1: (
            "stage I (2 layers of 128, official layout)",
            "PyTorch archive",
            "535,424, and 20,736 of LoRA (rank 4)",
        ),
        stage2: ("stage II (2 layers of 128, official layout)", "2 heads of 64", "float32 (61 tensors)"),
        vae: ("the VAE (32x32x32x64 channels, official layout)", "float16", "latent channels 16"),
    }
    for file, texts in expected.items():
        assert cli.main(["info", str(file)]) == 0
        shown = capsys.readouterr().out
        assert all(text in shown for text in texts), shown
    assert cli.main(["info", str(stage1)]) == 0
    assert "position_embeddings" in capsys.readouterr().out


def test_info_of_another_model_says_what_it_seems_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert cli.main(["info", str(tmp_path / "other.safetensors")]) == 1
    assert "other.safetensors is no FlashVideo model: it seems to be a Flux model" in capsys.readouterr().err
