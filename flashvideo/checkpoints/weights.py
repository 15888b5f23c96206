"""Weight files opened safely and read one tensor at a time: safetensors, PyTorch archives, state dicts in memory.

A file is recognised by its first bytes, never by its name. PyTorch files are always read with `weights_only=True`;
one that would run code is refused. Archives and safetensors are memory-mapped, so that opening a large file is
instant and reading it takes the memory of one tensor; `Weights.release` frees the pages that were read.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .archives import is_archive
from .gguf_header import MAGIC, DamagedError, Entry, read_header
from .packed import PACKINGS, Packing
from .pickles import DAMAGE, MAX_PICKLE, CountedFile, code_in_pickle

# Scale factors that quantised files hold besides the weights.
_FACTORS = "scaled_fp8|scale_weight|scale_input|weight_scale(?:_2)?|weight_s_rel|weight_s_channel|weight_codebook"
QUANTISATION = re.compile(rf"(?:^|\.)(?:{_FACTORS}|input_scale|pre_quant_scale|comfy_quant)$")
PACKING = "gguf_type"  # beside a packed `weight` that ComfyUI saved: ggml's number of its kind
SHOWN_KEYS = 4  # of a list of keys in a message
SHOWN_LETTERS = 120  # of a name or of another library's message
# Beyond what any real model has: the largest known header has 0.3 MB and 2,500 tensors, and ComfyUI may add a graph.
MAX_HEADER = 8 * 2**20  # bytes
MAX_TENSORS, MAX_NAME, MAX_NAMES, MAX_AXES = 2**14, 512, 2**20, 8  # of names, letters: of one, and of all
# Where training scripts put the weights in what they save, the official ones first.
WEIGHT_KEYS = ("module", "state_dict", "model", "model_state_dict", "ema")
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),
}
# First bytes, in lower case and without leading space, of files that users take for a model.
_NOT_WEIGHTS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    (
        (b"version https://git-lfs",),
        "is a git-lfs pointer, not the model itself. Run `git lfs pull`, or download the file.",
    ),
    (
        (b"<!doctype", b"<html", b"<?xml", b"<head"),
        "is a web page, not a model: the download link led to a page (a login, perhaps). Download it again.",
    ),
    ((b"{",), "is a JSON text file, not a model: use the .safetensors or .pt file that belongs to it."),
    (
        (b"rar!", b"7z\xbc\xaf", b"\x1f\x8b"),
        "is a compressed archive: unpack it, and use the model file inside.",
    ),
)
_MISLEADING = (".safetensors",)  # endings by which newer PyTorches would read another kind of file


class StateDict(dict[str, Tensor]):
    """Tensors by name, with the `metadata` of the file that they come from."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata)


def some(names: Sequence[str]) -> str:
    """List the first few names, for a message."""
    return ", ".join(map(short, names[:SHOWN_KEYS])) + (", …" if len(names) > SHOWN_KEYS else "")


def short(text: object) -> str:
    """The beginning of a text, for a message."""
    whole = str(text)
    return whole if len(whole) <= SHOWN_LETTERS else whole[:SHOWN_LETTERS] + "…"


@dataclass
class Weights:
    """The tensors of one checkpoint; shapes and data types are known without reading any."""

    label: str  # its name in messages
    container: str  # what it is stored in
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype | None]  # None for a storage type unknown here
    reopen: Callable[[], Callable[[str], Tensor]]  # maps the file; the result reads a tensor by name
    metadata: dict[str, str] = field(default_factory=dict)
    packings: dict[str, Packing] = field(default_factory=dict)  # of GGUF's matrices; `read` unpacks them to bfloat16
    reopen_packed: Callable[[], Callable[[str], Tensor]] | None = None  # as `reopen`, for those: rows of bytes
    _reader: Callable[[str], Tensor] | None = field(default=None, init=False)
    _packed_reader: Callable[[str], Tensor] | None = field(default=None, init=False)

    def read(self, name: str) -> Tensor:
        """Return the tensor of this name, a view of the mapped file where the file can be mapped."""
        if self._reader is None:
            self._reader = self.reopen()
        return self._reader(name)

    def read_packed(self, name: str) -> Tensor:
        """Return a packed matrix [out, in] as it is: bytes [out, bytes of a row]. Raises CheckpointError if damaged."""
        if self._packed_reader is None:
            self._packed_reader = self.reopen_packed()
        packed = self._packed_reader(name)
        if not self.packings[name].is_finite(packed):
            raise CheckpointError(f"{self.label} is damaged: {short(name)} holds factors that are not finite (NaN).")
        return packed

    def release(self) -> None:
        """Unmap the file once no tensor of it is in use any more; the next read maps it again."""
        self._reader = self._packed_reader = None


