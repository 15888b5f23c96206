"""The commands: `python -m flashvideo convert|info|models|plan|generate|refine|train|ablate|bench`."""

from __future__ import annotations

import argparse
import importlib.util
import io
import math
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from .bench_command import add_bench
from .checkpoints import Checkpoint, CheckpointError, describe, open_checkpoint
from .config import DiTConfig
from .convert import DTYPES, convert_file
from .devices import is_out_of_memory
from .errors import CommandError
from .generate_command import add_generate
from .lora_files import convert_lora, is_lora
from .models_command import add_models
from .plan_command import add_plan
from .refine_command import add_refine
from .weightfiles import open_weights, some

CANCELLED = 130  # exit code of a command stopped with Ctrl+C
TERMINATED = 143
REPOSITORY = "https://github.com/flashvideo/ComfyUI-FlashVideo"


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code: 0 done, 1 refused with a message, 130 cancelled (143 by SIGTERM)."""
    parser = argparse.ArgumentParser(prog="python -m flashvideo", description="FlashVideo without ComfyUI.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    models = (_add_convert, _add_info, add_models)
    for add_command in (*models, add_plan, add_generate, add_refine, _add_training, add_bench):
        add_command(commands)
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal can't show is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    try:
        return options.run(options) or 0
    except CommandError as error:
        sys.stderr.write(f"{error.with_hint}\n")
        return 1
    except CheckpointError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"{error.filename or 'file'}: {error.strerror}\n")
        return 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sys.stderr.write(f"Out of memory: {str(error).splitlines()[0] if str(error) else 'none is left'}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nCancelled; nothing was written.\n")
        return CANCELLED


def say(line: str) -> None:
    """Print a line of a command's result."""
    sys.stdout.write(line + "\n")


class ProgressBars:
    """A bar for each phase of a command, in bytes, on standard error."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes of a phase are done."""
        if self._bar is None or self._bar.desc != phase:
            self.close()
            self._bar = tqdm(total=total, desc=phase, unit="B", unit_scale=True)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Finish the bar on display."""
        if self._bar is not None:
            self._bar.close()


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("convert", help="convert a model or a LoRA to safetensors with ComfyUI's names")
    parser.add_argument("source", metavar="IN", type=Path, help="stage1.pt, 3d-vae.pt, a LoRA, ...")
    parser.add_argument("target", metavar="OUT", type=Path, help="the .safetensors file to write")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="data type of the new file (default: keep)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, _terminate)
    if options.source.is_file() and is_lora(open_weights(options.source).shapes):
        if options.dtype != "keep":
            raise CommandError("--dtype is for models: a LoRA keeps its data type.")
        layers = convert_lora(options.source, options.target, force=options.force)
        say(f"{options.target}: LoRA of {layers} layers of CogVideoX, converted")
        return
    bars = ProgressBars()
    try:
        checkpoint = convert_file(
            options.source, options.target, dtype=options.dtype, force=options.force, progress=bars
        )
    finally:
        bars.close()
    say(f"{options.target}: {describe(checkpoint)}, converted")


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    """Leave through the clean-up of whatever is running."""
    sys.exit(TERMINATED)


def _add_info(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("info", help="tell what a model file is")
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.set_defaults(run=lambda options: _info(options.file))


def _info(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    weights, plan = checkpoint.weights, checkpoint.plan
    say(f"{weights.label}: {describe(checkpoint)}")
    for name, value in (
        ("stored as", weights.container),
        ("architecture", _architecture(checkpoint)),
        ("parameters", _parameters(checkpoint)),
        ("data types", _dtypes(checkpoint)),
        ("metadata", "; ".join(f"{key} = {value}" for key, value in weights.metadata.items())),
        ("not used", some(plan.unused)),
        ("of other models", some(plan.foreign)),
    ):
        if value:
            say(f"  {name:<16}{value}")


def _add_training(commands: argparse._SubParsersAction) -> None:
    if importlib.util.find_spec(".training", __package__):
        from .training.ablations.command import add_ablate
        from .training.command import add_train

        add_train(commands)
        add_ablate(commands)
        return
    # What ComfyUI's registry hands out leaves training out.
    for name in ("train", "ablate"):
        parser = commands.add_parser(name, help="is in the repository, not in this download")
        parser.add_argument("rest", nargs=argparse.REMAINDER)
        parser.set_defaults(run=_no_training)


def _no_training(_options: argparse.Namespace) -> None:
    raise CommandError(f"Training is not part of this download. Clone {REPOSITORY} to train.")


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
    total = sum(math.prod(shape) for shape in checkpoint.shapes.values())
    loras = [key for source in checkpoint.plan.sources for key in (*source.lora_a, *source.lora_b)]
    if not loras:
        return f"{total:,}"
    shapes = checkpoint.weights.shapes
    rank = next(shapes[source.lora_a[0]][0] for source in checkpoint.plan.sources if source.lora_a)
    extra = sum(math.prod(shapes[key]) for key in loras)
    return f"{total:,}, and {extra:,} of LoRA (rank {rank}) that loading merges into them"


def _dtypes(checkpoint: Checkpoint) -> str:
    dtypes = checkpoint.weights.dtypes.values()
    counts = Counter("unknown" if dtype is None else str(dtype).removeprefix("torch.") for dtype in dtypes)
    return ", ".join(f"{name} ({count} tensors)" for name, count in counts.most_common())
