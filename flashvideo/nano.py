"""FlashVideo-Nano: a miniature of all four networks, small enough to come with the pack, so that graphs run anywhere.

The networks are the official ones in smaller sizes. Stage II and the VAE are there twice: trained on drawn scenes, in
whose latents stage I drafts, and on real footage. Weights are read from models/nano beside this package; if they are
missing, untrained ones are made from a seed: they run through every graph, and give coloured noise.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .checkpoints.architecture import NORM_GROUPS_METADATA
from .checkpoints.weights import StateDict, open_weights
from .config import (
    NANO_FOOTAGE_STAGE2,
    NANO_FOOTAGE_VAE,
    NANO_STAGE1,
    NANO_STAGE2,
    NANO_TEXT_ENCODER,
    NANO_VAE,
    STAGE1,
    STAGE2,
    VAE,
    DiTConfig,
    VAEConfig,
)
from .dit import FlashVideoDiT
from .t5 import t5_shapes
from .vae import VideoVAE

NANO_FOLDER = Path(__file__).resolve().parents[1] / "models" / "nano"
NANO_PARTS = ("stage1", "stage2", "vae", "text_encoder", "footage_stage2", "footage_vae")
NANO_SEED = 250205179  # FlashVideo's arXiv number; any would do
NANO_DTYPE = torch.float16
PART_METADATA = "flashvideo.built_in"  # in a state dict of ours: which of NANO_PARTS it is
PREVIEW_METADATA = "flashvideo.preview"  # in the VAE's file: the map from latent to colour, as JSON
NANO_NOTICE = (
    "FlashVideo-Nano is untrained: it shows that the graph runs, and makes coloured noise. "
    "Choose the official FlashVideo model files for real pictures."
)

# Whose latents a network reads and makes, in words: networks of two families don't belong together.
DRAWN, FOOTAGE, OFFICIAL = "FlashVideo-Nano for drawn scenes", "FlashVideo-Nano for real footage", "the official models"
NANO_FAMILIES = (DRAWN, FOOTAGE)
_FAMILIES = {"stage1": DRAWN, "stage2": DRAWN, "vae": DRAWN, "footage_stage2": FOOTAGE, "footage_vae": FOOTAGE}

_STAGES = {"stage1": NANO_STAGE1, "stage2": NANO_STAGE2, "footage_stage2": NANO_FOOTAGE_STAGE2}
_VAES = {"vae": NANO_VAE, "footage_vae": NANO_FOOTAGE_VAE}

# Standard deviations of untrained weights, in units of 1 / sqrt(inputs); the first name that a key contains counts.
_GAINS: tuple[tuple[str, float], ...] = (
    # SiLU of a normal variable has a root mean square of 0.596: this makes the latents of any picture about 1.
    ("encoder.conv_out.", 1 / 0.596),
    # The decoder's norms follow the latent a little, as the trained ones do, but stay near a plain norm.
    (".conv_y.", 0.2),
    (".conv_b.", 0.2),
    # Small gates: every layer adds little, and the depth can't blow up.
    (".norm1.linear.", 0.1),
    (".norm2.linear.", 0.1),
    ("norm_out.linear.", 0.1),
    # T5's own initialisation: embeddings of standard deviation 1, and queries without the usual 1 / sqrt(d_kv) later.
    ("shared.", math.sqrt(NANO_TEXT_ENCODER.d_model)),
    (".SelfAttention.q.", 1 / math.sqrt(NANO_TEXT_ENCODER.d_kv)),
)


def nano_is_trained(folder: Path = NANO_FOLDER) -> bool:
    """Whether trained weights of all parts are there."""
    return all(_file(part, folder).is_file() for part in NANO_PARTS)


def nano_state(part: str, folder: Path = NANO_FOLDER) -> StateDict:
    """Weights of one of NANO_PARTS by their converted names, in half precision, with their file's metadata.

    The trained ones if `nano_is_trained`, else untrained ones that are the same in every run and on every machine.
    Raises CheckpointError for a damaged file.
    """
    if not nano_is_trained(folder):
        return build_part(part, NANO_SEED)
    weights = open_weights(_file(part, folder))
    state = {name: weights.read(name).to(NANO_DTYPE) for name in weights.shapes}  # some are stored in 8 bits
    return StateDict(state, {**weights.metadata, PART_METADATA: part})


def latent_family(source: object, config: DiTConfig | VAEConfig | None) -> str | None:
    """Whose latents a DiT or VAE reads and makes: DRAWN, FOOTAGE or OFFICIAL; None where that can't be known.

    `source`: what it was loaded from: one of NANO_PARTS, a state dict of `nano_state`, or a file. A file in Nano's
    sizes may be anybody's training. `config`: only needed for files.
    """
    part = source
    if isinstance(source, Path):
        part = source.stem if source.resolve().parent == NANO_FOLDER else None
    elif isinstance(source, Mapping):
        part = getattr(source, "metadata", {}).get(PART_METADATA)
    if isinstance(part, str) and part in _FAMILIES:
        return _FAMILIES[part]
    return OFFICIAL if config in (STAGE1, STAGE2, VAE) else None


def pair_notice(model: str | None, vae: str | None) -> str | None:
    """A warning where a model and a VAE, by their `latent_family`, don't belong together."""
    if model is None or vae is None or model == vae:
        return None
    return (
        f"The model is of {model}, and the VAE of {vae}: they don't belong together, and the picture is worse, or "
        "noise. Take both of one kind."
    )


