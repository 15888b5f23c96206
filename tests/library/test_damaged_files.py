"""Damaged files: each loads as what it is, or is refused in one short sentence that names it.

`python -m pytest tests/library/test_damaged_files.py --damaged 300` tries so many of every kind, in place of 40, and
also asks that each takes at most two seconds of a quiet processor.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from flashvideo.checkpoints import CheckpointError, load_dit, load_vae, open_checkpoint
from flashvideo.checkpoints.lora import read_lora
from flashvideo.checkpoints.pickles import MAX_READS
from flashvideo.checkpoints.weights import MAX_HEADER, open_weights
from flashvideo.config import DiTConfig, VAEConfig
from flashvideo.dit import FlashVideoDiT
from flashvideo.t5 import load_encoder
from flashvideo.vae import VideoVAE

SECONDS = 2.0  # of a quiet processor, for one file
HANGS = 120.0  # seconds of any processor that mean that there is no end
FEW = 40  # damaged files of a kind
LONGEST = 2000  # letters of a message
ODD = (
    None,
    True,
    -1,
    2**63,
    2**70,
    1e400,
    "",
    "x" * 5000,
    [],
    {},
    [[]],
    [0, "a"],
    [-1, 5],
    [5, 1],
    [2**62, 2**62],
    "F32",
)
DIT = DiTConfig(num_layers=1, hidden_size=32, num_heads=2, time_embed_dim=8, text_dim=12, ff_dim=48)
VAE = VAEConfig(8, (1, 1, 1, 1), encoder_blocks=1, decoder_blocks=1, norm_groups=8)
READERS: tuple[Callable[[Path], object], ...] = (load_dit, load_vae, load_encoder, read_lora)


@pytest.fixture(scope="module")
def states() -> list[dict[str, Tensor]]:
    """A stage, a VAE and a LoRA, as small as they can be."""
    torch.manual_seed(0)
    layer = "transformer.transformer_blocks.0.attn1.to_q"
    lora = {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)}
    return [FlashVideoDiT(DIT).state_dict(), VideoVAE(VAE).state_dict(), lora]


def opens(reader: Callable[[Path], object], path: Path, seconds: float) -> bool:
    """Whether a reader takes a file; if not, with a CheckpointError as it should be, and within processor seconds."""
    begin, taken = time.thread_time(), True
    try:
        reader(path)
    except CheckpointError as error:
        taken = False
        assert str(error).startswith((path.name, str(path))), error
        assert len(str(error)) <= LONGEST
    assert time.thread_time() - begin < seconds
    return taken


def try_all(path: Path, seconds: float = HANGS, turn: int = 0) -> None:
    """Every reader's answer to a file.

    All begin with `open_weights`: if that refuses the file already, one of them answers for all, another at each turn.
    """
    readers = READERS if opens(open_weights, path, seconds) else [READERS[turn % len(READERS)]]
    for reader in readers:
        opens(reader, path, seconds)


def with_header(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def torch_bytes(state: object, *, new: bool) -> bytes:
    """What torch.save writes, in the kind of today or the old one."""
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


def flipped(data: bytes, chance: random.Random, start: int, stop: int) -> bytes:
    """A few other bytes between two places."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        changed[chance.randrange(start, stop)] = chance.randrange(256)
    return bytes(changed)


def header_flips(state: dict[str, Tensor], chance: random.Random) -> bytes:
    data = save(state)
    return flipped(data, chance, 0, 8 + struct.unpack("<Q", data[:8])[0])


def odd_headers(state: dict[str, Tensor], chance: random.Random) -> bytes:
    data = save(state)
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = chance.choice(sorted(header))
    change = chance.randrange(4)
    if change == 0:
        header[name][chance.choice(("dtype", "shape", "data_offsets"))] = chance.choice(ODD)
    elif change == 1:
        header[name] = chance.choice(ODD)
    elif change == 2:
        header["__metadata__"] = chance.choice((*ODD, {"flashvideo.stage": 2}, {"flashvideo.norm_groups": "7"}))
    else:
        header[chance.choice((name.replace("0", "9" * 300), "x" * 10**5, "blocks.511.q.weight"))] = header.pop(name)
    return with_header(header, data[8 + length :])


def truncated(state: dict[str, Tensor], chance: random.Random) -> bytes:
    data = chance.choice((save(state), torch_bytes(state, new=True), torch_bytes(state, new=False)))
    return data[: chance.randrange(len(data))]


def archive_flips(state: dict[str, Tensor], chance: random.Random) -> bytes:
    data = torch_bytes({"module": state}, new=True)
    return flipped(data, chance, 0, len(data))


def table_flips(state: dict[str, Tensor], chance: random.Random) -> bytes:
    """Other bytes in an archive's table of contents, whose checksum is right."""
    changed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(torch_bytes(state, new=True))) as archive,
        zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as target,
    ):
        for name in archive.namelist():
            content = archive.read(name)
            is_table = name.endswith("data.pkl")
            target.writestr(name, flipped(content, chance, 0, len(content)) if is_table else content)
    return changed.getvalue()


