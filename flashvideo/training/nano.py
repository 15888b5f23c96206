"""Trains all of FlashVideo-Nano from nothing: independent trainings in parallel, then its files.

Its networks for real footage come after those for drawn scenes: they begin with their weights, and learn from clips
that were fetched before.
It can be stopped at any time. The next run skips finished trainings and resumes the others.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from .errors import TrainingError
from .loop.checkpointing import BEST, LAST, load_state, whole_file
from .loop.interrupts import Interrupts
from .loop.metrics import MetricsFile
from .loop.optimise import trainable
from .loop.trainer import METRICS, MINUTE, Limits, Trainer, check_description

CONFIGS = Path(__file__).resolve().parent / "configs" / "nano"
WEIGHTS = Path("runs/nano/weights")  # not the built-in ones, which may be better than these
LOG = "training.log"
POLL_SECONDS = 1.0
# On POSIX a terminal's Ctrl+C only reaches processes of its session; on Windows, all of the console.
OWN_SESSION = os.name == "posix"


@dataclass(frozen=True)
class Part:
    """One training: of a network, or of a part of it."""

    name: str  # of its config file
    kind: str  # as `train` calls it
    file: str  # what its export writes into its run's folder
    what: str


TEXT = Part("text", "text", "text_encoder.safetensors", "the text encoder")
VAE = Part("vae", "vae", "vae.safetensors", "the video VAE")
DECODER = Part("vae_decoder", "vae", "vae.safetensors", "the VAE's decoder once more, for texture")
STAGE1 = Part("stage1", "stage1", "stage1.safetensors", "stage I, which makes drafts")
STAGE2 = Part("stage2", "stage2", "stage2.safetensors", "stage II, which refines them")
CALM = Part("stage2_calm", "stage2", "stage2.safetensors", "stage II once more, for calm motion")
FOOTAGE_VAE = Part("vae_footage", "vae", "vae.safetensors", "the VAE for real footage")
FOOTAGE_STAGE2 = Part("stage2_footage", "stage2", "stage2.safetensors", "stage II for real footage")
FOOTAGE_DECODER = Part("vae_footage_decoder", "vae", "vae.safetensors", "its decoder once more, for refined clips")
FOOTAGE_REFINER = Part("stage2_footage_refined", "stage2", "stage2.safetensors", "stage II again, for that decoder")
FOOTAGE = (FOOTAGE_VAE, FOOTAGE_STAGE2, FOOTAGE_DECODER, FOOTAGE_REFINER)
PARTS = {part.name: part for part in (TEXT, VAE, DECODER, STAGE1, STAGE2, CALM, *FOOTAGE)}
# Rounds run one after the other, a round's chains in parallel, a chain's parts one after the other. Stage I needs only
# the VAE's encoder, stage II also learns from decoded pixels.
ROUNDS = (((TEXT,),), ((VAE,),), ((STAGE1,), (DECODER, STAGE2, CALM)))
FOOTAGE_ROUNDS = ((FOOTAGE,),)
# The files that FlashVideo-Nano consists of.
DRAWN_FILES = {part.file: part for part in (TEXT, DECODER, STAGE1, CALM)}
FOOTAGE_FILES = {"footage_vae.safetensors": FOOTAGE_DECODER, "footage_stage2.safetensors": FOOTAGE_REFINER}


class Opener(Protocol):
    """Reads a part's config."""

    def settings(self, part: Part) -> Any:
        """Its settings."""
        ...

    def task(self, part: Part, settings: Any) -> Any:
        """What the loop trains, with these settings."""
        ...


# command(parts, minutes) is a command line that calls `train_parts` with these in a process of its own
Command = Callable[[Sequence[Part], float | None], list[str]]


def train_all(
    opener: Opener, folder: Path, minutes: float | None, command: Command, *, footage: bool = False
) -> int | None:
    """Train all that isn't done yet, for at most so many minutes; put the files into `folder` when all is done.

    `footage`: also those for real footage. Returns a signal's number if one ended it. Raises TrainingError if a
    training fails, and before any begins if clips that it needs were never fetched.
    """
    deadline = _deadline(minutes)
    rounds, files = ROUNDS, DRAWN_FILES
    if footage:
        opener.settings(FOOTAGE_VAE).clips.check_fetched()
        rounds, files = (*ROUNDS, *FOOTAGE_ROUNDS), {**DRAWN_FILES, **FOOTAGE_FILES}
    for chains in rounds:
        left = [chain for chain in chains if not _all_done(chain, opener)]
        if len(left) > 1:
            ended_by = _side_by_side(left, opener, deadline, command)
        else:
            ended_by = train_parts([part for chain in left for part in chain], opener, _minutes_left(deadline))
        if ended_by is not None or not all(_all_done(chain, opener) for chain in left):
            sys.stdout.write("Stopped; the same command resumes the training.\n")
            return ended_by
    for name, part in files.items():
        with whole_file(folder / name) as copy:
            shutil.copyfile(opener.settings(part).out / part.file, copy)
    sys.stdout.write(f"{folder}: FlashVideo-Nano is complete. Copied to models/nano, it is the built-in one.\n")
    return None


