"""What newer versions of ComfyUI offer, found by its name and never by a version number.

On a host without it everything here does nothing, or falls back on what has always been there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
from comfy.model_patcher import ModelPatcher

KEY = "flashvideo"


def patcher_class(*, disable_dynamic: bool = False) -> type[ModelPatcher]:
    """ComfyUI's class of patchers: the one with dynamic VRAM where that is on, unless `disable_dynamic`."""
    return ModelPatcher if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)


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
