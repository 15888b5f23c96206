"""Read FlashVideo's networks from any file that holds them.

Layouts, recognised by key names and shapes: the official stage1.pt and stage2.pt (LoRA matrices split or merged)
and 3d-vae.pt, converted safetensors, and diffusers' CogVideoX. The architecture follows from the shapes, so any
depth and width loads. A file that doesn't fit is refused with one message that says why.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import STAGE2, DiTConfig, VAEConfig
from ..dit import FlashVideoDiT
from ..vae import VideoVAE
from .architecture import EXTRA_EMBEDDINGS, Shapes, dit_config, network_shapes, vae_config
from .foreign import describe_foreign, is_lora
from .keymaps import NORM_GROUPS_METADATA, Layout, Part, Plan, Source, find_layout, make_plan, original_name
from .packed import Packing
from .quantised import SCALE, Format, quantised_layers, unreadable
from .weights import QUANTISATION, CheckpointError, Weights, check_finite, open_weights, short, some

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "dit_config",
    "load_dit",
    "load_vae",
    "open_checkpoint",
    "read_dit",
    "read_stored_dit",
    "read_vae",
    "vae_config",
]

FileSource = str | Path | Mapping[str, Any]

log = logging.getLogger(__name__)

STAGE_METADATA = "flashvideo.stage"  # "1", "2" or "vae"
STAGE_NAMES = {"1": "stage I", "2": "stage II", "vae": "the VAE"}
_WHOLE = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # data types that a network can compute in


@dataclass(frozen=True)
class StoredDiT:
    """A diffusion transformer's weights as its file stores them, by their converted names.

    Of each of the `layers` there are weight, weight_scale and comfy_quant; the matrices of `packings` are bytes.
    """

    config: DiTConfig
    state: dict[str, Tensor]
    layers: dict[str, Format]
    packings: dict[str, Packing]


@dataclass(frozen=True)
class Checkpoint:
    """A recognised and checked file, its tensors unread. `shapes` are the converted ones."""

    weights: Weights
    layout: Layout
    plan: Plan
    config: DiTConfig | VAEConfig
    shapes: dict[str, tuple[int, ...]]

    @property
    def stage(self) -> str:
        """The metadata's word for it: "1", "2" or "vae"."""
        return str(self.config.stage) if isinstance(self.config, DiTConfig) else "vae"

    @property
    def quantised(self) -> bool:
        """Whether there are scale factors for the weights, or weights that are not floating-point numbers."""
        dtypes = (self.weights.dtypes[source.key] for source in self.plan.sources)
        return any(QUANTISATION.search(name) for name in self.shapes) or any(
            dtype is None or not dtype.is_floating_point for dtype in dtypes
        )

    @cached_property
    def layers(self) -> dict[str, Format]:
        """Formats of the quantised layers by name, empty for a file without any.

        Raises CheckpointError for formats that aren't known here, and for files whose names aren't ComfyUI's: there a
        layer may be a part of a file's matrix.
        """
        if not self.quantised:
            return {}
        whole = all(part.of == 1 for source in self.plan.sources for part in source.parts)
        names = {part.name: source.key for source in self.plan.sources for part in source.parts}
        if not whole or self.stage == "vae":
            raise unreadable(self.weights.label)
        return quantised_layers(self.weights, names, _network_shapes(self))

    @property
    def packings(self) -> dict[str, Packing]:
        """How a GGUF file packs the network's matrices, by their converted names."""
        kept = (source for source in self.plan.sources if not source.lora_a)
        found = {part.name: self.weights.packings.get(source.key) for source in kept for part in source.parts}
        return {name: packing for name, packing in found.items() if packing is not None}

    def packed_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """As `tensors`, with the matrices of `packings` as they are: bytes [out, bytes of a row]."""
        for source in self.plan.sources:
            if source.lora_a or source.key not in self.weights.packings:
                yield from self.convert(source)
                continue
            packed = self.weights.read_packed(source.key)
            for part in source.parts:
                yield part.name, _rows(packed, part)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Converted names and tensors, one source tensor at a time, in the file's order; quantised ones as they are."""
        for source in self.plan.sources:
            yield from self.convert(source)

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The same without quantised ones: those become bfloat16 matrices."""
        layers = self.layers
        keys = {part.name: source.key for source in self.plan.sources for part in source.parts}
        for name, tensor in self.tensors():
            layer, _, what = name.rpartition(".")
            if layer not in layers or what == "bias":
                yield name, tensor
            elif what == "weight":
                scales = {each: self.weights.read(keys[f"{layer}.{each}"]) for each in layers[layer].scales}
                yield name, layers[layer].dequantise({what: tensor, **scales}).bfloat16()

    def convert(self, source: Source) -> Iterator[tuple[str, Tensor]]:
        """The converted tensors that one source becomes."""
        whole = self._merged(source)
        layer, _, what = source.parts[0].name.rpartition(".")
        scales = what == SCALE and layer in self.layers
        check_finite(self.weights.label, source.key, self.layers[layer].scale_values(whole) if scales else whole)
        for part in source.parts:
            yield part.name, _rows(whole, part)

    def dtype(self, source: Source) -> torch.dtype | None:
        """Data type of what a source becomes: a merged weight takes its bias's."""
        bias = source.key.removesuffix("weight") + "bias"
        return self.weights.dtypes[bias if source.lora_a and bias in self.weights.dtypes else source.key]

    def _merged(self, source: Source) -> Tensor:
        """W + concat_rows(B_j A_j) / rank in float32 (LoRA alpha is 1); the tensor itself if it has no LoRA."""
        weight = self.weights.read(source.key)
        if not source.lora_a:
            return weight
        merged = weight.float() if weight.dtype != torch.float32 else weight.clone()
        pairs = zip(source.lora_a, source.lora_b, strict=True)
        for rows, (a, b) in zip(merged.chunk(len(source.lora_a)), pairs, strict=True):
            down = self.weights.read(a).float()  # [rank, in]
            rows.addmm_(self.weights.read(b).float(), down, alpha=1 / down.shape[0])
        return merged.to(self.dtype(source))