def train_parts(parts: Sequence[Part], opener: Opener, minutes: float | None) -> int | None:
    """Train and export what isn't done yet of parts, in their order; returns a signal's number if one ended it."""
    deadline = _deadline(minutes)
    for part in parts:
        settings = opener.settings(part)
        if _is_done(part, settings.out, settings.loop.steps):
            continue
        sys.stdout.write(f"FlashVideo-Nano: {part.what}\n")
        task = opener.task(part, settings)
        if not _is_trained(settings.out, settings.loop.steps):
            trainer = Trainer(task, settings.loop, settings.out)
            resume = (settings.out / LAST).is_file()
            ended_by = trainer.train(Limits(minutes=_minutes_left(deadline)), resume=resume)
            if ended_by is not None or trainer.step < settings.loop.steps:
                return ended_by
        export(task, settings.out, settings.out)
    return None


def _deadline(minutes: float | None) -> float | None:
    return None if minutes is None else time.monotonic() + minutes * MINUTE


def _minutes_left(deadline: float | None) -> float | None:
    return None if deadline is None else (deadline - time.monotonic()) / MINUTE


def _all_done(parts: Sequence[Part], opener: Opener) -> bool:
    for part in parts:
        settings = opener.settings(part)
        if not _is_done(part, settings.out, settings.loop.steps):
            return False
    return True


def _is_done(part: Part, run: Path, steps: int) -> bool:
    """Whether a run has ended and its weights were exported since."""
    file = run / part.file
    return _is_trained(run, steps) and file.is_file() and file.stat().st_mtime_ns >= (run / LAST).stat().st_mtime_ns


def _is_trained(run: Path, steps: int) -> bool:
    last = run / LAST
    return last.is_file() and load_state(last)["step"] >= steps


class _Chain:
    """A process that trains parts one after the other, and its bar."""

    def __init__(self, parts: Sequence[Part], opener: Opener, place: int) -> None:
        self.parts = parts
        runs = [opener.settings(part) for part in parts]
        self._metrics = [MetricsFile(run.out / METRICS) for run in runs]
        self._log = runs[0].out / LOG
        total = sum(run.loop.steps for run in runs)
        self._bar = tqdm(total=total, initial=self._steps(), desc=parts[-1].name, position=place, unit="step")
        self._process: subprocess.Popen | None = None

    def start(self, command: Sequence[str], environment: dict[str, str]) -> None:
        """Start the process; its output goes to a file in the folder of its first run."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=OWN_SESSION
            )

    def _steps(self) -> int:
        return sum(int(rows[-1]["step"]) for metrics in self._metrics if (rows := metrics.rows()))

    def show(self) -> None:
        """Move the bar to where the trainings are."""
        self._bar.update(self._steps() - self._bar.n)

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def end(self) -> None:
        """If it still runs, have it save a checkpoint, and wait: a second signal would end it at once."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        self.show()
        self._bar.close()

    def last_line(self) -> str:
        """The last line of the process's output."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing.")


def _side_by_side(
    left: Sequence[Sequence[Part]], opener: Opener, deadline: float | None, command: Command
) -> int | None:
    """Train each chain of parts in a process of its own; they share the processor's cores."""
    threads = max(1, torch.get_num_threads() // len(left))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    chains = [_Chain(parts, opener, place) for place, parts in enumerate(left)]
    failed = None
    with Interrupts() as interrupts:
        try:
            for chain in chains:
                chain.start(command(chain.parts, _minutes_left(deadline)), environment)
            while any(chain.exit_code is None for chain in chains):
                time.sleep(POLL_SECONDS)
                for chain in chains:
                    chain.show()
                interrupted = interrupts.received is not None
                failed = None if interrupted else next((chain for chain in chains if chain.exit_code), None)
                if failed or (interrupted and (OWN_SESSION or interrupts.received != signal.SIGINT)):
                    break
        finally:
            for chain in chains:
                chain.end()
    if failed and interrupts.received is None:
        what = ", then ".join(part.what for part in failed.parts)
        raise TrainingError(f"The training of {what}, ended: {failed.last_line()}")
    return interrupts.received


def export(task: Any, run: Path, folder: Path) -> None:
    """Write the best weights of a run so far to a folder."""
    if not (run / BEST).is_file():
        raise TrainingError(f"{run / BEST} doesn't exist yet; the first is written after [loop] validate_every steps.")
    state = load_state(run / BEST)
    check_description(state, task, run / BEST)
    for name, parameter in trainable(task.model).items():
        parameter.data.copy_(state["mean"][name])
    task.model.eval()
    for path, scores in task.export(folder, state["step"]).items():
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        sys.stdout.write(f"{path}: step {state['step']}, {path.stat().st_size:,} bytes; {numbers}\n")
