"""`python -m flashvideo train vae|text|stage1|stage2|preference|nano`: a config, and a loop or an export."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

from ..devices import open_device
from .errors import TrainingError

WHOLE = "nano"  # all four, with the configs that come with the library
NANO_FOLDER = Path("models/nano")
SIGNAL_EXIT = 128  # plus the signal's number is the exit code of a program that a signal ended
# What can be trained: its module, its settings class, its task class. Imported only when asked for.
KINDS = {
    "vae": ("vae", "VAESettings", "VAETask"),
    "text": ("text", "TextSettings", "TextTask"),
    "stage1": ("stage1", "Stage1Settings", "Stage1Task"),
    "stage2": ("stage2", "Stage2Settings", "Stage2Task"),
    "preference": ("preference", "PreferenceSettings", "PreferenceTask"),
}


def add_train(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser("train", help="train FlashVideo-Nano, or fine-tune the official weights")
    parser.add_argument("kind", choices=(*KINDS, WHOLE), help="which network; nano: all four, from nothing")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with all settings")
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
    from .loop import Limits, Trainer
    from .rebuild import export, rebuild

    if options.kind == WHOLE:
        folder = options.export or NANO_FOLDER
        return _exit_code(rebuild(lambda *part: _open(*part, options), folder, options.minutes))
    if options.config is None:
        raise TrainingError(f"train {options.kind} needs a config: add --config FILE.")
    settings, task = _open(options.kind, options.config, options)
    folder = options.out or settings.out
    if options.export is not None:
        export(task, folder, options.export)
        return 0
    trainer = Trainer(task, settings.loop, folder)
    if options.resume:
        trainer.resume()
    else:
        trainer.start_anew()
    ended_by = trainer.run(Limits(options.steps, options.minutes))
    done = trainer.step == settings.loop.steps
    rest = "done" if done else "--resume goes on"
    sys.stdout.write(f"{folder}: step {trainer.step} of {settings.loop.steps}; {rest}\n")
    return _exit_code(ended_by)


def _open(kind: str, config: Path, options: argparse.Namespace) -> tuple[Any, Any]:
    """A config's settings and its task, on the device that was asked for."""
    import torch

    from .config import build, load_toml

    module_name, settings_name, task_name = KINDS[kind]
    module = importlib.import_module(f".{module_name}", __package__)
    settings = build(getattr(module, settings_name), load_toml(config), config.name)
    if options.tokenizer and hasattr(settings, "tokenizer"):
        settings = dataclasses.replace(settings, tokenizer=options.tokenizer)
    if settings.loop.threads:
        torch.set_num_threads(settings.loop.threads)
    return settings, getattr(module, task_name)(settings, open_device(options.device))


def _exit_code(ended_by: int | None) -> int:
    return 0 if ended_by is None else SIGNAL_EXIT + ended_by