def _rows(whole: Tensor, part: Part) -> Tensor:
    if part.of == 1:
        return whole
    chunks = whole.chunk(part.of)
    if len(part.chunks) == 1:
        return chunks[part.chunks[0]]
    return torch.cat([chunks[index] for index in part.chunks])


def open_checkpoint(source: FileSource, *, kind: str | None = None, stage: int | None = None) -> Checkpoint:
    """Recognise and check a file without reading its tensors.

    `kind` is "dit" or "vae" where only that will do; `stage` 1 or 2 where it must be that one.
    Raises CheckpointError if the file is something else, damaged, or doesn't fit its architecture.
    """
    weights = open_weights(source)
    layout = None if is_lora(weights.shapes) else find_layout(weights.shapes, kind)
    if layout is None:
        raise CheckpointError(f"{weights.label} is no FlashVideo model: {describe_foreign(weights.shapes)}.")
    if kind not in (None, layout.kind):
        is_, needed = ("FlashVideo's VAE", "a diffusion model (stage I or II)")
        if layout.kind == "dit":
            is_, needed = ("a FlashVideo or CogVideoX diffusion model", "the VAE")
        raise CheckpointError(f"{weights.label} is {is_}, and {needed} is needed here.")
    plan = make_plan(weights.shapes, layout)
    shapes = {part.name: part.shape(weights.shapes[entry.key]) for entry in plan.sources for part in entry.parts}
    checkpoint = Checkpoint(weights, layout, plan, _config(weights, layout, shapes), shapes)
    _refuse_relatives(checkpoint, str(stage or weights.metadata.get(STAGE_METADATA, "")))
    _check(checkpoint)
    return checkpoint


def _config(weights: Weights, layout: Layout, shapes: Shapes) -> DiTConfig | VAEConfig:
    try:
        return dit_config(shapes) if layout.kind == "dit" else vae_config(shapes, _vae_metadata(weights, layout))
    except CheckpointError as error:
        what = "a FlashVideo diffusion model" if layout.kind == "dit" else "FlashVideo's VAE"
        raise CheckpointError(f"{weights.label} was taken for {what} ({layout.naming} layout): {error}") from error


