"""Write a network as a GGUF file, one tensor at a time, with the package `gguf`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..progress import Progress
from .packed import PACKINGS, Packing
from .weights import CheckpointError

# What the package packs; of the kinds called K it only unpacks.
WRITTEN = {f"gguf_{each.name.lower()}": each for each in PACKINGS.values() if not each.name.endswith("K")}


@dataclass(frozen=True)
class Entry:
    """A tensor of the new file: its shape, and the type of its numbers or how it is packed."""

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


def plan_gguf(
    shapes: Mapping[str, tuple[int, ...]],
    packing: Packing,
    is_packed: Callable[[str, tuple[int, ...]], bool],
    plain: Callable[[str], torch.dtype | None],
) -> dict[str, Entry]:
    """The new file's tensors by name: those of which `is_packed` packed, vectors in float32, others as `plain` says.

    A matrix whose rows can't be packed isn't; `plain` gives 16-bit types, and anything else becomes bfloat16.
    """
    entries = {}
    for name, shape in shapes.items():
        if is_packed(name, shape) and shape[-1] % packing.numbers == 0:
            entries[name] = Entry(shape, packing)
        elif len(shape) < 2:
            entries[name] = Entry(shape, torch.float32)
        else:
            entries[name] = Entry(shape, torch.float16 if plain(name) == torch.float16 else torch.bfloat16)
    return entries


def gguf_package() -> ModuleType:
    """The package `gguf`. Raises CheckpointError if it isn't installed."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError("Writing GGUF files needs the package gguf: `pip install gguf`.") from error
    return gguf


def write_gguf(
    path: Path,
    architecture: str,
    entries: Mapping[str, Entry],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    progress: Progress,
    on_error: Callable[[str, float], None] | None,
) -> None:
    """Write the planned tensors, which come in the order of the plan.

    `on_error` gets each packed matrix's name and relative error.
    """
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, value in metadata.items():
        writer.add_string(name, value)
    for name, entry in entries.items():
        raw, stored = _raw_type(gguf, entry), (*entry.shape[:-1], entry.row_bytes)
        plain = entry.kind == torch.float32
        shape, dtype = (entry.shape, np.dtype(np.float32)) if plain else (stored, np.dtype(np.uint8))
        writer.add_tensor_info(name, shape, dtype, entry.nbytes, None if plain else raw)
    done, total = 0, sum(entry.nbytes for entry in entries.values())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors:
            writer.write_tensor_data(_stored(gguf, name, entries[name], tensor, on_error))
            done += entries[name].nbytes
            progress(done, total)
    finally:
        writer.close()


def _raw_type(gguf: ModuleType, entry: Entry) -> Any:
    kinds = gguf.GGMLQuantizationType
    if isinstance(entry.kind, Packing):
        return kinds(entry.kind.number)
    return kinds.F16 if entry.kind == torch.float16 else kinds.BF16


def _stored(
    gguf: ModuleType, name: str, entry: Entry, tensor: Tensor, on_error: Callable[[str, float], None] | None
) -> np.ndarray:
    """The bytes of a tensor."""
    if not isinstance(entry.kind, Packing):
        return tensor.to(entry.kind).contiguous().reshape(-1).view(torch.uint8).numpy()
    matrix = tensor.float()
    packed = gguf.quants.quantize(matrix.numpy(), _raw_type(gguf, entry))
    if on_error is not None:
        wrong = entry.kind.unpack(torch.from_numpy(packed)) - matrix
        on_error(name, float(wrong.norm() / matrix.norm().clamp_min(1e-30)))
    return packed