def open_weights(source: str | Path | Mapping[str, Any]) -> Weights:
    """Open a checkpoint: a path, or a state dict, which may be under a key such as "module" or "state_dict".

    A `StateDict` keeps its metadata. Raises CheckpointError if it isn't a weight file, is damaged, or contains code.
    """
    if isinstance(source, Mapping):
        tensors = _find_tensors(source, "The state dict")
        weights = _from_tensors("The state dict", "state dict", tensors, lambda: tensors)
        weights.metadata = dict(source.metadata) if isinstance(source, StateDict) else {}
        return weights
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if reason := _not_weights(head, size):
        raise CheckpointError(f"{path.name} {reason}")
    if head.startswith(MAGIC):
        return _open_gguf(path, size)
    if head[8:9] == b"{" and not head.startswith(b"PK"):
        return _with_packings(_open_safetensors(path, size))
    return _open_torch(path)


def _not_weights(head: bytes, size: int) -> str | None:
    """Why a file with these first bytes can't hold weights; None if it may."""
    if size == 0:
        return "is empty: the download didn't finish. Download it again."
    text = head.lstrip().lower()
    return next((reason for starts, reason in _NOT_WEIGHTS if text.startswith(starts)), None)


def _open_safetensors(path: Path, size: int) -> Weights:
    header, start = read_safetensors_header(path, size)
    metadata = header.pop("__metadata__", {})
    _check_names(path.name, header)
    if not (_is_metadata(metadata) and all(map(_is_entry, header.values()))):
        raise CheckpointError(f"{path.name} is a damaged safetensors file: its header is invalid.")
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    dtypes = {name: SAFETENSORS_DTYPES.get(entry["dtype"]) for name, entry in header.items()}
    if start + end != size:
        raise CheckpointError(
            f"{path.name} is damaged or incomplete: {size:,} bytes long, but its header says {start + end:,}. "
            "Download or convert it again."
        )

    def reopen() -> Callable[[str], Tensor]:
        file = _damaged(lambda: safe_open(path, framework="pt", device="cpu"), path)
        return lambda name: _damaged(lambda: file.get_tensor(name), path)

    return Weights(path.name, "safetensors", shapes, dtypes, reopen, metadata)


def _open_gguf(path: Path, size: int) -> Weights:
    try:
        entries, metadata = read_header(path, size)
    except DamagedError as error:
        raise CheckpointError(f"{path.name} is a GGUF file that can't be read: {error}.") from error
    _check_names(path.name, entries)

    def reopen_bytes() -> Callable[[str], Tensor]:
        whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        return lambda name: whole[entries[name].start : entries[name].start + entries[name].nbytes]

    def reopen() -> Callable[[str], Tensor]:
        read = reopen_bytes()
        return lambda name: _plain(read(name), entries[name])

    def reopen_packed() -> Callable[[str], Tensor]:
        read = reopen_bytes()
        return lambda name: read(name).reshape(entries[name].shape[0], -1)

    shapes = {name: entry.shape for name, entry in entries.items()}
    packed = {name: entry.kind for name, entry in entries.items() if isinstance(entry.kind, Packing)}
    dtypes = {name: torch.bfloat16 if name in packed else entry.kind for name, entry in entries.items()}
    packed = {name: kind for name, kind in packed.items() if len(shapes[name]) == 2}
    return Weights(path.name, "GGUF", shapes, dtypes, reopen, metadata, packed, reopen_packed)


