"""Convert a checkpoint to safetensors with ComfyUI's names, one tensor at a time.

The header is written first, then each tensor as it is read, merged and cast, into a file beside the target that
takes the target's name only when it is complete. Nothing larger than a few tensors and a window of the mapped
source is ever in memory.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..atomic_files import check_space, check_target, sha256, whole_file
from ..progress import PhaseProgress, Progress, no_phase_progress
from .keymaps import OWN_PREFIX, Source
from .reading import STAGE_METADATA, Checkpoint, open_checkpoint
from .weights import SAFETENSORS_DTYPES, CheckpointError

LAYOUT_VERSION = "2"  # of the converted files' names; 1 had no prefix
WINDOW = 512 * 2**20  # bytes of the source to read before its pages are freed
DTYPES = {
    "keep": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")


@dataclass(frozen=True)
class _Item:
    """A source tensor, and the offset of its result in the new file."""

    source: Source
    dtypes: tuple[torch.dtype, ...]  # of its parts
    nbytes: int


def convert_file(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str = "keep",
    force: bool = False,
    progress: PhaseProgress | None = None,
) -> Checkpoint:
    """Write the FlashVideo or CogVideoX model in `source` to the safetensors file `target`.

    `dtype` is a key of DTYPES; fp8_e4m3fn applies to the matrices of the layers, and everything else becomes
    bfloat16. An existing target is only replaced with `force`, and only once the new file is complete; an
    interruption leaves it as it was and no half file.
    Raises CheckpointError if the source is no such model, WriteError if the target can't be written; returns what was
    read.
    """
    source, target = Path(source), Path(target)
    checkpoint = open_checkpoint(source)
    if dtype not in DTYPES:
        raise CheckpointError(f"unknown data type {dtype}: choose one of {', '.join(DTYPES)}.")
    if checkpoint.quantised:
        raise CheckpointError(f"{source.name} is quantised already: convert the original instead.")
    if checkpoint.stage == "vae" and dtype == "fp8_e4m3fn":
        raise CheckpointError("the VAE loses too much in 8 bits: choose bf16, fp16 or keep.")
    check_converted_target(source, target, force)
    report = progress or no_phase_progress
    items = _layout(checkpoint, DTYPES[dtype])
    check_space(target.parent, sum(item.nbytes for item in items), target.name)
    metadata = {
        **checkpoint.weights.metadata,
        "format": "pt",
        STAGE_METADATA: checkpoint.stage,
        "flashvideo.version": LAYOUT_VERSION,
        "flashvideo.source_sha256": sha256(source, partial(report, "checksum")),
    }
    with whole_file(target, replace=force) as part, part.open("wb") as file:
        file.write(_header(checkpoint, items, metadata))
        _write_tensors(file, checkpoint, items, partial(report, "convert"))
    return checkpoint


def check_converted_target(source: Path, target: Path, force: bool) -> None:
    """Refuse a target that can't or shouldn't be written. Raises WriteError and CheckpointError."""
    if target.suffix.lower() in _PICKLE_SUFFIXES:
        raise CheckpointError(f"{target.name} should end in .safetensors: that is what is written.")
    check_target(target, force=force, source=source)


def _layout(checkpoint: Checkpoint, dtype: torch.dtype | None) -> list[_Item]:
    """What to write, in order: the widest data types first, so that every tensor is aligned."""
    items = []
    for source in checkpoint.plan.sources:
        dtypes = tuple(_target_dtype(checkpoint, source, part.name, dtype) for part in source.parts)
        sizes = (math.prod(checkpoint.shapes[part.name]) for part in source.parts)
        items.append(_Item(source, dtypes, sum(n * kind.itemsize for n, kind in zip(sizes, dtypes, strict=True))))
    return sorted(items, key=lambda item: -item.dtypes[0].itemsize)


def _target_dtype(checkpoint: Checkpoint, source: Source, name: str, dtype: torch.dtype | None) -> torch.dtype:
    if dtype == torch.float8_e4m3fn and not (name.startswith("blocks.") and len(checkpoint.shapes[name]) == 2):
        return torch.bfloat16
    stored = dtype or checkpoint.dtype(source)
    if stored not in _DTYPE_NAMES:
        raise CheckpointError(f"{checkpoint.weights.label}: {source.key} has a data type that can't be stored.")
    return stored


def _header(checkpoint: Checkpoint, items: list[_Item], metadata: dict[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": metadata}
    prefix = "" if checkpoint.stage == "vae" else OWN_PREFIX  # ComfyUI's own VAE loader knows FlashVideo's VAE
    offset = 0
    for item in items:
        for part, dtype in zip(item.source.parts, item.dtypes, strict=True):
            shape = checkpoint.shapes[part.name]
            end = offset + math.prod(shape) * dtype.itemsize
            entries[prefix + part.name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start on a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text


def _write_tensors(file: BinaryIO, checkpoint: Checkpoint, items: list[_Item], progress: Progress) -> None:
    done, total, window = 0, sum(item.nbytes for item in items), 0
    for item in items:
        for (_, tensor), dtype in zip(checkpoint.convert(item.source), item.dtypes, strict=True):
            file.write(_bytes(_cast(tensor, dtype)))
            window += tensor.nbytes
        tensor = None  # a view of the source would keep it mapped
        if window >= WINDOW:
            checkpoint.weights.release()
            window = 0
        done += item.nbytes
        progress(done, total)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast; what the new type can't hold becomes its largest number instead of infinity."""
    if dtype != tensor.dtype and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
        limit = torch.finfo(dtype).max
        tensor = tensor.float().clamp(-limit, limit)
    return tensor.to(dtype)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
