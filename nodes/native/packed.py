"""GGUF's packed weights in ComfyUI: layers that keep them as they are in the file and unpack them when they run.

LoRAs, those of hooks as well, are added to the unpacked matrix, so that the packed one stays. Where ComfyUI needs a
matrix with the LoRA in it, to save it, `convert_weight` and `set_weight`, which ComfyUI looks for, put a plain one in
its place for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from comfy.hooks import HookGroup
from comfy.model_patcher import LowVramPatch, ModelPatcher
from torch import Tensor

from ...flashvideo.checkpoints.packed import PACKINGS, Packing
from ...flashvideo.checkpoints.weights import PACKING

_WEIGHT = ".weight"


class PackedOperations(comfy.ops.manual_cast):
    """ComfyUI's layers, whose linear ones take packed weights."""

    class Linear(comfy.ops.manual_cast.Linear):
        """x W^T + b, where W [out, in] may be packed."""

        def __init__(
            self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
        ) -> None:
            torch.nn.Module.__init__(self)  # the parent's would take memory for the whole matrix
            self.in_features, self.out_features, self.stored = in_features, out_features, dtype
            self.weight = _parameter(torch.empty(0, device=device, dtype=dtype))
            self.bias = _parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
            self.packing: Packing | None = None

        def _load_from_state_dict(
            self, state: dict[str, Tensor], prefix: str, _metadata: Any, _strict: bool, missing: list[str], *_: Any
        ) -> None:
            kind = state.get(prefix + PACKING)
            self.packing = None if kind is None else PACKINGS[int(kind)]
            if kind is not None:
                self.register_buffer(PACKING, kind.clone())
            for name in ("weight", "bias"):
                if getattr(self, name) is None:
                    continue
                if (found := state.get(prefix + name)) is None:
                    missing.append(prefix + name)
                else:
                    dtype = found.dtype if name == "weight" and self.packing else self.stored
                    setattr(self, name, _parameter(found.to(dtype, copy=True)))

        def convert_weight(self, weight: Tensor, inplace: bool = False, **_: Any) -> Tensor:
            """The plain matrix of a packed one, whose bytes may have become numbers of another type on the way."""
            if self.packing is None or weight.shape == (self.out_features, self.in_features):
                return weight
            dtype = weight.dtype if weight.is_floating_point() else torch.float32
            return self.packing.unpack(weight.to(torch.uint8), dtype)

        def set_weight(
            self, weight: Tensor, inplace_update: bool = False, seed: Any = None, return_weight: bool = False, **_: Any
        ) -> Tensor | None:
            """Take a plain matrix in place of the present one, or only return it."""
            if return_weight:
                return weight
            self.weight = _parameter(weight.to(self.stored or torch.bfloat16))
            return None

        def forward(self, x: Tensor) -> Tensor:
            """x [..., in] to [..., out]."""
            if self.packing is None or self.weight.dtype != torch.uint8:
                return super().forward(x)
            blocking = comfy.model_management.device_supports_non_blocking(x.device)
            packed = comfy.model_management.cast_to(self.weight, None, x.device, non_blocking=blocking)
            bias = self.bias
            if bias is not None:
                bias = comfy.model_management.cast_to(bias, x.dtype, x.device, non_blocking=blocking)
                bias = _changed(bias, self.bias_function)
            return self.packing.linear(x, packed, bias, partial(_changed, changes=self.weight_function))


def _changed(tensor: Tensor, changes: Iterable[Callable[[Tensor], Tensor]]) -> Tensor:
    for change in changes:
        tensor = change(tensor)
    return tensor