def _with_packings(weights: Weights) -> Weights:
    """Know the packed matrices of a file that ComfyUI saved from a model of a GGUF file."""
    marks = [name for name in weights.shapes if name.endswith(f".{PACKING}")]
    if not marks:
        return weights
    read_stored, found = weights.reopen, weights.reopen()
    for mark in marks:
        name = mark.removesuffix(PACKING) + "weight"
        shape, number = weights.shapes.get(name, ()), found(mark)
        packing = PACKINGS.get(int(number)) if number.numel() == 1 else None
        if packing is None or len(shape) != 2 or weights.dtypes[name] != torch.uint8 or shape[1] % packing.nbytes:
            raise CheckpointError(f"{weights.label} is damaged: {short(name)} should be packed, and isn't.")
        weights.packings[name], weights.dtypes[name] = packing, torch.bfloat16
        weights.shapes[name] = (shape[0], packing.columns(shape[1]))
        del weights.shapes[mark], weights.dtypes[mark]

    def reopen() -> Callable[[str], Tensor]:
        read = read_stored()
        return lambda name: (
            weights.packings[name].unpack(read(name), torch.bfloat16) if name in weights.packings else read(name)
        )

    weights.reopen, weights.reopen_packed = reopen, read_stored
    return weights


def _plain(content: Tensor, entry: Entry) -> Tensor:
    """A tensor from its bytes in a GGUF file."""
    if isinstance(entry.kind, Packing):
        return entry.kind.unpack(content.reshape(1, -1), torch.bfloat16).reshape(entry.shape)
    aligned = content if entry.start % entry.kind.itemsize == 0 else content.clone()
    return aligned.view(entry.kind).reshape(entry.shape)


def _damaged(action: Callable[[], Any], path: Path) -> Any:
    """What an action of the safetensors library returns; CheckpointError for its own errors."""
    try:
        return action()
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path.name} is a damaged safetensors file ({short(error)}).") from error


def _is_metadata(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_entry(value: object) -> bool:
    """Whether an entry of a header is valid by itself: a data type, a shape and an offset that fit together."""
    if not isinstance(value, dict) or not isinstance(value.get("dtype"), str):
        return False
    shape, place = numbers = value.get("shape"), value.get("data_offsets")
    if not all(isinstance(each, list) and all(type(n) is int and 0 <= n < 2**63 for n in each) for each in numbers):
        return False
    if len(place) != 2 or len(shape) > MAX_AXES or place[0] > place[1]:
        return False
    dtype = SAFETENSORS_DTYPES.get(value["dtype"])
    return dtype is None or math.prod(shape) * dtype.itemsize == place[1] - place[0]


def _check_count(label: str, tensors: int) -> None:
    if tensors > MAX_TENSORS:
        raise CheckpointError(f"{label} holds {tensors:,} tensors, and no model has more than {MAX_TENSORS:,}.")


def _check_names(label: str, names: Collection[str]) -> None:
    _check_count(label, len(names))
    if (letters := sum(map(len, names))) > MAX_NAMES:
        raise CheckpointError(f"{label} is damaged: its tensors' names have {letters:,} letters.")
    longest = max(names, key=len, default="")
    if len(longest) > MAX_NAME:
        raise CheckpointError(f"{label} is damaged: it holds a tensor called {short(longest)}.")


def read_safetensors_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file, metadata included, and the offset at which the tensors' bytes start."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise CheckpointError(
                f"{path.name} is damaged or incomplete: {size:,} bytes long, and its header alone should be "
                f"{length:,}. Download or convert it again."
            )
        if length > MAX_HEADER:
            words = f"its header is {length:,} bytes long, and no model's is longer than {MAX_HEADER:,}"
            raise CheckpointError(f"{path.name} is damaged: {words}.")
        text = file.read(length)
        _check_count(path.name, text.count(b'"data_offsets"'))  # before any of them is read
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path.name} is a damaged safetensors file: its header isn't readable.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name} is a damaged safetensors file: its header is invalid.")
    return header, 8 + length


