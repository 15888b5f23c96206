"""`python -m flashvideo train vae|text|stage1|stage2`: reads a config, and runs the loop or an export."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

from .errors import TrainingError

SIGNAL_EXIT = 128  # plus the signal's number is the exit code of a program that a signal ended
# What can be trained: its module, its settings class, its task class. Imported only when asked for.
KINDS = {
    "vae": ("vae", "VAESettings", "VAETask"),
    "text": ("text", "TextSettings", "TextTask"),
    "stage1": ("stage1", "Stage1Settings", "Stage1Task"),
    "stage2": ("stage2", "Stage2Settings", "Stage2Task"),
}


def add_train(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser("train", help="train FlashVideo-Nano, or fine-tune the official weights")
    parser.add_argument("kind", choices=KINDS, help="which network")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="TOML file with all settings")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default: the config's `out`)")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's last checkpoint")
    parser.add_argument("--steps", type=_count, metavar="N", help="do at most N steps now (the schedule stays)")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after M minutes, with a checkpoint")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    parser.add_argument("--tokenizer", metavar="FILE", help="T5's tokenizer.json (default: the one in ComfyUI)")
    parser.add_argument(
        "--export", type=Path, metavar="DIR", help="don't train: write the best weights so far to this folder"
    )
    parser.set_defaults(run=_train)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _train(options: argparse.Namespace) -> int:
    # Imported here, so that the other commands start at once.
    import torch

    from .config import build, load_toml
    from .loop import Limits, Trainer

    module_name, settings_name, task_name = KINDS[options.kind]
    module = importlib.import_module(f".{module_name}", __package__)
    settings = build(getattr(module, settings_name), load_toml(options.config), options.config.name)
    if options.tokenizer and hasattr(settings, "tokenizer"):
        settings = dataclasses.replace(settings, tokenizer=options.tokenizer)
    if settings.loop.threads:
        torch.set_num_threads(settings.loop.threads)
    device = _device(options.device)
    folder = options.out or settings.out
    task = getattr(module, task_name)(settings, device)
    if options.export is not None:
        return _export(task, folder, options.export)
    trainer = Trainer(task, settings.loop, folder)
    if options.resume:
        trainer.resume()
    else:
        trainer.start_anew()
    ended_by = trainer.run(Limits(options.steps, options.minutes))
    done = trainer.step == settings.loop.steps
    rest = "done" if done else "--resume goes on"
    sys.stdout.write(f"{folder}: step {trainer.step} of {settings.loop.steps}; {rest}\n")
    return 0 if ended_by is None else SIGNAL_EXIT + ended_by


def _export(task: Any, run: Path, folder: Path) -> int:
    from .checkpointing import BEST, load_state
    from .loop import check_description
    from .optimise import trainable

    state = load_state(run / BEST)
    check_description(state, task, run / BEST)
    for name, parameter in trainable(task.model).items():
        parameter.data.copy_(state["mean"][name])
    task.model.eval()
    for path, scores in task.export(folder, state["step"]).items():
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        sys.stdout.write(f"{path}: step {state['step']}, {path.stat().st_size:,} bytes; {numbers}\n")
    return 0


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch says it in one way or the other
        raise TrainingError(f"There is no device {name!r} here ({str(error).splitlines()[0]}).") from error