def _parameter(tensor: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


class PackedPatcher(ModelPatcher):
    """ComfyUI's patcher, which leaves packed weights packed: LoRAs are added whenever a layer unpacks its own."""

    _merging = False  # while ComfyUI asks for weights with the LoRA in them
    _hooked: Mapping[str, list] = MappingProxyType({})  # patches of the hooks that are in force, by the weights' names

    def _packed_layers(self) -> dict[str, PackedOperations.Linear]:
        """Layers by the names of their weights."""
        modules = self.model.named_modules()
        found = {name + _WEIGHT: module for name, module in modules if isinstance(module, PackedOperations.Linear)}
        return {key: layer for key, layer in found.items() if layer.packing is not None}

    def _attach(self, *, patches: bool) -> None:
        """Have each packed layer add this patcher's LoRAs, and those of its hooks, once; none if not `patches`."""
        wanted = (self.patches, self._hooked) if patches else ()
        for key, layer in self._packed_layers().items():
            changes = [change for change in layer.weight_function if not isinstance(change, LowVramPatch)]
            if layer.weight.dtype == torch.uint8:
                changes += [
                    LowVramPatch(key, found, layer.convert_weight, layer.set_weight) for found in wanted if key in found
                ]
            layer.weight_function = changes

    def _is_packed(self, key: str) -> bool:
        if not key.endswith(_WEIGHT):
            return False
        layer = self.model.get_submodule(key.removesuffix(_WEIGHT))
        return isinstance(layer, PackedOperations.Linear) and layer.packing is not None

    def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's, but a packed weight stays as it is unless the merged one is needed."""
        if not self._merging and self._is_packed(key):
            return None
        return super().patch_weight_to_device(key, *args, **kwargs)

    def patch_hooks(self, hooks: HookGroup | None) -> None:
        """ComfyUI's; packed layers add what `hooks` say whenever they unpack."""
        super().patch_hooks(hooks)
        self._hooked = self.get_combined_hook_patches(hooks) if hooks is not None else {}
        self._attach(patches=True)

    def patch_hook_weight_to_device(
        self, hooks: HookGroup, combined_patches: dict, key: str, original_weights: dict, memory_counter: Any
    ) -> None:
        """ComfyUI's, but a packed weight stays as it is; one that was merged to be saved isn't packed."""
        if not (self._is_packed(key) and comfy.utils.get_attr(self.model, key).dtype == torch.uint8):
            super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        """ComfyUI's."""
        super().unpatch_hooks(whitelist_keys_set)
        if not whitelist_keys_set and self._hooked:
            self._hooked = {}
            self._attach(patches=True)

    def load(self, *args: Any, force_patch_weights: bool = False, **kwargs: Any) -> Any:
        """ComfyUI's."""
        self._merging = force_patch_weights
        try:
            result = super().load(*args, force_patch_weights=force_patch_weights, **kwargs)
        finally:
            self._merging = False
        self._attach(patches=True)
        return result

    def partially_unload(self, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's."""
        result = super().partially_unload(*args, **kwargs)
        self._attach(patches=True)
        return result

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        """ComfyUI's."""
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            self._attach(patches=False)

    def model_state_dict_for_saving(self, model: Any = None, prefix: str = "") -> dict[str, Tensor]:
        """What newer ComfyUIs save: packed weights as they are, or with the LoRA in them."""
        state = super().model_state_dict_for_saving(model, prefix)
        for key, layer in self._packed_layers().items():
            weight = layer.weight.data
            if key in self.patches and weight.dtype == torch.uint8:
                patch = LowVramPatch(key, self.patches, layer.convert_weight, layer.set_weight)
                weight = patch(layer.convert_weight(weight)).bfloat16()
            state[key.removeprefix(prefix)] = weight
        return state


def leave_packed(patcher: ModelPatcher) -> None:
    """Have a patcher that ComfyUI has made, and may have loaded already, leave packed weights packed from now on."""
    patcher.__class__ = PackedPatcher  # which has the same attributes


def keep_packed(state: dict[str, Tensor], packings: Mapping[str, Packing]) -> None:
    """Mark packed weights for the layers above, in place; `packings` by the weights' names."""
    for name, packing in packings.items():
        state[name.removesuffix("weight") + PACKING] = torch.tensor(packing.number, dtype=torch.uint8)


def unpacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with plain weights, bfloat16, in place of packed ones."""
    plain = {}
    for name, tensor in state.items():
        kind = state.get(name.removesuffix("weight") + PACKING) if name.endswith(_WEIGHT) else None
        if kind is not None:
            packed = tensor.dtype == torch.uint8  # otherwise a LoRA was added to it for saving
            tensor = PACKINGS[int(kind)].unpack(tensor, torch.bfloat16) if packed else tensor.bfloat16()
        if not name.endswith(f".{PACKING}"):
            plain[name] = tensor
    return plain
