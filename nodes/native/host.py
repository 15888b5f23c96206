"""What newer versions of ComfyUI offer, found by its name and never by a version number.

On a host without it everything here does nothing, or falls back on what has always been there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...flashvideo.checkpoints.quantised import FORMAT, Format

KEY = "flashvideo"


def patcher_class(*, disable_dynamic: bool = False) -> type[ModelPatcher]:
    """ComfyUI's class of patchers: the one with dynamic VRAM where that is on, unless `disable_dynamic`."""
    return ModelPatcher if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)


def has_dynamic() -> bool:
    """Whether this ComfyUI has patchers with dynamic VRAM, on or not."""
    return hasattr(comfy.model_patcher, "CoreModelPatcher")


def assigned(patcher: ModelPatcher) -> dict[str, bool]:
    """The option with which a model of a dynamic patcher takes its weights: as the file has them, not copied."""
    return {"assign": True} if hasattr(patcher, "is_dynamic") and patcher.is_dynamic() else {}


def remember_loader(patcher: ModelPatcher, load: Callable[..., ModelPatcher], *arguments: Any) -> None:
    """Let ComfyUI load the model once more, for another device: `load(*arguments)`, also with disable_dynamic=True."""
    if hasattr(patcher, "cached_patcher_init"):
        patcher.cached_patcher_init = (load, arguments)


def when_on_another_device(patcher: ModelPatcher, follow: Callable[[ModelPatcher], None]) -> None:
    """Call `follow(copy)` whenever ComfyUI has made a copy of the model on another device."""
    event = getattr(comfy.patcher_extension.CallbacksMP, "ON_DEEPCLONE_MULTIGPU", None)
    if event is not None:
        patcher.add_callback_with_key(event, KEY, lambda _original, copy: follow(copy))


def let_go(patcher: ModelPatcher) -> None:
    """Part with a clone that was made for one run.

    ComfyUI's copies for other devices and their patcher hold each other. A clone and the model that it was made of
    would then go at one time, and ComfyUI's list of loaded models would name one that is gone, which its nodes don't
    expect.
    """
    patcher.additional_models.pop("multigpu", None)


def keep_quantised(stage: Any, state: dict[str, Tensor], layers: Mapping[str, Format]) -> bool:
    """Have ComfyUI's own quantised layers take these ones as they are; False if this ComfyUI can't.

    `stage` is the model's configuration and `state` its weights; both are set up for it in place. Products are made in
    full precision: in 8 bits, what flows through the network would be rounded, too.
    """
    make_layers = getattr(comfy.ops, "mixed_precision_ops", None)
    # The first versions of these layers, with another option, can't be saved.
    if make_layers is None or "quant_config" not in inspect.signature(make_layers).parameters:
        return False
    if any(form.core_name not in comfy.ops.QUANT_ALGOS for form in layers.values()):
        return False
    stage.quant_config = {"mixed_ops": True}
    for name, form in layers.items():
        state[f"{name}.{FORMAT}"] = form.description(full_precision_matrix_mult=True)
    return True


def holds_quantised(patcher: ModelPatcher) -> bool:
    """Whether ComfyUI's own quantised layers hold the model's weights, as `keep_quantised` arranged it."""
    return bool(getattr(patcher.model.model_config, "quant_config", None))
