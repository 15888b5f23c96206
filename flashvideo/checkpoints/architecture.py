"""A network's architecture from the shapes of its weights, so that any depth and width loads."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache

from ..config import DiTConfig, VAEConfig
from ..dit import FlashVideoDiT
from ..vae import VideoVAE
from .keymaps import NORM_GROUPS_METADATA
from .weights import CheckpointError, short, some

Shapes = Mapping[str, tuple[int, ...]]

MAX_NORM_GROUPS = 32
MAX_LAYERS = 512  # of any kind: more are a mistake or an attack, and building takes about 65 KB and 2 ms each
MAX_BLOCKS = 32  # of the VAE, in a level; the official one has 4
EXTRA_EMBEDDINGS = ("degradation_embedding", "frame_count_embedding")  # only stage II has these


def dit_config(shapes: Shapes) -> DiTConfig:
    """Architecture of a diffusion transformer from the shapes of its converted weights.

    Raises CheckpointError if a tensor that says a size is missing, or the sizes contradict each other.
    """
    sizes = _Sizes(shapes)
    if len(shapes.get("patch_embed.proj.weight", (0, 0, 0, 0))) == 2:
        raise CheckpointError("it seems to be CogVideoX 1.5, whose patches span two frames; FlashVideo's span one")
    hidden = sizes("patch_embed.proj.weight", 0)
    head = sizes("blocks.*.norm_q.weight", 0)
    patch = sizes("patch_embed.proj.weight", 2)
    config = {
        "num_layers": sizes.count("blocks.*."),
        "time_embed_dim": sizes("time_embedding_linear_1.weight", 0),
        "text_dim": sizes("patch_embed.text_proj.weight", 1),
        "ff_dim": sizes("blocks.*.ff_proj.weight", 0),
        "in_channels": sizes("patch_embed.proj.weight", 1),
    }
    out = sizes("proj_out.weight", 0)
    sizes.raise_if_missing()
    if hidden % head or out % patch**2:
        raise CheckpointError(
            f"its sizes contradict each other: width {hidden}, heads of {head}, {out} outputs for patches of {patch}"
        )
    # One without the other can't be: the checks then name what is missing.
    refines = any(name.startswith(EXTRA_EMBEDDINGS) for name in shapes)
    return DiTConfig(
        hidden_size=hidden,
        num_heads=hidden // head,
        out_channels=out // patch**2,
        patch_size=patch,
        degradation_embedding=refines,
        frame_count_embedding=refines,
        **config,
    )


def vae_config(shapes: Shapes, metadata: Mapping[str, str] | None = None) -> VAEConfig:
    """Architecture of the VAE from the shapes of its converted weights.

    The number of norm groups leaves no trace in shapes: it stands in the file's `metadata` (see NORM_GROUPS_METADATA),
    or is the largest up to 32 that divides every width. Raises CheckpointError if a tensor that says a size is missing,
    or the sizes contradict each other.
    """
    sizes = _Sizes(shapes)
    base = sizes("encoder.conv_in.conv.weight", 0)
    levels = sizes.count("encoder.down_blocks.*.", MAX_BLOCKS)
    widths = [sizes(f"encoder.down_blocks.{level}.resnets.0.conv1.conv.weight", 0) for level in range(levels)]
    config = {
        "encoder_blocks": sizes.count("encoder.down_blocks.0.resnets.*.", MAX_BLOCKS),
        "decoder_blocks": sizes.count("decoder.up_blocks.0.resnets.*.", MAX_BLOCKS),
        "latent_channels": sizes("decoder.conv_in.conv.weight", 1),
        "image_channels": sizes("encoder.conv_in.conv.weight", 1),
    }
    sizes.raise_if_missing()
    if any(width % base for width in widths):
        raise CheckpointError(f"its sizes contradict each other: levels of {widths} channels on a base of {base}")
    return VAEConfig(
        base_channels=base,
        channel_multipliers=tuple(width // base for width in widths),
        norm_groups=_norm_groups(widths, (metadata or {}).get(NORM_GROUPS_METADATA)),
        **config,
    )


def default_norm_groups(widths: Iterable[int]) -> int:
    """Norm groups of a VAE with levels of these channels, where nothing else is said: 32 in the official one."""
    return math.gcd(MAX_NORM_GROUPS, *widths)


def _norm_groups(widths: Sequence[int], stated: str | None) -> int:
    if stated is None:
        return default_norm_groups(widths)
    groups = int(stated) if re.fullmatch(r"[0-9]{1,5}", str(stated)) else 0
    if groups < 1 or any(width % groups for width in widths):
        raise CheckpointError(
            f"its metadata give {str(stated)[:20]!r} as {NORM_GROUPS_METADATA}, and its levels have "
            f"{', '.join(map(str, widths))} channels: the number of norm groups must divide them all"
        )
    return groups


def layer_count(numbers: Collection[int], what: str = "it", most: int = MAX_LAYERS) -> int:
    """How many layers there are where `what` names these, from 0 on. Raises CheckpointError for more than can be."""
    last = max(numbers, default=0)
    if last >= most:
        raise CheckpointError(f"{what} names a layer {short(f'{last:,}')}, and no network has more than {most}")
    if 2 * len(set(numbers)) < last:
        raise CheckpointError(f"{what} names a layer {last}, and holds {len(set(numbers))} layers only")
    return 1 + last


class _Sizes:
    """Looks sizes up in shapes, and records the tensors that are needed for one and missing."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.missing: list[str] = []

    def __call__(self, name: str, axis: int) -> int:
        """Size of an axis of the tensor `name`; a * in it matches the first number that is found."""
        pattern = re.compile(re.escape(name).replace(r"\*", r"\d+"))
        shape = next((self.shapes[key] for key in self.shapes if pattern.fullmatch(key)), ())
        if axis < len(shape) and shape[axis] > 0:
            return shape[axis]
        self.missing.append(name.replace("*", "0"))
        return 1

    def count(self, name: str, most: int = MAX_LAYERS) -> int:
        """One more than the largest number in the place of the * in names that start like this."""
        pattern = re.compile(re.escape(name).replace(r"\*", r"(\d+)"))
        numbers = [int(match[1]) for key in self.shapes if (match := pattern.match(key))]
        if not numbers:
            self.missing.append(name.replace("*", "0").rstrip("."))
        return layer_count(numbers, most=most)

    def raise_if_missing(self) -> None:
        if self.missing:
            raise CheckpointError(f"weights that show its size are missing or malformed: {some(self.missing)}.")


@lru_cache(maxsize=8)  # a run opens the same networks several times
def network_shapes(config: DiTConfig | VAEConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's weights, which are not to be changed. Raises what the network does."""
    network = FlashVideoDiT if isinstance(config, DiTConfig) else VideoVAE
    state = network(config, device="meta").state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
