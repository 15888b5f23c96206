"""CogVideoX LoRAs as diffusers, Kohya's scripts and LyCORIS name them, in the names that ComfyUI looks for.

ComfyUI maps such names for the models that it knows, and passes over what it can't place: stage I is not among them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from .convert import check_target
from .keymaps import DIT_DIFFUSERS, rename
from .weightfiles import CheckpointError, Weights, open_weights, some
from .whole_files import write_whole

PREFIX = "diffusion_model."  # before a layer's name in ComfyUI
_PARTS = re.compile(
    r"(?:transformer\.|diffusion_model\.|lora_unet_|lora_transformer_|lycoris_|)"
    r"(?P<stem>(?:transformer_blocks[._]|patch_embed\.|time_embedding\.|norm_out\.).+?|proj_out)"
    r"\.(?P<part>lora_(?:A|B|down|up)|lokr_\w+|hada_\w+|dora_scale|alpha)(?:\.default)?(?P<weight>\.weight)?"
)
_MATRIX = re.compile(r"(?P<layer>.+)\.lora_(?P<part>A|B|down|up)\.weight")
# Kohya's scripts and LyCORIS write every dot of a layer's name as _.
_UNDERSCORED = {old.replace(".", "_"): new for old, new in DIT_DIFFUSERS.items()}
_ADAPTER = "lora_adapter_metadata"  # where newer diffusers keep the adapters' strength, as JSON


def is_lora(names: Iterable[str]) -> bool:
    """Whether a file with these key names is a LoRA of CogVideoX in names that ComfyUI doesn't place."""
    return any("transformer_blocks" in name and _PARTS.fullmatch(name) for name in names)


def read_lora(source: Path) -> dict[str, Tensor]:
    """The matrices of the LoRA in `source` by ComfyUI's names; those of another kind of LoRA by the names they have.

    Raises CheckpointError if the file can't be read, and for layers that stage I doesn't have.
    """
    weights = open_weights(source)
    if is_lora(weights.shapes):
        return _in_comfyuis_names(weights)
    return {name: weights.read(name) for name in weights.shapes}


def convert_lora(source: Path, target: Path, *, force: bool = False) -> int:
    """Write the LoRA in `source` to the safetensors file `target` in ComfyUI's names; returns how many layers it has.

    An existing target is only replaced with `force`. Raises CheckpointError for layers that stage I doesn't have, and
    if the target can't be written.
    """
    weights = open_weights(source)
    check_target(source, target, force)
    state = _in_comfyuis_names(weights)
    data = save(state, metadata={**weights.metadata, "format": "pt"})
    write_whole(target, lambda part: part.write_bytes(data))
    return len(_layers(state))


def check_fit(lora: Mapping[str, Tensor], layers: Mapping[str, tuple[int, ...]]) -> None:
    """Every pair of matrices must belong to a layer of the model and have its width. Raises CheckpointError.

    `layers` are the shapes of the model's weights by the names that a LoRA may have for them. What else than pairs of
    matrices a file holds is not looked at.
    """
    for name, matrix in lora.items():
        if (match := _MATRIX.fullmatch(name)) is None:
            continue
        shape = layers.get(match["layer"])
        if shape is None:
            raise CheckpointError(f"it was made for another model: this one has no layer {match['layer']}.")
        down = match["part"] in ("A", "down")
        width, wanted = (math.prod(matrix.shape[1:]), math.prod(shape[1:])) if down else (matrix.shape[0], shape[0])
        if width != wanted:
            raise CheckpointError(
                f"it was made for another model: its {match['layer']} is {width} numbers wide, this model's {wanted}."
            )


def _in_comfyuis_names(weights: Weights) -> dict[str, Tensor]:
    names = {name: _renamed(name) for name in weights.shapes}
    if strange := [name for name, new in names.items() if new is None]:
        raise CheckpointError(f"{weights.label} has layers that FlashVideo's stage I doesn't have: {some(strange)}.")
    state = {new: weights.read(name).contiguous() for name, new in names.items()}
    if (alpha := _alpha(weights.metadata)) is not None:
        state = {f"{layer}.alpha": torch.tensor(alpha) for layer in _layers(state)} | state
    return state


def _layers(names: Iterable[str]) -> set[str]:
    return {name.removesuffix(".weight").rpartition(".")[0] for name in names}


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
