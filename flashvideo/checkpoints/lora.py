"""CogVideoX LoRAs as diffusers, Kohya's scripts and LyCORIS name them, in the names that ComfyUI looks for.

ComfyUI maps such names for the models that it knows, which stage I is not, and ignores other names.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..atomic_files import write_whole
from ..config import NANO_STAGE1, NANO_STAGE2, STAGE1, STAGE2
from .convert import check_converted_target
from .keymaps import DIT_DIFFUSERS, rename
from .reading import STAGE_METADATA
from .weights import CheckpointError, Weights, open_weights, short, some

PREFIX = "diffusion_model."  # before a layer's name in ComfyUI
_BLOCKS = "transformer_blocks"  # in the names of most layers, by everyone but ComfyUI
_PARTS = re.compile(
    r"(?:base_model\.model\.)?(?:transformer\.|diffusion_model\.|lora_unet__?|lora_transformer_|lycoris_|)"
    rf"(?P<layer>(?:{_BLOCKS}|patch_embed|time_embedding|norm_out)[._].+?|proj_out)"
    r"\.(?P<part>lora_(?:A|B|down|up)|lokr_\w+|hada_\w+|dora_scale|alpha)(?:\.(?!weight$|bias$)\w+)?(?P<weight>\.weight)?"
)
# Kohya's scripts and LyCORIS write every dot of a layer's name as _.
_OUTSIDE = {name: name for name in ("patch_embed.proj", "patch_embed.text_proj", "norm_out.linear", "proj_out")}
_UNDERSCORED = {old.replace(".", "_"): new for old, new in (DIT_DIFFUSERS | _OUTSIDE).items()}
_ADAPTER = "lora_adapter_metadata"  # where newer diffusers store the adapters' strength, as JSON
_MATRIX = re.compile(r"(?P<layer>.+?)\.(?P<part>lora_(?:A|B|down|up|mid)|hada_\w+|lokr_\w+)(?:\.default)?(?:\.weight)?")


def needs_renaming(names: Iterable[str]) -> bool:
    """Whether these key names are those of a CogVideoX LoRA that ComfyUI can't place on stage I."""
    return any(_BLOCKS in name and _PARTS.fullmatch(name) for name in names)


def describe_lora(weights: Weights) -> str | None:
    """A LoRA's stage, base model and rank, for a message; None for any other file.

    The base is told by the width of the layers, as far as the official models and FlashVideo-Nano have it.
    """
    downs = {name: shape for name, shape in weights.shapes.items() if _is_down(name)}
    if not downs or not all(_MATRIX.fullmatch(name) or name.endswith(".alpha") for name in weights.shapes):
        return None
    ranks = sorted({shape[0] for shape in downs.values()})
    widths = Counter(shape[1] for shape in downs.values() if len(shape) == 2)
    stage = weights.metadata.get(STAGE_METADATA)
    bases = {1: (("the official", STAGE1), ("FlashVideo-Nano's", NANO_STAGE1)),
             2: (("the official", STAGE2), ("FlashVideo-Nano's", NANO_STAGE2))}  # fmt: skip
    width = widths.most_common(1)[0][0] if widths else 0
    number = int(stage) if stage in ("1", "2") else 1 if needs_renaming(weights.shapes) else 0
    base = next((name for name, config in bases.get(number, ()) if config.hidden_size == width), "a")
    model = f"{base} stage {'I' * number}" if number else "a model that it doesn't name"
    return (
        f"LoRA for {model} (width {width}), rank {' and '.join(map(str, ranks))}, {len(downs)} layers; "
        "for Load FlashVideo LoRA"
    )


def _is_down(name: str) -> bool:
    return (match := _MATRIX.fullmatch(name)) is not None and match["part"] in ("lora_A", "lora_down")


def read_lora(source: Path) -> dict[str, Tensor]:
    """The matrices of the LoRA in `source` by ComfyUI's names; those of another kind of LoRA by the names they have.

    They are copies: the file may be replaced. Raises CheckpointError if it can't be read or has parts that stage I
    doesn't know.
    """
    weights = open_weights(source)
    if needs_renaming(weights.shapes):
        return _in_comfyuis_names(weights)
    if unknown := [name for name in weights.shapes if _BLOCKS in name]:
        raise CheckpointError(f"{weights.label} has unknown layer names: {some(unknown)}.")
    return {name: weights.read(name).clone() for name in weights.shapes}


