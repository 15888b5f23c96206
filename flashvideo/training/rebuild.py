"""All of FlashVideo-Nano from nothing: its trainings one after the other, each network exported when it is done.

May be stopped at any time and started again: what is done is skipped, what was begun goes on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpointing import BEST, LAST, load_state
from .loop import MINUTE, Limits, Trainer, check_description
from .optimise import trainable

CONFIGS = Path(__file__).resolve().parent / "configs" / "nano"


@dataclass(frozen=True)
class Part:
    """One training: of a network, or of a part of it."""

    kind: str  # as `train` calls it
    config: str
    file: str  # what its export writes; empty if the next training goes on from its run
    what: str


PARTS = (  # each needs those before it
    Part("vae", "vae", "", "the video VAE"),
    Part("vae", "vae_decoder", "vae.safetensors", "the VAE's decoder once more, for texture"),
    Part("text", "text", "text_encoder.safetensors", "the text encoder"),
    Part("stage1", "stage1", "stage1.safetensors", "stage I, which makes drafts"),
    Part("stage2", "stage2", "stage2.safetensors", "stage II, which refines them"),
)

# open_task(kind, config) reads a config: its settings and its task
OpenTask = Callable[[str, Path], tuple[Any, Any]]


def rebuild(open_task: OpenTask, folder: Path, minutes: float | None) -> int | None:
    """Train and export what isn't done yet, for at most so many minutes; returns a signal's number if one ended it."""
    deadline = None if minutes is None else time.monotonic() + minutes * MINUTE
    for part in PARTS:
        settings, task = open_task(part.kind, CONFIGS / f"{part.config}.toml")
        if not _finished(settings):
            sys.stdout.write(f"FlashVideo-Nano: {part.what}\n")
            trainer = Trainer(task, settings.loop, settings.out)
            if (settings.out / LAST).is_file():
                trainer.resume()
            else:
                trainer.start_anew()
            left = None if deadline is None else (deadline - time.monotonic()) / MINUTE
            ended_by = trainer.run(Limits(minutes=left))
            if ended_by is not None or trainer.step < settings.loop.steps:
                sys.stdout.write("Stopped; the same command goes on from here.\n")
                return ended_by
        if part.file and not (folder / part.file).is_file():
            export(task, settings.out, folder)
    sys.stdout.write(f"{folder}: FlashVideo-Nano is complete.\n")
    return None


def _finished(settings: Any) -> bool:
    last = settings.out / LAST
    return last.is_file() and load_state(last)["step"] >= settings.loop.steps


def export(task: Any, run: Path, folder: Path) -> None:
    """Write the best weights of a run so far to a folder."""
    state = load_state(run / BEST)
    check_description(state, task, run / BEST)
    for name, parameter in trainable(task.model).items():
        parameter.data.copy_(state["mean"][name])
    task.model.eval()
    for path, scores in task.export(folder, state["step"]).items():
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        sys.stdout.write(f"{path}: step {state['step']}, {path.stat().st_size:,} bytes; {numbers}\n")
