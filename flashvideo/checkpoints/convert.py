"""Convert a checkpoint to safetensors (or GGUF) with ComfyUI's names, one tensor at a time.

The header is written first, then each tensor as it is read, merged and cast, into a file beside the target that
takes the target's name only when it is complete. Nothing larger than a few tensors and a window of the mapped
source is ever in memory.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..atomic_files import check_space, check_target, sha256, whole_file
from ..progress import PhaseProgress, Progress, no_phase_progress
from .catalogue import SOURCE_SHA256
from .gguf_header import SUFFIX
from .gguf_writing import WRITTEN, gguf_package, plan_gguf, write_gguf
from .keymaps import OWN_PREFIX, Part, Source
from .packed import Packing
from .quantised import FORMAT, FORMATS, Format, relative_error
from .reading import STAGE_METADATA, Checkpoint, open_checkpoint
from .weights import SAFETENSORS_DTYPES, CheckpointError

GGUF_ARCHITECTURE = "flashvideo"  # loaders of other models' GGUF files refuse a name that they don't know
LAYOUT_VERSION = "2"  # of the converted files' names; 1 had no prefix
WINDOW = 512 * 2**20  # bytes of the source to read before its pages are freed
DTYPES = {
    "keep": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    **FORMATS,
    **WRITTEN,
}
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")


@dataclass(frozen=True)
class _Entry:
    """A tensor of the new file, and where its bytes begin after the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """How long it is."""
        return math.prod(self.shape) * self.dtype.itemsize


def convert_file(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str = "keep",
    force: bool = False,
    progress: PhaseProgress | None = None,
    on_error: Callable[[str, float], None] | None = None,
) -> Checkpoint:
    """Write the FlashVideo or CogVideoX model in `source` to `target`, a safetensors file, or a GGUF file.

    `dtype` is a key of DTYPES; those of 8 and 4 bits apply to the matrices of the layers, and everything else becomes
    bfloat16. `on_error` gets each quantised layer's name and relative error. An existing target is only replaced with
    `force`, and only once the new file is complete; an interruption leaves it as it was and no half file.
    Raises CheckpointError if the source is no such model, WriteError if the target can't be written; returns what was
    read.
    """
    source, target = Path(source), Path(target)
    checkpoint = open_checkpoint(source)
    if dtype not in DTYPES:
        raise CheckpointError(f"unknown data type {dtype}: choose one of {', '.join(DTYPES)}.")
    if checkpoint.quantised:
        raise CheckpointError(f"{source.name} is quantised already: convert the original instead.")
    kind = DTYPES[dtype]
    if checkpoint.stage == "vae" and (isinstance(kind, Format | Packing) or kind == torch.float8_e4m3fn):
        raise CheckpointError("the VAE loses too much in 8 bits: choose bf16, fp16 or keep.")
    check_converted_target(source, target, force, is_gguf=isinstance(kind, Packing))
    report = progress or no_phase_progress
    if isinstance(kind, Packing):
        gguf_package()
        plan = plan_gguf(checkpoint.shapes, kind, _is_layers_matrix, lambda _name: torch.bfloat16)
        entries = {OWN_PREFIX + name: entry for name, entry in plan.items()}
    else:
        entries = _layout(checkpoint, kind)
    check_space(target.parent, sum(entry.nbytes for entry in entries.values()), target.name)
    metadata = {
        **checkpoint.weights.metadata,
        "format": "pt",
        STAGE_METADATA: checkpoint.stage,
        "flashvideo.version": LAYOUT_VERSION,
        SOURCE_SHA256: sha256(source, partial(report, "checksum")),
    }
    if isinstance(kind, Packing):
        with whole_file(target, replace=force) as part:
            tensors, progress = _own_names(checkpoint), partial(report, "convert")
            write_gguf(part, GGUF_ARCHITECTURE, entries, tensors, metadata, progress, on_error and _by_layer(on_error))
        return checkpoint
    with whole_file(target, replace=force) as part, part.open("wb") as file:
        file.write(_header(checkpoint, entries, metadata))
        _write_tensors(file, checkpoint, kind, entries, partial(report, "convert"), on_error)
    return checkpoint