def _vae_metadata(weights: Weights, layout: Layout) -> dict[str, str]:
    """A VAE's metadata. ComfyUI's VAE Save and Save Checkpoint keep tensors alone, so that one's shape may say it."""
    mark = weights.shapes.get(layout.prefix + NORM_GROUPS_METADATA)
    return weights.metadata if mark is None else {NORM_GROUPS_METADATA: str(mark[0] if mark else 0), **weights.metadata}


def _refuse_relatives(checkpoint: Checkpoint, stage: str) -> None:
    """Refuse CogVideoX's other models, and a stage II without its two embeddings."""
    config, label = checkpoint.config, checkpoint.weights.label
    if not isinstance(config, DiTConfig):
        return
    if config.in_channels == 2 * config.out_channels:
        raise CheckpointError(
            f"{label} is no FlashVideo model: it seems to be CogVideoX image-to-video ({config.in_channels} input "
            f"channels; FlashVideo has {config.out_channels})."
        )
    if config.stage == 1 and (config.num_layers, config.hidden_size) == (STAGE2.num_layers, STAGE2.hidden_size):
        raise CheckpointError(
            f"{label} has the size of stage II, but its two embeddings are missing ({_embedding_names(checkpoint)}). "
            "It seems to be CogVideoX-2B, which can't refine, or an incomplete stage II file."
        )
    if stage == "2" and config.stage == 1:
        raise CheckpointError(
            f"{label} was taken for stage II, but the two embeddings that stage I doesn't have are missing "
            f"({_embedding_names(checkpoint)}). It seems to be a stage I model, or an incomplete stage II file."
        )
    if stage == "1" and config.stage == 2:
        raise CheckpointError(f"{label} is a stage II model (the refiner), and stage I is needed here.")


def _embedding_names(checkpoint: Checkpoint) -> str:
    names = (original_name(f"{name}.linear_1.weight", checkpoint.layout) for name in EXTRA_EMBEDDINGS)
    return ", ".join(name.removesuffix(".weight").rpartition(".")[0] + ".*" for name in names)


def _check(checkpoint: Checkpoint) -> None:
    """Compare every name and shape with the network's own; one message for all that differs."""
    expected = _network_shapes(checkpoint)
    found, layout = checkpoint.shapes, checkpoint.layout
    levels = len(checkpoint.config.channel_multipliers) if isinstance(checkpoint.config, VAEConfig) else 0
    keys = {part.name: source.key for source in checkpoint.plan.sources for part in source.parts}
    missing = [original_name(name, layout, levels) for name in expected if name not in found]
    unexpected = [keys[name] for name in found if name not in expected and not QUANTISATION.search(name)]
    misshapen = [
        f"{keys[name]} makes {_text(found[name])}, not {_text(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape and not checkpoint.quantised
    ]
    misshapen += [line for source in checkpoint.plan.sources if (line := _lora_trouble(checkpoint.weights, source))]
    troubles = {
        "missing": list(dict.fromkeys(missing)),
        "unexpected": [*checkpoint.plan.unexpected, *unexpected],
        "wrong shape": misshapen,
    }
    if any(troubles.values()):
        lines = [f"  {what} ({len(names)}): {some(names)}" for what, names in troubles.items() if names]
        raise CheckpointError(
            f"{checkpoint.weights.label} was taken for {describe(checkpoint)}, but doesn't fit:\n" + "\n".join(lines)
        )
    if checkpoint.plan.foreign:
        log.warning(
            "%s: ignored %d keys of other models (%s)",
            checkpoint.weights.label,
            len(checkpoint.plan.foreign),
            some(checkpoint.plan.foreign),
        )


