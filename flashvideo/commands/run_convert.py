"""What `convert` and `info` do; `convert` has their options."""

from __future__ import annotations

import argparse
import math
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

from ..checkpoints import Checkpoint, CheckpointError, describe, open_checkpoint
from ..checkpoints.architecture import network_shapes
from ..checkpoints.convert import convert_file
from ..checkpoints.convert_text_encoder import convert_text_encoder
from ..checkpoints.lora import convert_lora, describe_lora, needs_renaming
from ..checkpoints.text_encoder import is_text_encoder, open_text_encoder, t5_config
from ..checkpoints.weights import Weights, open_weights, some
from ..config import DiTConfig, T5Config
from ..errors import CommandError
from .terminal import TERMINATED, ProgressBars, say


def convert(options: argparse.Namespace) -> None:
    """Write the new file, and tell what it is. Raises CommandError, CheckpointError and OSError."""
    signal.signal(signal.SIGTERM, _terminate)
    weights = open_weights(options.source)
    if needs_renaming(weights.shapes):
        if options.dtype != "keep":
            raise CommandError("--dtype is for models: a LoRA keeps its data type.")
        layers = convert_lora(options.source, options.target, force=options.force)
        say(f"{options.target}: LoRA of {layers} layers of CogVideoX, converted")
        return
    errors: dict[str, float] = {}
    write = convert_text_encoder if is_text_encoder(weights) else convert_file
    with ProgressBars() as bars:
        found = write(
            options.source,
            options.target,
            dtype=options.dtype,
            force=options.force,
            progress=bars,
            on_error=errors.__setitem__,
        )
    what = _describe_text_encoder(found) if isinstance(found, T5Config) else describe(found)
    say(f"{options.target}: {what}, converted")
    if errors:
        _report_errors(errors)


def _report_errors(errors: dict[str, float]) -> None:
    """Print how far the quantised weights are off: root mean square, relative to the weights'."""
    kinds: dict[str, list[str]] = {}
    for layer in errors:
        kinds.setdefault(re.split(r"\.\d+\.", layer)[-1], []).append(layer)
    say("  error of the quantised weights (root mean square, relative):")
    for kind, layers in kinds.items():
        mean, worst = sum(errors[layer] for layer in layers) / len(layers), max(layers, key=errors.__getitem__)
        say(f"  {kind:<14}{mean:8.2%} on average, {errors[worst]:.2%} at most ({worst})")


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    """Exit by an exception, so that unfinished files are deleted."""
    sys.exit(TERMINATED)


def info(path: Path) -> None:
    """Tell what a file is. Raises CheckpointError and OSError."""
    weights = open_weights(path)
    if lora := describe_lora(weights):
        say(f"{weights.label}: {lora}")
        _say_facts(("stored as", weights.container), ("metadata", _metadata(weights)))
        return
    if is_text_encoder(weights):
        _info_of_text_encoder(open_text_encoder(path))
        return
    checkpoint = open_checkpoint(path)
    plan = checkpoint.plan
    say(f"{weights.label}: {describe(checkpoint)}")
    _say_facts(
        ("stored as", weights.container),
        ("architecture", _architecture(checkpoint)),
        ("parameters", _parameters(checkpoint)),
        ("data types", _dtypes(weights)),
        ("quantised", _quantised(checkpoint)),
        ("packed", _counted(packing.name for packing in checkpoint.packings.values())),
        ("metadata", _metadata(weights)),
        ("not used", some(plan.unused)),
        ("of other models", some(plan.foreign)),
    )


def _info_of_text_encoder(weights: Weights) -> None:
    config = t5_config(weights)
    architecture = (
        f"{config.num_layers} blocks, width {config.d_model}, {config.num_heads} heads of {config.d_kv}, feed-forward "
        f"{config.d_ff}, {config.vocab_size:,} words"
    )
    say(f"{weights.label}: {_describe_text_encoder(config)}")
    _say_facts(
        ("stored as", weights.container),
        ("architecture", architecture),
        ("data types", _dtypes(weights)),
        ("packed", _counted(packing.name for packing in weights.packings.values())),
        ("metadata", _metadata(weights)),
    )


def _describe_text_encoder(config: T5Config) -> str:
    return f"T5 v1.1 text encoder ({config.num_layers} blocks of {config.d_model})"


def _metadata(weights: Weights) -> str:
    return "; ".join(f"{key} = {value}" for key, value in weights.metadata.items())


def _say_facts(*facts: tuple[str, str]) -> None:
    for name, value in facts:
        if value:
            say(f"  {name:<16}{value}")


def _architecture(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    if isinstance(config, DiTConfig):
        return (
            f"{config.num_layers} layers, width {config.hidden_size}, {config.num_heads} heads of {config.head_dim}, "
            f"feed-forward {config.ff_dim}, text {config.text_dim}, time embedding {config.time_embed_dim}, "
            f"latent channels {config.in_channels}, patch {config.patch_size}"
        )
    return (
        f"{config.base_channels} channels x {config.channel_multipliers}, {config.encoder_blocks} encoder and "
        f"{config.decoder_blocks} decoder blocks a level, latent channels {config.latent_channels}"
    )


def _parameters(checkpoint: Checkpoint) -> str:
    total = sum(math.prod(shape) for shape in network_shapes(checkpoint.config).values())
    loras = [key for source in checkpoint.plan.sources for key in (*source.lora_a, *source.lora_b)]
    if not loras:
        return f"{total:,}"
    shapes = checkpoint.weights.shapes
    rank = next(shapes[source.lora_a[0]][0] for source in checkpoint.plan.sources if source.lora_a)
    extra = sum(math.prod(shapes[key]) for key in loras)
    return f"{total:,}, and {extra:,} of LoRA (rank {rank}) that loading merges into them"


def _quantised(checkpoint: Checkpoint) -> str:
    try:
        return _counted(form.core_name for form in checkpoint.layers.values())
    except CheckpointError:
        return "in a way that FlashVideo's loaders don't read"


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{name} ({count} layers)" for name, count in Counter(names).items())


def _dtypes(weights: Weights) -> str:
    names = ("unknown" if dtype is None else str(dtype).removeprefix("torch.") for dtype in weights.dtypes.values())
    counts = Counter(names)
    return ", ".join(f"{name} ({count} tensors)" for name, count in counts.most_common())
