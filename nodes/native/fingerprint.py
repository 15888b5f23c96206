"""What tells a loaded network from any other, across restarts: its weights, what patches them, and what it is told."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import chain
from types import ModuleType
from typing import Any

import comfy.model_base
import comfy.model_patcher
import torch
from torch import Tensor

DIGEST_BYTES = 12
WHOLE = 2**20  # tensors of up to so many numbers are read whole
# What says nothing of a patch's settings, or changes from run to run.
_NOT_TAKEN_APART = (type, ModuleType, comfy.model_base.BaseModel)
DEPTH = 32  # of objects within objects: a patch's settings lie near the surface
PROBES = 256  # of a larger one so many are: no two trainings share them


def fingerprint(*values: object) -> str:
    """A short text that changes when anything in `values` does: numbers, texts, tensors and collections of these.

    Of functions the name counts, and what they were made with: a patch's settings, as a rule. Of other objects the
    class and all they hold.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    pieces = _Pieces()
    for piece in chain.from_iterable(pieces.of(value) for value in values):
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
    replaced = {name: each for name, each in patcher.object_patches.items() if name != "model_sampling"}
    hooks = list(getattr(patcher, "hook_patches", {}).values())
    return fingerprint(weights, patcher.patches, patcher.model_options, replaced, hooks)


class _Pieces:
    """Takes values apart, each object once: what holds itself comes to an end."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, object]] = {}  # by id; kept, or another object could get the same
        self._depth = 0

    def of(self, value: Any) -> Iterator[bytes]:
        """What a value consists of, as bytes."""
        if isinstance(value, Tensor):
            yield f"{value.dtype} {tuple(value.shape)}".encode()
            flat = value.detach().reshape(-1)
            if flat.numel() > WHOLE:
                flat = flat[:: flat.numel() // PROBES]
            yield flat.contiguous().cpu().view(torch.uint8).numpy().tobytes()
        elif isinstance(value, Mapping):
            for key in sorted(value, key=str):
                yield from chain(self.of(str(key)), self.of(value[key]))
        elif isinstance(value, (list, tuple)):
            yield f"{len(value)}".encode()
            for each in value:
                yield from self.of(each)
        elif value is None or isinstance(value, (str, bytes, int, float, torch.dtype, torch.device)):
            yield f"{type(value).__name__} {value!r} ".encode()
        else:
            yield from self._of_object(value)

    def _of_object(self, value: Any) -> Iterator[bytes]:
        kind = value if hasattr(value, "__qualname__") else type(value)
        yield f"{getattr(kind, '__module__', '')}.{kind.__qualname__}".encode()
        if id(value) in self._seen:
            yield f"{self._seen[id(value)][0]}".encode()
            return
        self._seen[id(value)] = (len(self._seen), value)
        if isinstance(value, comfy.model_patcher.ModelPatcher):
            yield from self.of(value.patches)
        elif self._depth < DEPTH and not isinstance(value, _NOT_TAKEN_APART):
            self._depth += 1
            for held in (*_made_with(value), getattr(value, "__dict__", None)):
                yield from self.of(held)
            self._depth -= 1


def _made_with(value: Any) -> Iterator[Any]:
    """What a function, a method or a partial call holds beside its code."""
    for name in ("__self__", "__func__", "__defaults__", "__kwdefaults__", "func", "args", "keywords"):
        yield getattr(value, name, None)
    for cell in getattr(value, "__closure__", None) or ():
        with suppress(ValueError):  # an empty cell
            yield cell.cell_contents
