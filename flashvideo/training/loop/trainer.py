"""The training loop of all networks and losses. A resumed run gives the same bits as one that was not interrupted."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ...atomic_files import in_use
from ...parallel import RankEndedError, Ranks, agree
from ..config import LoopSettings
from ..errors import TrainingError
from ..rows import Batches, Rows, rows_of_step
from .checkpointing import BEST, LAST, load_state, save_state
from .interrupts import Interrupts
from .metrics import MetricsFile, save_picture, save_plot
from .optimise import RunningMean, learning_rate, load_optimiser, make_optimiser, trainable
from .precision import cpu_has_bf16
from .summing import sum_over_ranks

METRICS = "metrics.jsonl"
PLOT = "metrics.png"
MINUTE = 60.0


class Task(Protocol):
    """A network and its data, for the loop. All randomness must follow from the given index."""

    model: nn.Module  # on its device; what requires a gradient learns
    data: Batches
    description: dict[str, Any]  # numbers that a checkpoint must agree with, such as the network's sizes

    def prepare(self) -> None:
        """Prepare the data that batches are drawn from, such as latents on disk, where it is missing.

        The network still has the weights that a fresh run begins with.
        """
        ...

    def loss(self, batch: Any, rows: Rows) -> dict[str, Tensor]:
        """Scalars of these rows of a batch, as means over the rows; "loss" is minimised, the others are shown.

        Weighted by their shares, those of all its rows must add up to the whole batch's.
        """
        ...

    def validate(self) -> dict[str, float]:
        """Metrics on held-out data. The first one chooses the best checkpoint: higher is better."""
        ...

    def sheet(self) -> Image.Image:
        """A picture that shows what the network does now."""
        ...


@dataclass
class Limits:
    """Limits of this run, which may end it before the end of the schedule."""

    steps: int | None = None  # in this run
    minutes: float | None = None


class Trainer:
    """Trains a task in a folder: last.pt, best.pt, metrics.jsonl, metrics.png and sheets/.

    `ranks` share the rows of each step and sum their gradients, so that all of them have the same weights, those that
    one process would have. All of them call the same methods; rank 0 alone writes and validates.
    """

    def __init__(self, task: Task, settings: LoopSettings, folder: Path, ranks: Ranks | None = None) -> None:
        """Set up a fresh run; nothing is written yet."""
        self.task, self.settings, self.folder, self.ranks = task, settings, folder, ranks
        self.optimiser = make_optimiser(task.model, settings)
        self.mean = RunningMean(task.model, settings.ema)
        self.metrics = MetricsFile(folder / METRICS)
        self.device = next(task.model.parameters()).device
        self.step = 0  # optimiser steps done
        self.seconds = 0.0  # of training, all runs together
        self.best = float("-inf")
        self._saved = -1

    def train(self, limits: Limits, *, resume: bool) -> int | None:
        """Start or resume, then `run`, while no other program trains in the folder.

        Returns and raises the same as these, and raises InUseError if another program trains there.
        """

        def lock() -> None:
            if not resume:
                self.folder.mkdir(parents=True, exist_ok=True)
            if self.folder.is_dir():
                locked.enter_context(in_use(self.folder))

        with ExitStack() as locked:
            agree(self.ranks, lock)
            if resume:
                self.resume()
            else:
                self.start()
            return self.run(limits)

    def resume(self) -> None:
        """Load last.pt, and prepare all clips.

        Raises TrainingError if it isn't there, is damaged, or is of another network or optimiser.
        """
        state = load_state(self.folder / LAST)
        check_description(state, self.task, self.folder / LAST)
        self._check_learning(state)
        if state["step"] < self.settings.steps:
            self.task.prepare()  # before the weights: in preference tuning the starting network makes the samples
        for name, parameter in trainable(self.task.model).items():
            parameter.data.copy_(state["model"][name])
        self.mean.load(state["mean"])
        load_optimiser(self.optimiser, state["optimiser"])
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
        self._saved = self.step
        agree(self.ranks, lambda: self.metrics.truncate(self.step))

    def _check_learning(self, state: dict[str, Any]) -> None:
        """Raise TrainingError unless the same weights learn, with the same optimiser, as in the run so far."""
        path, now = self.folder / LAST, trainable(self.task.model)
        if changed := sorted(now.keys() ^ state["model"].keys()):
            raise TrainingError(f"{path} can't be resumed with this config: other weights learn, such as {changed[0]}.")
        if state["optimiser"].keys() != self.optimiser.state_dict().keys():
            raise TrainingError(
                f"{path} can't be resumed with this config: it was trained by another optimiser than "
                f"{self.settings.optimiser}."
            )

    def start(self) -> None:
        """Take an empty folder, and prepare all clips. Raises TrainingError if a run is in it already."""

        def take() -> None:
            if (self.folder / LAST).exists():
                raise TrainingError(
                    f"{self.folder} holds a run already: add --resume, or give another folder with --out."
                )
            self.metrics.path.unlink(missing_ok=True)

        agree(self.ranks, take)
        self.task.prepare()

    def run(self, limits: Limits) -> int | None:
        """Train until the schedule or a limit ends, with a checkpoint at the end.

        Returns the number of the signal that ended it, if one did. Raises TrainingError where training can't continue;
        the last checkpoint is then the last good one.
        """
        end = self.settings.steps
        if limits.steps is not None:
            end = min(end, self.step + limits.steps)
        started = time.monotonic() - self.seconds
        deadline = time.monotonic() + limits.minutes * MINUTE if limits.minutes is not None else float("inf")
        with (
            self._kept_in_messages(),
            Interrupts() as interrupts,
            tqdm(total=self.settings.steps, initial=self.step, unit="step") as bar,
        ):
            self._report_idle_ranks()
            batches = self._batches(end)
            while self.step < end and not self._must_stop(interrupts, deadline):
                values = self._optimise(batches)
                self.step += 1
                self.seconds = time.monotonic() - started
                bar.update()
                self._report(values, bar)
                if self.step % self.settings.checkpoint_every == 0:
                    self.save(LAST)
            if self._saved != self.step:
                self.save(LAST)
        return interrupts.received

    def _report_idle_ranks(self) -> None:
        """Say how many processes a step has no rows for."""
        if self.ranks is not None and (idle := self.ranks.collect(bool(self._rows(self.step))).count(False)):
            tqdm.write(f"{idle} of {self.ranks.size} processes have nothing to learn: a step has too few rows.")

    def _must_stop(self, interrupts: Interrupts, deadline: float) -> bool:
        """Whether a signal or the deadline ends the run; all ranks end before the same step."""
        received, is_late = interrupts.received, time.monotonic() >= deadline
        if self.ranks is not None:
            all_received, all_late = zip(*self.ranks.collect((received, is_late)), strict=True)
            received, is_late = next((number for number in all_received if number is not None), None), any(all_late)
            if received is not None:
                interrupts.received = received
        return received is not None or is_late

    @contextmanager
    def _kept_in_messages(self) -> Iterator[None]:
        """Add the checkpoint that training can resume from to the message of an error that ends it."""
        try:
            yield
        except (TrainingError, OSError, RankEndedError) as error:
            kept = f"{self.folder / LAST} holds step {self._saved}: --resume continues from there."
            if self._saved < 0:
                kept = "No checkpoint was written yet."
            if isinstance(error, RankEndedError):
                raise RankEndedError(kept) from error
            reason = str(error)
            if not isinstance(error, TrainingError):
                reason = f"{error.filename or self.folder}: {error.strerror}."
            raise TrainingError(f"{reason} {kept}") from error

    def _report(self, values: dict[str, Tensor], bar: tqdm) -> None:
        settings = self.settings
        if self.step % settings.log_every == 0 or self.step == 1:
            numbers = {name: float(value) for name, value in values.items()}
            bar.set_postfix({name: f"{number:.4g}" for name, number in numbers.items()})
            line = {**numbers, "seconds": round(self.seconds, 2)}
            agree(self.ranks, lambda: self.metrics.add(self.step, line))
        if self.step % settings.validate_every == 0 or self.step == settings.steps:
            self.validate()

    def _batches(self, end: int) -> Iterator[Any]:
        """Batches from the current step to step `end`; worker processes, if any, make them ahead."""
        workers = self.settings.workers
        loader = DataLoader(
            self.task.data,
            batch_size=None,
            sampler=(rows for step in range(self.step, end) for rows in self._rows(step)),
            num_workers=workers,
            worker_init_fn=_leave_interrupts_to_the_parent if workers else None,
            pin_memory=self.device.type == "cuda",
        )
        return iter(loader)

    def _rows(self, step: int) -> list[Rows]:
        """What this process learns from in a step."""
        place = (0, 1) if self.ranks is None else (self.ranks.rank, self.ranks.size)
        return rows_of_step(step, self.settings.accumulate, self.task.data.count, *place)

    def _optimise(self, batches: Iterator[Any]) -> dict[str, Tensor]:
        """One optimiser step. Returns the loss terms, averaged over its batches, the rate and the gradient's norm."""
        settings, model = self.settings, self.task.model
        rate = learning_rate(self.step, settings)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        model.train()
        totals: dict[str, Tensor] = {}
        for rows in self._rows(self.step):
            batch = _to_device(next(batches), self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._uses_bf16()):
                terms = self.task.loss(batch, rows)
            weight = rows.share / settings.accumulate
            (terms["loss"] * weight).backward()
            for name, term in terms.items():
                totals[name] = totals.get(name, 0) + term.detach() * weight
        if self.ranks is not None:
            totals = sum_over_ranks(self.ranks, list(trainable(model).values()), totals)
        norm = nn.utils.clip_grad_norm_(trainable(model).values(), settings.clip)
        if not torch.isfinite(norm) or not torch.isfinite(totals["loss"]):
            raise TrainingError(
                f"At step {self.step + 1} the loss is {float(totals['loss'])} and its gradient's norm {float(norm)}, "
                "so training stopped. Lower the learning rate, or look at the data of this step."
            )
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.mean.update(self.step)
        return {**totals, "rate": rate, "gradient_norm": norm}

    def _uses_bf16(self) -> bool:
        if self.device.type == "cpu":
            return self.settings.bf16_cpu and cpu_has_bf16()
        return self.device.type == "cuda" and self.settings.bf16

    def validate(self) -> dict[str, float]:
        """Measure the mean weights, draw a sheet, and keep the checkpoint if it is the best so far."""
        return agree(self.ranks, self._validate)

    def _validate(self) -> dict[str, float]:
        self.task.model.eval()
        with self.mean.applied(), torch.no_grad():
            scores = self.task.validate()
            picture = self.task.sheet()
        self.metrics.add(self.step, scores)
        save_picture(self.folder / "sheets" / f"{self.step:06d}.png", picture)
        save_plot(self.folder / PLOT, self.metrics.rows())
        score = next(iter(scores.values()))
        tqdm.write(f"step {self.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        if score > self.best:
            self.best = score
            self._write(BEST)
        return scores

    def save(self, name: str) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        agree(self.ranks, lambda: self._write(name))
        if name == LAST:
            self._saved = self.step

    def _write(self, name: str) -> None:
        state = {
            "description": self.task.description,
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "model": {key: parameter.detach() for key, parameter in trainable(self.task.model).items()},
            "mean": self.mean.mean,
            "optimiser": self.optimiser.state_dict(),
        }
        save_state(self.folder / name, state)


def check_description(state: dict[str, Any], task: Task, path: Path) -> None:
    """Raise TrainingError if a checkpoint is not of the network that the config describes."""
    if state["description"] != task.description:
        raise TrainingError(
            f"{path} belongs to another network: it has {state['description']}, the config {task.description}."
        )


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_to_device(value, device) for value in batch)
    return batch


def _leave_interrupts_to_the_parent(_worker: int) -> None:
    """Ctrl+C reaches every process of the terminal; the workers end when the loop does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
