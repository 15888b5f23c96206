"""Write a diffusion transformer as a GGUF file, one tensor at a time, with the package `gguf`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..progress import Progress
from .keymaps import OWN_PREFIX
from .packed import PACKINGS, Packing
from .reading import Checkpoint
from .weights import CheckpointError

ARCHITECTURE = "flashvideo"  # loaders of other models' GGUF files refuse a name that they don't know
# What the package packs; of the kinds called K it only unpacks.
WRITTEN = {f"gguf_{each.name.lower()}": each for each in PACKINGS.values() if not each.name.endswith("K")}


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    kind: torch.dtype | Packing

    @property
    def row_bytes(self) -> int:
        """Length of a row, that is of the last axis."""
        last = self.shape[-1] if self.shape else 1
        return self.kind.row_bytes(last) if isinstance(self.kind, Packing) else last * self.kind.itemsize

    @property
    def nbytes(self) -> int:
        """How long it is."""
        return math.prod(self.shape[:-1]) * self.row_bytes


def gguf_package() -> ModuleType:
    """The package `gguf`. Raises CheckpointError if it isn't installed."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError("Writing GGUF files needs the package gguf: `pip install gguf`.") from error
    return gguf


def gguf_bytes(checkpoint: Checkpoint, packing: Packing, is_packed: Callable[[str, tuple[int, ...]], bool]) -> int:
    """About how long the file becomes: its tensors."""
    return sum(entry.nbytes for entry in _entries(checkpoint, packing, is_packed))


def write_gguf(
    path: Path,
    checkpoint: Checkpoint,
    packing: Packing,
    is_packed: Callable[[str, tuple[int, ...]], bool],
    metadata: Mapping[str, str],
    progress: Progress,
    on_error: Callable[[str, float], None] | None,
) -> None:
    """Write the tensors: those of which `is_packed` by name and shape packed, vectors in float32, others in bfloat16.

    `on_error` gets each packed layer's name and relative error.
    """
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, value in metadata.items():
        writer.add_string(name, value)
    entries = {entry.name: entry for entry in _entries(checkpoint, packing, is_packed)}
    for entry in entries.values():
        raw, stored = _raw_type(gguf, entry), (*entry.shape[:-1], entry.row_bytes)
        plain = entry.kind == torch.float32
        shape, dtype = (entry.shape, np.dtype(np.float32)) if plain else (stored, np.dtype(np.uint8))
        writer.add_tensor_info(OWN_PREFIX + entry.name, shape, dtype, entry.nbytes, None if plain else raw)
    done, total = 0, sum(entry.nbytes for entry in entries.values())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in checkpoint.tensors():
            entry = entries[name]
            writer.write_tensor_data(_stored(gguf, entry, tensor, on_error))
            done += entry.nbytes
            progress(done, total)
            checkpoint.weights.release()
    finally:
        writer.close()


def _entries(
    checkpoint: Checkpoint, packing: Packing, is_packed: Callable[[str, tuple[int, ...]], bool]
) -> Iterator[_Entry]:
    for source in checkpoint.plan.sources:
        for part in source.parts:
            shape = checkpoint.shapes[part.name]
            if is_packed(part.name, shape) and shape[-1] % packing.numbers == 0:
                yield _Entry(part.name, shape, packing)
            else:
                yield _Entry(part.name, shape, torch.bfloat16 if len(shape) > 1 else torch.float32)


def _raw_type(gguf: ModuleType, entry: _Entry) -> Any:
    kinds = gguf.GGMLQuantizationType
    return kinds(entry.kind.number) if isinstance(entry.kind, Packing) else kinds.BF16


def _stored(
    gguf: ModuleType, entry: _Entry, tensor: Tensor, on_error: Callable[[str, float], None] | None
) -> np.ndarray:
    """The bytes of a tensor."""
    if not isinstance(entry.kind, Packing):
        return tensor.to(entry.kind).contiguous().reshape(-1).view(torch.uint8).numpy()
    matrix = tensor.float()
    packed = gguf.quants.quantize(matrix.numpy(), _raw_type(gguf, entry))
    if on_error is not None:
        wrong = entry.kind.unpack(torch.from_numpy(packed)) - matrix
        on_error(entry.name.removesuffix(".weight"), float(wrong.norm() / matrix.norm().clamp_min(1e-30)))
    return packed
