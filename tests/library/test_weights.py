"""Opening weight files: what is no checkpoint, damaged or dangerous is refused in plain words."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashvideo.checkpoints import CheckpointError, load_dit

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"


def official(stage: int) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"dit_stage{stage}_weights.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 11\n", "git-lfs pointer"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b'{"weight_map": {}}', "is a JSON text file"),
        (b"GGUF\x03\0\0\0", "is a GGUF file that can't be read: it is damaged or incomplete"),
        (b"hello, this is no model", "damaged or incomplete, or not a model file"),
    ],
)
def test_a_file_that_is_no_checkpoint(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "stage1.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^stage1\.pt .*{message}"):
        load_dit(tmp_path / "stage1.pt")


@pytest.mark.parametrize("kept", [4, 100, 0.5, -1])
@pytest.mark.parametrize("container", ["safetensors", "archive", "old"])
def test_a_truncated_file_is_damaged(container: str, kept: float, tmp_path: Path) -> None:
    file, weights = tmp_path / "cut", official(2)
    if container == "safetensors":
        save_file(weights, file)
    else:
        torch.save({"module": weights}, file, _use_new_zipfile_serialization=container == "archive")
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=r"^cut is damaged or incomplete"):
        load_dit(file)


def test_a_safetensors_header_that_makes_no_sense(tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    for header in (b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"{not json}"):
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(CheckpointError, match=r"^bad\.safetensors is a damaged safetensors file"):
            load_dit(file)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file"):
        load_dit(tmp_path / "nowhere.pt")


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.target,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("container", ["archive", "old", "pickle 2", "pickle 4"])
def test_a_file_that_carries_code_is_refused_and_not_run(container: str, tmp_path: Path) -> None:
    content = {"module": {**official(2), "surprise": Payload(tmp_path / "owned")}}
    buffer = io.BytesIO()
    if container.startswith("pickle"):
        pickle.dump({"module": Payload(tmp_path / "owned")}, buffer, protocol=int(container[-1]))
    else:
        torch.save(content, buffer, _use_new_zipfile_serialization=container == "archive")
    (tmp_path / "stage2.pt").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match=r"^stage2\.pt contains code \(\w+\.mkdir\)"):
        load_dit(tmp_path / "stage2.pt")
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(Payload(tmp_path / "owned")))
    assert (tmp_path / "owned").exists()  # it would have run


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_code_too(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        load_dit(tmp_path / "model.pt")


def test_files_without_weights(tmp_path: Path) -> None:
    for content, message in (
        ({"optimizer_states": [1], "epoch": 2}, "optimizer state of a training run"),
        ({"epoch": 2}, "its keys are epoch"),
        ([torch.zeros(2)], "holds a list"),
        (torch.zeros(2), "a single tensor"),
    ):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match=message):
            load_dit(tmp_path / "other.pt")
