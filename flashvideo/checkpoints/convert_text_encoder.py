"""Convert a T5 text encoder to GGUF, with llama.cpp's names, so that other loaders of such files read it, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..atomic_files import check_space, sha256, whole_file
from ..config import T5Config
from ..progress import PhaseProgress, no_phase_progress
from .catalogue import SOURCE_SHA256
from .convert import DTYPES, check_converted_target
from .gguf_writing import gguf_package, plan_gguf, write_gguf
from .packed import Packing
from .text_encoder import GGUF_ARCHITECTURE, TIED, gguf_name, open_text_encoder, t5_config
from .weights import QUANTISATION, CheckpointError, Weights, check_finite

_EMBEDDINGS, _POSITIONS = "token_embd.weight", "attn_rel_b.weight"  # not packed: they are small, and looked up


def convert_text_encoder(
    source: Path,
    target: Path,
    *,
    dtype: str,
    force: bool = False,
    progress: PhaseProgress | None = None,
    on_error: Callable[[str, float], None] | None = None,
) -> T5Config:
    """Write the T5 encoder in `source` to `target`, a GGUF file; `dtype` is one of DTYPES whose name begins with gguf.

    The matrices of its blocks are packed, everything else keeps 16 bits or more. `on_error` gets each packed matrix's
    name and relative error. An existing target is only replaced with `force`, and only once the new file is complete.
    Raises CheckpointError if the source is no T5 v1.1 encoder, WriteError if the target can't be written.
    """
    weights = open_text_encoder(source)
    config, packing = t5_config(weights), DTYPES[dtype]
    if not isinstance(packing, Packing):
        raise CheckpointError(
            "of a text encoder only GGUF files are made (--to gguf-q8-0, for example). In 8 bits there is one ready to "
            "download: t5xxl_fp8_e4m3fn_scaled.safetensors."
        )
    if weights.packings or any(QUANTISATION.search(name) for name in weights.shapes):
        raise CheckpointError(f"{source.name} is quantised already: convert the original instead.")
    check_converted_target(source, target, force, is_gguf=True)
    gguf_package()
    names = _names(weights)
    shapes = {new: weights.shapes[old] for new, old in names.items()}
    entries = plan_gguf(shapes, packing, _is_packed, lambda name: weights.dtypes[names[name]])
    check_space(target.parent, sum(entry.nbytes for entry in entries.values()), target.name)
    report = progress or no_phase_progress
    metadata = {SOURCE_SHA256: sha256(source, partial(report, "checksum"))}
    errors = on_error and (lambda name, error: on_error(name.removesuffix(".weight"), error))
    with whole_file(target, replace=force) as part:
        tensors = _tensors(weights, names)
        write_gguf(part, GGUF_ARCHITECTURE, entries, tensors, metadata, partial(report, "convert"), errors)
    return config


def _names(weights: Weights) -> dict[str, str]:
    """llama.cpp's names and the file's; the embeddings once, whichever of their two names they have."""
    twice = TIED in weights.shapes and "shared.weight" in weights.shapes
    kept = (name for name in weights.shapes if not (twice and name == TIED))
    return {_EMBEDDINGS if name == TIED else gguf_name(name): name for name in kept}


def _is_packed(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name != _EMBEDDINGS and not name.endswith(_POSITIONS)


def _tensors(weights: Weights, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    for new, old in names.items():
        tensor = weights.read(old)
        check_finite(weights.label, old, tensor)
        yield new, tensor.to(torch.float32) if tensor.dtype.itemsize == 1 else tensor
        weights.release()