def _own_names(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """The tensors by a GGUF file's names; each one's pages are freed after it."""
    for name, tensor in checkpoint.tensors():
        yield OWN_PREFIX + name, tensor
        checkpoint.weights.release()


def _by_layer(on_error: Callable[[str, float], None]) -> Callable[[str, float], None]:
    """The same for a GGUF file's names of matrices."""
    return lambda name, error: on_error(name.removeprefix(OWN_PREFIX).removesuffix(".weight"), error)


def check_converted_target(source: Path, target: Path, force: bool, *, is_gguf: bool = False) -> None:
    """Refuse a target that can't or shouldn't be written. Raises WriteError and CheckpointError."""
    if is_gguf != (target.suffix.lower() == SUFFIX):
        what, ending = ("a GGUF file", SUFFIX) if is_gguf else ("a safetensors file", ".safetensors")
        raise CheckpointError(f"{target.name} should end in {ending}: {what} is what is written.")
    if target.suffix.lower() in _PICKLE_SUFFIXES:
        raise CheckpointError(f"{target.name} should end in .safetensors: that is what is written.")
    check_target(target, force=force, source=source)


def _layout(checkpoint: Checkpoint, kind: torch.dtype | Format | None) -> dict[str, _Entry]:
    """What to write, by name: the widest data types first, so that every tensor is aligned."""
    parts = [(source, part) for source in checkpoint.plan.sources for part in source.parts]
    found = [entry for source, part in parts for entry in _of(checkpoint, source, part, kind)]
    entries, offset = {}, 0
    for entry in sorted(found, key=lambda entry: -entry.dtype.itemsize):
        entries[entry.name] = replace(entry, offset=offset)
        offset += entry.nbytes
    return entries


def _of(checkpoint: Checkpoint, source: Source, part: Part, kind: torch.dtype | Format | None) -> Iterator[_Entry]:
    """What a part of a source becomes."""
    name, shape = part.name, checkpoint.shapes[part.name]
    if not isinstance(kind, Format):
        yield _Entry(name, _target_dtype(checkpoint, source, name, kind), shape)
    elif not _is_layers_matrix(name, shape) or not kind.fits(shape):
        yield _Entry(name, torch.bfloat16, shape)
    else:
        layer = name.removesuffix("weight")
        for what, (dtype, stored) in kind.layout(shape).items():
            yield _Entry(layer + what, dtype, stored)
        yield _Entry(layer + FORMAT, torch.uint8, tuple(kind.description().shape))


def _is_layers_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith("blocks.") and len(shape) == 2


def _target_dtype(checkpoint: Checkpoint, source: Source, name: str, dtype: torch.dtype | None) -> torch.dtype:
    if dtype == torch.float8_e4m3fn and not _is_layers_matrix(name, checkpoint.shapes[name]):
        return torch.bfloat16
    stored = dtype or checkpoint.dtype(source)
    if stored not in _DTYPE_NAMES:
        raise CheckpointError(f"{checkpoint.weights.label}: {source.key} has a data type that can't be stored.")
    return stored


def _header(checkpoint: Checkpoint, entries: Mapping[str, _Entry], metadata: dict[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata}
    prefix = "" if checkpoint.stage == "vae" else OWN_PREFIX  # ComfyUI's own VAE loader knows FlashVideo's VAE
    for entry in entries.values():
        place = [entry.offset, entry.offset + entry.nbytes]
        header[prefix + entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": place,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start on a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text


def _write_tensors(
    file: BinaryIO,
    checkpoint: Checkpoint,
    kind: torch.dtype | Format | None,
    entries: Mapping[str, _Entry],
    progress: Progress,
    on_error: Callable[[str, float], None] | None,
) -> None:
    start, total = file.tell(), sum(entry.nbytes for entry in entries.values())
    done = window = 0

    def write(name: str, tensor: Tensor) -> None:
        nonlocal done
        file.seek(start + entries[name].offset)
        file.write(_bytes(tensor))
        done += tensor.nbytes

    for source in checkpoint.plan.sources:
        for name, tensor in checkpoint.convert(source):
            layer = name.removesuffix("weight")
            if layer + FORMAT in entries:
                parts = kind.quantise(tensor)
                for what, stored in {**parts, FORMAT: kind.description()}.items():
                    write(layer + what, stored)
                if on_error is not None:
                    on_error(layer.rstrip("."), relative_error(tensor, kind, parts))
            else:
                write(name, _cast(tensor, entries[name].dtype))
            window += tensor.nbytes
        tensor = None  # a view of the source would keep it mapped
        if window >= WINDOW:
            checkpoint.weights.release()
            window = 0
        progress(done, total)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast; what the new type can't hold becomes its largest number instead of infinity."""
    if dtype != tensor.dtype and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
        limit = torch.finfo(dtype).max
        tensor = tensor.float().clamp(-limit, limit)
    return tensor.to(dtype)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
