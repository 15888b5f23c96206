"""CogVideoX LoRAs as diffusers and Kohya's scripts name them, for ComfyUI's own LoRA loaders.

ComfyUI maps such names for the models that it knows, and passes over what it can't place: stage I is not among them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from .convert import check_target
from .keymaps import DIT_DIFFUSERS, rename
from .weightfiles import CheckpointError, open_weights, some
from .whole_files import write_whole

PREFIX = "diffusion_model."  # before a layer's name in ComfyUI
_PARTS = re.compile(
    r"(?:transformer\.|diffusion_model\.|lora_unet_|lora_transformer_|)"
    r"(?P<stem>(?:transformer_blocks[._]|patch_embed\.|time_embedding\.|norm_out\.).+?|proj_out)"
    r"\.(?P<part>lora_A|lora_B|lora_down|lora_up|alpha)(?:\.default)?(?P<weight>\.weight)?"
)
# Kohya's scripts write every dot of a layer's name as _.
_UNDERSCORED = {old.replace(".", "_"): new for old, new in DIT_DIFFUSERS.items()}
_ADAPTER = "lora_adapter_metadata"  # where newer diffusers keep the adapters' strength, as JSON


def is_lora(names: Iterable[str]) -> bool:
    """Whether a file with these key names is a LoRA of CogVideoX in names that ComfyUI doesn't place."""
    return any("transformer_blocks" in name and _PARTS.fullmatch(name) for name in names)


def convert_lora(source: Path, target: Path, *, force: bool = False) -> int:
    """Write the LoRA in `source` to the safetensors file `target` in ComfyUI's names; returns how many layers it has.

    An existing target is only replaced with `force`. Raises CheckpointError for layers that stage I doesn't have, and
    if the target can't be written.
    """
    weights = open_weights(source)
    check_target(source, target, force)
    names = {name: _renamed(name) for name in weights.shapes}
    if strange := [name for name, new in names.items() if new is None]:
        raise CheckpointError(f"{weights.label} has layers that FlashVideo's stage I doesn't have: {some(strange)}.")
    state = {new: weights.read(name).contiguous() for name, new in names.items()}
    layers = {name.rpartition(".lora_")[0] for name in state if ".lora_" in name}
    if (alpha := _alpha(weights.metadata)) is not None:
        state = {f"{layer}.alpha": torch.tensor(alpha) for layer in layers} | state
    data = save(state, metadata={**weights.metadata, "format": "pt"})
    write_whole(target, lambda part: part.write_bytes(data))
    return len(layers)


def _renamed(name: str) -> str | None:
    match = _PARTS.fullmatch(name)
    if match is None:
        return None
    stem = rename(match["stem"], _UNDERSCORED if "." not in match["stem"] else DIT_DIFFUSERS)
    return None if stem.startswith("transformer_blocks") else f"{PREFIX}{stem}.{match['part']}{match['weight'] or ''}"


def _alpha(metadata: Mapping[str, str]) -> float | None:
    """By what the adapters are multiplied, in ranks, where the metadata say so. Raises CheckpointError."""
    try:
        found = json.loads(metadata.get(_ADAPTER, "{}"))
        alpha = {float(value) for key, value in found.items() if key.endswith("lora_alpha")}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the LoRA's metadata can't be read ({error}).") from error
    if len(alpha) > 1:
        raise CheckpointError(f"the LoRA's metadata name several strengths ({sorted(alpha)}), and don't say of what.")
    return next(iter(alpha), None)