def old_flips(state: dict[str, Tensor], chance: random.Random) -> bytes:
    data = torch_bytes(state, new=False)
    return flipped(data, chance, 0, min(len(data), 4000))


def odd_contents(state: dict[str, Tensor], chance: random.Random) -> bytes:
    name = chance.choice(sorted(state))
    changes = (
        {name: state[name].expand(2, *state[name].shape)},
        {name: torch.zeros(1).expand(10**6, 10**6)},
        {name: state[name].to_sparse()},
        {name: torch.full_like(state[name], float("nan"))},
        {name: state[name].flatten()},
        {name: torch.zeros(0)},
        {name: torch.tensor(1)},
        {name: state[name].to(torch.complex64)},
        {name: "text"},
        {f"{name}.0" * 200: state[name]},
        {(1, 2): state[name]},
    )
    return torch_bytes({**state, **chance.choice(changes)}, new=chance.random() < 0.5)


KINDS = (header_flips, odd_headers, truncated, archive_flips, table_flips, old_flips, odd_contents)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_damaged_files_load_or_are_refused_by_name(
    kind: Callable[[dict[str, Tensor], random.Random], bytes],
    states: list[dict[str, Tensor]],
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    seconds = SECONDS if pytestconfig.getoption("--damaged", FEW) > FEW else HANGS
    for seed in range(pytestconfig.getoption("--damaged", FEW)):
        chance = random.Random(f"{kind.__name__} {seed}")
        path = tmp_path / f"{seed}.{chance.choice(('safetensors', 'pt'))}"
        path.write_bytes(kind(chance.choice(states), chance))
        try_all(path, seconds, turn=seed)
        path.unlink()


def huge_header() -> bytes:
    return with_header(b'{"a":' + b"[" * MAX_HEADER + b"}")


def deep_header() -> bytes:
    return with_header(b'{"a":' + b"[" * 10**5 + b"}" * 10)


def many_tensors() -> bytes:
    return with_header({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10**5)})


def matching_names() -> bytes:
    """Names that patterns begin to match at every place."""
    names = (f"{i}.blocks.0.attn2.to_q." + "adaln_single." * 30 for i in range(2_400))
    return with_header({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names})


def long_table() -> bytes:
    """A pickle of the old kind that goes on and on."""
    magic = pickle.dumps(torch.serialization.MAGIC_NUMBER, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    return magic + b"\x80\x02" + b"K\x01" * (3 * MAX_READS) + b"."


def long_archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"K\x01" * 10**7 + b".")
        archive.writestr("archive/version", "3")
    return file.getvalue()


def code_at_the_end() -> bytes:
    return b"\x80\x02" + b"K\x01" * (5 * 10**6) + b"cos\nsystem\n."


@pytest.mark.parametrize(
    "make",
    [huge_header, deep_header, many_tensors, matching_names, long_table, long_archive, code_at_the_end],
    ids=lambda make: make.__name__,
)
def test_files_made_to_take_long_are_refused_soon(make: Callable[[], bytes], tmp_path: Path) -> None:
    path = tmp_path / "long.pt"
    path.write_bytes(make())
    try_all(path)
    with pytest.raises(CheckpointError, match=r"^long\.pt"):
        open_checkpoint(path)


def test_an_archive_of_several_disks_is_refused_by_name(states: list[dict[str, Tensor]], tmp_path: Path) -> None:
    """Python's own check for archives raises an error for it."""
    data, path = bytearray(torch_bytes(states[0], new=True)), tmp_path / "disks.pt"
    data[data.rindex(b"PK\x06\x07") + 16] = 7
    path.write_bytes(data)
    try_all(path)
    with pytest.raises(CheckpointError, match=r"^disks\.pt is damaged or incomplete"):
        open_checkpoint(path)


def test_a_pytorch_file_loads_under_any_name(states: list[dict[str, Tensor]], tmp_path: Path) -> None:
    for ending in ("pt", "safetensors", "SAFETENSORS", "bin", ""):
        for new in (True, False):
            path = tmp_path / f"model.{ending}"
            path.write_bytes(torch_bytes({"module": states[0]}, new=new))
            assert load_dit(path).config == DIT
            weights = open_weights(path)
            assert all(torch.equal(weights.read(name), tensor) for name, tensor in states[0].items())
    (tmp_path / "model.pt").write_bytes(save(states[0]))
    assert load_dit(tmp_path / "model.pt").config == DIT


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(
    number: float, dtype: torch.dtype, states: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    for load, state in ((load_dit, states[0]), (load_vae, states[1])):
        state = {name: tensor.to(dtype).clone() for name, tensor in state.items()}
        name = sorted(state)[3]
        state[name].view(-1)[-1] = number
        (tmp_path / "model.safetensors").write_bytes(save(state))
        with pytest.raises(CheckpointError, match=rf"model\.safetensors is damaged: {name} .*not finite"):
            load(tmp_path / "model.safetensors")


def test_large_weights_are_not_taken_for_infinite(states: list[dict[str, Tensor]]) -> None:
    state = {**states[0], "proj_out.weight": torch.full_like(states[0]["proj_out.weight"], 3e38)}
    assert load_dit(state).config == DIT
