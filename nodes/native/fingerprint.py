"""A fingerprint of a loaded network that holds across restarts: its weights, patches, options and inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from types import ModuleType
from typing import Any

import comfy.hooks
import comfy.model_base
import comfy.model_patcher
import numpy as np
import torch
from torch import Tensor, nn

DIGEST_BYTES = 12
WHOLE = 2**20  # tensors of up to so many numbers are hashed whole
# Holds no settings of a patch, or changes from run to run.
_NOT_TAKEN_APART = (type, ModuleType, comfy.model_base.BaseModel)
_COMPILED = "OptimizedModule"  # a class of torch.compile, compared by name because its module is slow to import
_COMPILING = "torch.compile"  # ComfyUI's name for the wrapper that compiles; its settings are options
_NO_SETTINGS = {"__dict__", "__weakref__"}  # slots that are no attributes
_RUNNING = {"_skip_adding"}  # state of the current run in hooks
DEPTH = 32  # of objects within objects: a patch's settings are near the top
_PLAIN = (str, bytes, int, float, complex, range, slice, torch.dtype, torch.device)
PROBES = 256  # numbers that are hashed of a larger one: two trainings never share them


def fingerprint(*values: object) -> str:
    """A short text that changes when anything in `values` does: numbers, texts, tensors and collections of these.

    Functions count by name and by what they hold (defaults, closures, arguments), which are a patch's settings as a
    rule. Other objects count by class and attributes.
    """
    return _digest(values, _Pieces())


def weights_fingerprint(patcher: comfy.model_patcher.ModelPatcher) -> str:
    """The fingerprint of a MODEL's or VAE's weights, LoRAs, options and wrappers, wherever the weights are now."""
    # Not all of the model's state: ComfyUI swaps its model_sampling from run to run.
    network = getattr(patcher.model, "diffusion_model", patcher.model)
    prefix = "" if network is patcher.model else "diffusion_model."
    weights = {
        name: getattr(patcher.backup.get(name), "weight", tensor)  # a backup is the weight before LoRAs went in
        for name, tensor in network.state_dict(prefix=prefix).items()
    }
    return _digest((weights, *_changes(patcher)), _Pieces(patcher.model.named_modules()))


def patches_fingerprint(patcher: comfy.model_patcher.ModelPatcher) -> str:
    """The same without the weights: what nodes behind the loader have changed."""
    return _digest(_changes(patcher), _Pieces(patcher.model.named_modules()))


def _changes(patcher: comfy.model_patcher.ModelPatcher) -> tuple[Any, ...]:
    replaced = {name: each for name, each in patcher.object_patches.items() if name != "model_sampling"}
    hooks = list(getattr(patcher, "hook_patches", {}).values())
    wrappers = [{key: each for key, each in of.items() if key != _COMPILING} for of in patcher.wrappers.values()]
    return patcher.patches, patcher.model_options, replaced, hooks, wrappers


def _digest(values: Iterable[object], pieces: _Pieces) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for piece in chain.from_iterable(pieces.of(value) for value in values):
        digest.update(piece)
    return digest.hexdigest()


class _Pieces:
    """Splits values into bytes, each object once, so that circular references end.

    The modules in `known` count by name only: a run changes them, and their weights are hashed elsewhere.
    """

    def __init__(self, known: Iterable[tuple[str, nn.Module]] = ()) -> None:
        self._seen: dict[int, tuple[int, object]] = {}  # by id; holds the object, or another could get its id
        self._known = {id(module): name for name, module in known}
        self._inside: set[int] = set()  # collections that are being split
        self._depth = 0

    def of(self, value: Any) -> Iterator[bytes]:
        """What a value consists of, as bytes."""
        if isinstance(value, Tensor):
            yield f"{value.dtype} {tuple(value.shape)}".encode()
            flat = value.detach().reshape(-1)
            if flat.numel() > WHOLE:
                flat = flat[:: flat.numel() // PROBES]
            yield flat.contiguous().cpu().view(torch.uint8).numpy().tobytes()
        elif isinstance(value, (np.ndarray, np.generic)):
            yield f"{value.dtype} {value.shape} ".encode() + np.ascontiguousarray(value).tobytes()
        elif isinstance(value, (Mapping, list, tuple, set, frozenset)):
            yield from self._of_collection(value)
        elif value is None or isinstance(value, _PLAIN):
            yield f"{type(value).__name__} {value!r} ".encode()
        else:
            yield from self._of_object(value)

    def _of_collection(self, value: Any) -> Iterator[bytes]:
        if id(value) in self._inside:
            yield b"itself"
            return
        self._inside.add(id(value))
        if isinstance(value, Mapping):
            for key in sorted(value, key=str):
                yield from chain(self.of(str(key)), self.of(value[key]))
        else:
            yield f"{len(value)}".encode()
            for each in sorted(value, key=_order) if isinstance(value, (set, frozenset)) else value:
                yield from self.of(each)
        self._inside.remove(id(value))

    def _of_object(self, value: Any) -> Iterator[bytes]:
        kind = value if hasattr(value, "__qualname__") else type(value)
        yield f"{getattr(kind, '__module__', '')}.{kind.__qualname__}".encode()
        if id(value) in self._seen:
            yield f"{self._seen[id(value)][0]}".encode()
            return
        self._seen[id(value)] = (len(self._seen), value)
        if id(value) in self._known:
            yield self._known[id(value)].encode()
        elif isinstance(value, comfy.model_patcher.ModelPatcher):
            yield from self.of(value.patches)
        elif isinstance(value, comfy.hooks.HookKeyframeGroup):  # also holds the position in the current run
            yield from self.of([(each.strength, each.start_percent, each.guarantee_steps) for each in value.keyframes])
        elif self._depth < DEPTH and not isinstance(value, _NOT_TAKEN_APART) and type(value).__name__ != _COMPILED:
            self._depth += 1
            attributes = {name: each for name, each in _attributes(value).items() if name not in _RUNNING}
            for held in (*_made_with(value), attributes):
                yield from self.of(held)
            self._depth -= 1


def _order(value: Any) -> str:
    """Sort key of a set's members, the same in every run."""
    return f"{type(value).__qualname__} {value if isinstance(value, _PLAIN) else ''}"


def _attributes(value: Any) -> dict[str, Any]:
    slots = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
    names = {name for each in slots for name in ([each] if isinstance(each, str) else each)} - _NO_SETTINGS
    return {name: getattr(value, name) for name in names if hasattr(value, name)} | getattr(value, "__dict__", {})


def _made_with(value: Any) -> Iterator[Any]:
    """What a function, a method or a partial call holds besides its code."""
    for name in ("__self__", "__func__", "__defaults__", "__kwdefaults__", "func", "args", "keywords"):
        yield getattr(value, name, None)
    for cell in getattr(value, "__closure__", None) or ():
        with suppress(ValueError):  # an empty cell
            yield cell.cell_contents
