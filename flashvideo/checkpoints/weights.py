"""Weight files opened safely and read one tensor at a time: safetensors, PyTorch archives, state dicts in memory.

A file is known by its first bytes, never by its name. PyTorch files are only ever read with `weights_only=True`;
one that would run code is refused. Archives and safetensors are memory-mapped, so that opening a large file is
instant and reading it costs one tensor at a time; `Weights.release` lets go of the pages read so far.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SHOWN_KEYS = 4  # of a list of keys in a message
MAX_HEADER = 100_000_000  # bytes; the limit that safetensors sets itself
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
}
# First bytes, in lower case and without leading space, of what people have in place of a model.
_NOT_WEIGHTS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    (
        (b"version https://git-lfs",),
        "is a git-lfs pointer, a few lines that stand for the real file. Run `git lfs pull`, or download it.",
    ),
    (
        (b"<!doctype", b"<html", b"<?xml", b"<head"),
        "is a web page, not a model: the download link led to a page (a login, perhaps). Download it again.",
    ),
    ((b"gguf",), "is a GGUF file: use the loader of a GGUF node pack."),
    ((b"{",), "is a JSON text file, not a model: take the .safetensors or .pt file that belongs to it."),
    (
        (b"rar!", b"7z\xbc\xaf", b"\x1f\x8b"),
        "is a compressed archive: unpack it, and take the model file from inside.",
    ),
)
# What a damaged PyTorch file makes torch.load raise, depending on where the damage is.
_DAMAGE = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OSError,
    struct.error,
    pickle.UnpicklingError,
)


class CheckpointError(ValueError):
    """A file that can't be used as asked; the message says which file, why, and what it seems to be instead."""


class StateDict(dict[str, Tensor]):
    """Tensors by name, with the `metadata` of the file that they come from."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata)


def some(names: Sequence[str]) -> str:
    """List the first few names, for a message."""
    return ", ".join(names[:SHOWN_KEYS]) + (", …" if len(names) > SHOWN_KEYS else "")


@dataclass
class Weights:
    """The tensors of one checkpoint; shapes and data types are known without reading any."""

    label: str  # its name in messages
    container: str  # what it is stored in
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype | None]  # None for a storage type unknown here
    reopen: Callable[[], Callable[[str], Tensor]]  # maps the file; the result reads a tensor by name
    metadata: dict[str, str] = field(default_factory=dict)
    _reader: Callable[[str], Tensor] | None = field(default=None, init=False)

    def read(self, name: str) -> Tensor:
        """Return the tensor of this name, a view of the mapped file where the file can be mapped."""
        if self._reader is None:
            self._reader = self.reopen()
        return self._reader(name)

    def release(self) -> None:
        """Unmap the file once no tensor of it is in use any more; the next read maps it again."""
        self._reader = None


def open_weights(source: str | Path | Mapping[str, Any]) -> Weights:
    """Open a checkpoint: a path, or a state dict that may stand under "module" or "state_dict".

    A `StateDict` keeps its metadata. Raises CheckpointError if it is no weight file, is damaged, or carries code.
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
    if head[8:9] == b"{" and not head.startswith(b"PK"):
        return _open_safetensors(path, size)
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
    try:
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        dtypes = {name: SAFETENSORS_DTYPES.get(entry["dtype"]) for name, entry in header.items()}
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path.name} is a damaged safetensors file: its header makes no sense.") from error
    if start + end != size:
        raise CheckpointError(
            f"{path.name} is damaged or incomplete: {size:,} bytes long, and its header speaks of {start + end:,}. "
            "Download or convert it again."
        )

    def reopen() -> Callable[[str], Tensor]:
        try:
            return safe_open(path, framework="pt", device="cpu").get_tensor
        except SafetensorError as error:
            raise CheckpointError(f"{path.name} is a damaged safetensors file ({error}).") from error

    return Weights(path.name, "safetensors", shapes, dtypes, reopen, metadata)


def read_safetensors_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file, metadata included, and the offset at which the tensors' bytes start."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"{path.name} is damaged or incomplete: {size:,} bytes long, and its header alone should be "
                f"{length:,}. Download or convert it again."
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path.name} is a damaged safetensors file: its header isn't readable.") from error
    return header, 8 + length


def _open_torch(path: Path) -> Weights:
    archive = zipfile.is_zipfile(path)
    if archive and _is_script(path):
        raise CheckpointError(f"{path.name} is a TorchScript program, which carries code; it was not opened.")

    def reopen() -> dict[str, Tensor]:
        return _find_tensors(_load_torch(path, archive), path.name)

    tensors = reopen()
    if not archive:  # can't be mapped: read once, kept
        return _from_tensors(path.name, "PyTorch file of the old kind", tensors, lambda: tensors)
    return _from_tensors(path.name, "PyTorch archive", tensors, reopen)


def _load_torch(path: Path, archive: bool) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive or None)
    except _DAMAGE as error:
        if code := _code_in_pickle(path, archive):
            raise CheckpointError(
                f"{path.name} carries code ({some(sorted(code))}) that loading would run, so it was not "
                "loaded. Only take this model as safetensors, or as a .pt file that holds nothing but weights."
            ) from error
        raise CheckpointError(f"{path.name} is damaged or incomplete, or no model file at all.") from error


def _is_script(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _code_in_pickle(path: Path, archive: bool) -> set[str]:
    """Names outside PyTorch's own that a pickle would import. Disassembles it, and runs none of it."""
    if not archive:
        with path.open("rb") as file:
            return set(_imports(file))
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as content:
        for name in content.namelist():
            if name.endswith("data.pkl"):
                with content.open(name) as file:
                    return set(_imports(file))
    return set()


def _imports(file: BinaryIO) -> Iterator[str]:
    strings: list[str] = []  # what STACK_GLOBAL takes its two names from
    with suppress(ValueError, EOFError, IndexError, struct.error):
        while True:  # a file of the old kind is several pickles in a row
            for opcode, argument, _ in pickletools.genops(file):
                name = ""
                if opcode.name in ("GLOBAL", "INST"):
                    name = str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    name = ".".join(strings[-2:])
                elif isinstance(argument, str):
                    strings.append(argument)
                if name and not name.startswith(("torch.", "collections.")):
                    yield name


def _find_tensors(loaded: object, label: str) -> dict[str, Tensor]:
    """The state dict in what a file holds, which may be the file itself or stand under a key."""
    if isinstance(loaded, Tensor):
        raise CheckpointError(f"{label} holds a single tensor, not a model.")
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{label} holds a {type(loaded).__name__}, not a model.")
    candidates = [loaded[key] for key in WEIGHT_KEYS if isinstance(loaded.get(key), Mapping)]
    for candidate in [*candidates, loaded]:
        tensors = {str(key): value.detach() for key, value in candidate.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
    raise CheckpointError(f"{label} holds no weights{_what_else(loaded)}.")


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
