"""What tells a loaded network from any other, across restarts: its weights, what patches them, and what it is told."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import comfy.model_patcher
import torch
from torch import Tensor

DIGEST_BYTES = 12
WHOLE = 2**20  # tensors of up to so many numbers are read whole
PROBES = 256  # of a larger one so many are: no two trainings share them


def fingerprint(*values: object) -> str:
    """A short text that changes when anything in `values` does: numbers, texts, tensors and collections of these.

    Of functions and other objects only the name counts, and the weights, settings and inner function that they hold.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for piece in chain.from_iterable(_pieces(value) for value in values):
        digest.update(piece)
    return digest.hexdigest()


def weights_fingerprint(patcher: comfy.model_patcher.ModelPatcher) -> str:
    """The fingerprint of a MODEL's or VAE's weights, LoRAs and options, wherever ComfyUI keeps the weights now."""
    # Not all of the model's state: ComfyUI swaps its model_sampling from run to run.
    network = getattr(patcher.model, "diffusion_model", patcher.model)
    prefix = "" if network is patcher.model else "diffusion_model."
    weights = {
        name: getattr(patcher.backup.get(name), "weight", tensor)  # a backup is the weight before LoRAs went in
        for name, tensor in network.state_dict(prefix=prefix).items()
    }
    return fingerprint(weights, patcher.patches, patcher.model_options)


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        flat = value.detach().reshape(-1)
        if flat.numel() > WHOLE:
            flat = flat[:: flat.numel() // PROBES]
        yield flat.contiguous().cpu().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from chain(_pieces(str(key)), _pieces(value[key]))
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)}".encode()
        for each in value:
            yield from _pieces(each)
    elif value is None or isinstance(value, (str, int, float)):
        yield f"{type(value).__name__} {value!r} ".encode()
    else:
        kind = value if hasattr(value, "__qualname__") else type(value)
        yield f"{kind.__module__}.{kind.__qualname__}".encode()
        for held in ("weights", "settings", "inner"):
            yield from _pieces(getattr(value, held, None))