def _open_torch(path: Path) -> Weights:
    if archive := is_archive(path):
        _check_archive(path)

    def reopen() -> dict[str, Tensor]:
        return _find_tensors(_load_torch(path, archive), path.name)

    tensors = reopen()
    if not archive or path.suffix.lower() in _MISLEADING:  # can't be mapped: stays in memory
        return _from_tensors(path.name, "PyTorch file of the old kind", tensors, lambda: tensors)
    return _from_tensors(path.name, "PyTorch archive", tensors, reopen)


def _load_torch(path: Path, archive: bool) -> object:
    try:
        if archive and path.suffix.lower() not in _MISLEADING:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with path.open("rb") as file:
            source = file if archive else CountedFile(file)
            return torch.load(source, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        if code := code_in_pickle(path, archive):
            raise CheckpointError(
                f"{path.name} contains code ({some(sorted(code))}) that loading would run, so it was not "
                "loaded. Use this model only as safetensors, or as a .pt file that holds nothing but weights."
            ) from error
        raise CheckpointError(f"{path.name} is damaged or incomplete, or not a model file.") from error


def _check_archive(path: Path) -> None:
    """Refuse a program, and an archive whose table of contents can't be a model's. Raises CheckpointError."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise CheckpointError(f"{path.name} is damaged or incomplete: its table of contents isn't readable.") from error
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise CheckpointError(f"{path.name} is a TorchScript program, which contains code; it was not opened.")
    if len(entries) > 4 * MAX_TENSORS or any(
        entry.filename.endswith("data.pkl") and max(entry.file_size, entry.compress_size) > MAX_PICKLE
        for entry in entries
    ):
        raise CheckpointError(f"{path.name} is damaged, or not a model file: its table of contents is too large.")


def _find_tensors(loaded: object, label: str) -> dict[str, Tensor]:
    """The state dict that a file holds, either directly or under a key."""
    if isinstance(loaded, Tensor):
        raise CheckpointError(f"{label} holds a single tensor, not a model.")
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{label} holds a {type(loaded).__name__}, not a model.")
    candidates = [loaded[key] for key in WEIGHT_KEYS if isinstance(loaded.get(key), Mapping)]
    for candidate in [*candidates, loaded]:
        tensors = {str(key): value.detach() for key, value in candidate.items() if isinstance(value, Tensor)}
        if tensors:
            _check_names(label, tensors)
            _check_stored(label, tensors)
            return tensors
    raise CheckpointError(f"{label} holds no weights{_what_else(loaded)}.")


def _check_stored(label: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that claim more numbers than are stored for them. Raises CheckpointError."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise CheckpointError(f"{label} holds a sparse tensor ({short(name)}), which no model of ours has.")
        if not tensor.is_meta and tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{label} is damaged: {short(name)} has more numbers than are stored.")


def check_finite(label: str, name: str, tensor: Tensor) -> None:
    """Raise CheckpointError if a weight holds NaN or infinity, from which nothing but NaN would come."""
    if tensor.is_meta or not tensor.is_floating_point():
        return
    numbers = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    # A sum is not finite if a number isn't, and takes no memory. One that overflows is looked at number by number.
    if not math.isfinite(float(numbers.sum(dtype=torch.float32))) and not numbers.isfinite().all():
        raise CheckpointError(f"{label} is damaged: {short(name)} holds numbers that are not finite (NaN).")


def _what_else(loaded: Mapping[str, Any]) -> str:
    names = [str(key) for key in loaded]
    if any("optim" in name or name == "param_groups" for name in names):
        return ": it seems to be the optimizer state of a training run"
    return f"; its keys are {some(names)}" if names else ": it is empty"


def _from_tensors(
    label: str, container: str, tensors: dict[str, Tensor], reopen: Callable[[], dict[str, Tensor]]
) -> Weights:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    return Weights(label, container, shapes, dtypes, lambda: reopen().__getitem__)