def convert_lora(source: Path, target: Path, *, force: bool = False) -> int:
    """Write the LoRA in `source` to the safetensors file `target` in ComfyUI's names; returns how many layers it has.

    An existing target is only replaced with `force`. Raises CheckpointError for parts that stage I doesn't know, and
    WriteError if the target can't be written.
    """
    weights = open_weights(source)
    check_converted_target(source, target, force)
    state = _in_comfyuis_names(weights)
    data = save(state, metadata={**weights.metadata, "format": "pt"})
    write_whole(target, lambda part: part.write_bytes(data), replace=force)
    return len({_layer(name) for name in state})


def check_fit(lora: Mapping[str, Tensor], layers: Mapping[str, tuple[int, ...]]) -> None:
    """What a LoRA, LoHa or LoKr adds to a layer must have the shape of its weights. Raises CheckpointError.

    `layers` are the shapes of the model's weights by the names that a LoRA may have for them.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, matrix in lora.items():
        if match := _MATRIX.fullmatch(name):
            found.setdefault(match["layer"], {})[match["part"]] = matrix
    for layer, parts in found.items():
        if layer not in layers:
            raise CheckpointError(f"it was made for another model: this one has no layer {layer}.")
        if any(matrix.ndim < 2 for matrix in parts.values()):
            raise CheckpointError(f"it is damaged: {layer} has parts that are not matrices.")
        try:
            added = _added(parts)
        except KeyError as error:
            raise CheckpointError(f"it is damaged: {layer} lacks {error}.") from error
        rows, *columns = layers[layer]
        wanted = (rows, math.prod(columns))
        if added is not None and added != wanted:
            raise CheckpointError(
                f"it was made for another model: its {layer} is {added[0]} by {added[1]} numbers, "
                f"this model's {wanted[0]} by {wanted[1]}."
            )


def _added(parts: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Rows and columns of what a layer's matrices add; None for a kind whose size isn't known. Raises KeyError."""

    def size(matrix: Tensor) -> tuple[int, int]:
        return matrix.shape[0], math.prod(matrix.shape[1:])

    def product(left: str, right: str) -> tuple[int, int]:
        return size(parts[left])[0], size(parts[right])[1]

    if parts.keys() & {"lora_mid", "hada_t1", "lokr_t2"}:  # of convolutions in three factors
        return None
    if any(part.startswith("hada_") for part in parts):
        return product("hada_w1_a", "hada_w1_b")
    if any(part.startswith("lokr_") for part in parts):
        sides = [
            size(parts[whole]) if whole in parts else product(f"{whole}_a", f"{whole}_b")
            for whole in ("lokr_w1", "lokr_w2")
        ]
        return sides[0][0] * sides[1][0], sides[0][1] * sides[1][1]
    up, down = ("lora_B", "lora_A") if parts.keys() & {"lora_A", "lora_B"} else ("lora_up", "lora_down")
    return product(up, down)


def _in_comfyuis_names(weights: Weights) -> dict[str, Tensor]:
    names = {name: _renamed(name) for name in weights.shapes}
    if strange := [name for name, new in names.items() if new is None]:
        raise CheckpointError(f"{weights.label} has parts that FlashVideo's stage I doesn't know: {some(strange)}.")
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"{weights.label} holds several LoRAs in one: {some(list(names))}.")
    state = {new: weights.read(name).clone().contiguous() for name, new in names.items()}
    return _alphas(weights, state) | state


def _renamed(name: str) -> str | None:
    match = _PARTS.fullmatch(name)
    if match is None:
        return None
    layer = rename(match["layer"], DIT_DIFFUSERS if "." in match["layer"] else _UNDERSCORED)
    return None if layer.startswith(_BLOCKS) else f"{PREFIX}{layer}.{match['part']}{match['weight'] or ''}"


def _layer(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[0]


def _alphas(weights: Weights, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each layer's alpha, where the metadata have one. Raises CheckpointError."""
    try:
        found = json.loads(weights.metadata.get(_ADAPTER, "{}"))
        settings = {key.rpartition(".")[2]: value for key, value in found.items() if value}
        alphas = {float(value) for key, value in found.items() if key.endswith("lora_alpha") and value is not None}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{weights.label}: its metadata can't be read ({short(error)}).") from error
    if len(alphas) > 1 or settings.get("alpha_pattern"):
        raise CheckpointError(f"{weights.label} gives its layers several strengths, and that isn't supported.")
    # rsLoRA scales by alpha / sqrt(rank), others by alpha / rank: alpha * sqrt(rank) gives the same with the latter.
    return {
        f"{_layer(name)}.alpha": torch.tensor(alpha * (len(down) ** 0.5 if settings.get("use_rslora") else 1.0))
        for name, down in state.items()
        for alpha in alphas
        if name.endswith(("lora_A.weight", "lora_down.weight")) and down.ndim
    }