def _network_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    try:
        return network_shapes(checkpoint.config)
    except (ValueError, ArithmeticError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{checkpoint.weights.label}: no network has these sizes ({short(error)}).") from error


def _lora_trouble(weights: Weights, source: Source) -> str | None:
    """Why the LoRA matrices of a source don't multiply to its shape; None if they do, or there are none."""
    if not source.lora_a and not source.lora_b:
        return None
    downs = [weights.shapes[key] for key in source.lora_a]
    ups = [weights.shapes[key] for key in source.lora_b]
    if any(len(shape) != 2 for shape in (*downs, *ups, weights.shapes[source.key])):
        return f"{source.key} and its LoRA matrices, which are not all matrices"
    rows, columns = weights.shapes[source.key]
    if len(downs) != len(ups):
        return f"{source.key} has {len(downs)} LoRA matrices A and {len(ups)} B"
    for down, up in zip(downs, ups, strict=True):
        if (*up, *down) != (rows // len(ups), down[0], down[0], columns):
            return f"{source.key} {_text((rows, columns))} with LoRA {_text(up)} x {_text(down)}"
    return None


def describe(checkpoint: Checkpoint) -> str:
    """A file's stage, size and layout, for a message."""
    config = checkpoint.config
    if isinstance(config, DiTConfig):
        size = f"{config.num_layers} layers of {config.hidden_size}"
    else:
        widths = (str(multiplier * config.base_channels) for multiplier in config.channel_multipliers)
        size = f"{'x'.join(widths)} channels"
    return f"FlashVideo {STAGE_NAMES[checkpoint.stage]} ({size}, {checkpoint.layout.naming} layout)"


def _text(shape: tuple[int, ...]) -> str:
    return short(f"[{', '.join(map(str, shape))}]")


def read_dit(source: FileSource, *, stage: int | None = None) -> tuple[DiTConfig, dict[str, Tensor]]:
    """Architecture and converted weights of a diffusion transformer, on the CPU, in the file's own data types.

    `stage` 1 or 2 refuses the other. Unchanged weights stay views of the mapped file; quantised ones become bfloat16.
    Raises CheckpointError, see open_checkpoint.
    """
    checkpoint = open_checkpoint(source, kind="dit", stage=stage)
    return checkpoint.config, dict(checkpoint.full_tensors())


def read_stored_dit(source: FileSource) -> StoredDiT:
    """As `read_dit`, with quantised layers and packed matrices as they are."""
    checkpoint = open_checkpoint(source, kind="dit")
    packings = checkpoint.packings
    tensors = checkpoint.packed_tensors() if packings else checkpoint.tensors()
    return StoredDiT(checkpoint.config, dict(tensors), checkpoint.layers, packings)


def read_vae(source: FileSource) -> tuple[VAEConfig, dict[str, Tensor]]:
    """Architecture and converted weights of the VAE; otherwise like read_dit."""
    checkpoint = open_checkpoint(source, kind="vae")
    return checkpoint.config, dict(checkpoint.full_tensors())


def load_dit(
    source: FileSource,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    operations: Any = None,
    stage: int | None = None,
) -> FlashVideoDiT:
    """Load a diffusion transformer of either stage; its architecture is at `.config`.

    `dtype` None keeps the data type that most of the file is in; 8-bit files become bfloat16. `stage` 1 or 2 refuses
    the other. Raises CheckpointError, see open_checkpoint.
    """
    checkpoint = open_checkpoint(source, kind="dit", stage=stage)
    return _load(FlashVideoDiT, checkpoint, device, dtype, operations)


def load_vae(
    source: FileSource,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    operations: Any = None,
) -> VideoVAE:
    """Load the VAE; its architecture is at `.config`. `dtype` as in load_dit. Raises CheckpointError."""
    return _load(VideoVAE, open_checkpoint(source, kind="vae"), device, dtype, operations)


def _load(
    network: type[nn.Module],
    checkpoint: Checkpoint,
    device: str | torch.device,
    dtype: torch.dtype | None,
    operations: Any,
) -> Any:
    dtype = dtype or _main_dtype(checkpoint)
    module = network(checkpoint.config, device="meta", dtype=dtype, operations=operations or nn)
    # Placed one by one, so that a cast or a copy to the device never holds the weights twice.
    state = {name: tensor.to(device, dtype) for name, tensor in checkpoint.full_tensors()}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval()


def _main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    sizes: Counter[torch.dtype | None] = Counter()
    for source in checkpoint.plan.sources:
        sizes[checkpoint.dtype(source)] += math.prod(checkpoint.weights.shapes[source.key])
    dtype = sizes.most_common(1)[0][0]
    return dtype if dtype in _WHOLE else torch.bfloat16