def nano_preview(config: DiTConfig, folder: Path = NANO_FOLDER) -> Tensor | None:
    """Linear map from a Nano stage's latents in raw scale to colours in [-1, 1], for previews.

    [17, 3]: red, green and blue for each channel; the last row is the bias. None for other networks, and if Nano is
    untrained.
    """
    stage = next((part for part, known in _STAGES.items() if known == config), None)
    if stage is None or not nano_is_trained(folder):
        return None
    factors = open_weights(_file("footage_vae" if stage == "footage_stage2" else "vae", folder)).metadata.get(
        PREVIEW_METADATA
    )
    return None if factors is None else torch.tensor(json.loads(factors))


def build_nano(seed: int) -> dict[str, StateDict]:
    """Untrained weights of all parts: part -> name -> tensor, the same for a seed on every machine."""
    return {part: build_part(part, seed) for part in NANO_PARTS}


def build_part(part: str, seed: int) -> StateDict:
    """Untrained weights of one of NANO_PARTS, as `build_nano` makes them."""
    metadata = {NORM_GROUPS_METADATA: str(_VAES[part].norm_groups)} if part in _VAES else {}
    metadata[PART_METADATA] = part
    shapes = _shapes(part).items()
    return StateDict({name: _initial(f"{part}.{name}", shape, seed).to(NANO_DTYPE) for name, shape in shapes}, metadata)


def _file(part: str, folder: Path) -> Path:
    return folder / f"{part}.safetensors"


def _initial(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if len(shape) == 1:
        # Of the vectors, only norms' weights and their scales start at one.
        ones = key.endswith(".weight") or ".conv_y." in key
        return torch.ones(shape) if ones else torch.zeros(shape)
    gain = next((gain for name, gain in _GAINS if name in key), 1.0)
    # One generator a tensor: a weight depends on its own name only. Uniform, because torch's normal draws differ in
    # the last bit from one kind of processor to the next.
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(key.encode()) + seed)
    limit = gain * math.sqrt(3 / math.prod(shape[1:]))
    return (2 * torch.rand(shape, generator=generator) - 1) * limit


def _shapes(part: str) -> Mapping[str, tuple[int, ...]]:
    if part == "text_encoder":
        return t5_shapes(NANO_TEXT_ENCODER)
    with torch.device("meta"):
        network = VideoVAE(_VAES[part]) if part in _VAES else FlashVideoDiT(_STAGES[part])
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
