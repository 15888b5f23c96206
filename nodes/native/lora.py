"""LoRAs on both stages, by ComfyUI's own patches."""

from __future__ import annotations

from pathlib import Path

import comfy.lora
import comfy.model_patcher

from ...flashvideo.checkpoints import CheckpointError
from ...flashvideo.checkpoints.lora import check_fit, read_lora
from ...flashvideo.checkpoints.weights import some


def add_lora(model: comfy.model_patcher.ModelPatcher, path: Path, strength: float) -> comfy.model_patcher.ModelPatcher:
    """The MODEL with the LoRA in a file added, times `strength`. Raises CheckpointError if it doesn't fit."""
    lora = read_lora(path)
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    state = model.model.state_dict()
    try:
        check_fit(lora, {name: tuple(state[key].shape) for name, key in names.items() if key in state})
    except CheckpointError as error:
        raise CheckpointError(f"{path.name} can't be used: {error}") from None
    patches = comfy.lora.load_lora(lora, names, log_missing=False)
    if not patches:
        raise CheckpointError(f"{path.name} can't be used: it isn't a LoRA, or is made for another model.")
    used = set().union(*(getattr(patch, "loaded_keys", lora) for patch in patches.values()))
    if unused := sorted(lora.keys() - used):
        raise CheckpointError(f"{path.name} can't be used: no layer of this model takes {some(unused)}.")
    patched = model.clone()
    patched.add_patches(patches, strength)
    return patched
