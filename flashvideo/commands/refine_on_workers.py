"""Videos on the workers of a Ray cluster: whole ones, and the windows of those for which more workers are there."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ..atomic_files import InUseError
from ..devices import return_memory
from ..errors import CommandError
from ..nano import NANO_NOTICE, nano_is_trained
from ..parallel.team import Team
from ..progress import PhaseProgress
from ..refiner.helpers import Conditions, Part, evaluate_window
from .chosen import absolute_models
from .jobs import Job, RefineOptions, is_done, reason, refine_job, refiner_networks
from .loading import TextEncoder
from .on_workers import Clip, Display, Outcome, Show, run_on_workers
from .terminal import say


def refine_on_workers(jobs: list[Job], options: RefineOptions, show: Show = Display) -> int:
    """Refine files whose paths are checked; returns the exit code. Raises CommandError."""
    if options.models.model is None and not nano_is_trained():
        say(NANO_NOTICE)
    output = options.output
    absolute = replace(
        options,
        target=options.target.absolute(),
        models=absolute_models(options.models),
        output=replace(output, work=output.work and output.work.absolute()),
    )
    clips = sorted((_clip(job, options) for job in jobs), key=lambda clip: clip.task.expected, reverse=True)
    return run_on_workers(options.farm, partial(_RefineWork, absolute), clips, show)


@dataclass(frozen=True)
class _Task:
    """A clip's task. `expected`: roughly its pixels."""

    job: Job
    expected: float


def _clip(job: Job, options: RefineOptions) -> Clip:
    from ..refiner.files import expected_work

    pixels, windows = expected_work(job.source, job.settings or options.settings)
    task = _Task(replace(job, source=job.source.absolute(), target=job.target.absolute()), pixels)
    return Clip(job.source.name, job.target, task, parts=windows)


class _RefineWork:
    """What a worker keeps from clip to clip."""

    def __init__(self, options: RefineOptions) -> None:
        """Raises CommandError."""
        return_memory()
        folder = options.target if options.source.is_dir() else options.target.parent
        if not folder.is_dir():
            raise CommandError(
                f"{socket.gethostname()} has no folder {folder}: all machines need the videos and the folder of "
                "the results under the same path."
            )
        self.options, self.networks = options, refiner_networks(options)
        self._text = TextEncoder(options.models, self.networks.device, keep=True)
        self._home = next(self.networks.dit.parameters()).device

    def __call__(self, clip: Clip, report: PhaseProgress, note: Callable[[str], None], team: Team) -> Outcome:
        """Refine a clip."""
        job, options = clip.task.job, self.options
        if is_done(job.target, options):  # by a worker that was killed just then, or by another program
            return Outcome()
        self.networks.dit.to(self._home)  # where a clip's phases expect it
        try:
            damage = refine_job(job, replace(self.networks, team=team), self._text, options, report, note)
        except (CommandError, ValueError, OSError, RuntimeError, MemoryError) as error:
            return Outcome(problem=reason(error), in_use=isinstance(error, InUseError))
        return Outcome(notes=damage, damaged=bool(damage))

    def assist(self, conditions: Conditions, part: Part) -> np.ndarray:
        """Evaluate a window of another worker's clip. Stage II stays on the device for the next one."""
        device = self.networks.device
        return evaluate_window(self.networks.dit.to(device), device, conditions, part)
