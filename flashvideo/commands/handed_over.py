"""A process of its own, for a video that another program hands to a Ray cluster, such as ComfyUI.

One line of JSON on standard input is the job, see `HandedOver`. Lines of JSON on standard output say how far it is,
what there is to say, and how it ended (`Lines`). The program that started this one cancels it by closing standard
input, or by ending.
"""

from __future__ import annotations

import _thread
import base64
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from ..config import NO_MOTION
from ..degradation import AutoStrength
from ..errors import CheckpointError, CommandError
from ..frames import TargetSize
from ..parallel.farm import FarmOptions
from ..refiner.run import RefineSettings
from .chosen import ModelOptions, OutputOptions
from .jobs import Job, RefineOptions
from .on_workers import Outcome
from .refine_on_workers import refine_on_workers

PROGRESS, NOTE, PROBLEM, DONE = "progress", "note", "problem", "done"  # kinds of lines
CRF = 14


@dataclass(frozen=True)
class HandedOver:
    """A job. Paths are absolute, and the same on all machines of the cluster.

    `address`: see `FarmOptions`. `model` and `vae` None mean the built-in ones, for real footage with `footage`.
    `context`: the prompt's encoding [1, L, text_dim]. `work`: where folders of unfinished work go.
    `codec`, `bits`: see `VideoFormat`.
    """

    address: str | None
    source: Path
    target: Path
    work: Path
    model: Path | None
    vae: Path | None
    footage: bool
    vae_memory: float | None
    settings: RefineSettings
    context: Tensor
    codec: str
    bits: int

    def written(self) -> str:
        """As a line of JSON."""
        context = self.context.float().cpu().contiguous().numpy()
        paths = {name: getattr(self, name) for name in ("source", "target", "work", "model", "vae")}
        values = {name: path and str(path) for name, path in paths.items()}
        values |= {name: getattr(self, name) for name in ("address", "footage", "vae_memory", "codec", "bits")}
        settings = dict(vars(self.settings))
        settings["size"] = vars(settings["size"])
        if isinstance(settings["strength"], AutoStrength):
            settings["strength"] = vars(settings["strength"])
        values |= {"settings": settings, "shape": context.shape}
        return json.dumps({**values, "context": base64.b64encode(context.tobytes()).decode()})

    @classmethod
    def read(cls, line: str) -> HandedOver:
        """The job that a line holds."""
        values: dict[str, Any] = json.loads(line)
        settings = values["settings"]
        settings["size"] = TargetSize(**settings["size"])
        if isinstance(settings["strength"], Mapping):
            settings["strength"] = AutoStrength(**settings["strength"])
        numbers = np.frombuffer(base64.b64decode(values["context"]), np.float32)
        values["context"] = torch.tensor(numbers).view(values.pop("shape"))
        for name in ("source", "target", "work", "model", "vae"):
            values[name] = values[name] and Path(values[name])
        return cls(**{**values, "settings": RefineSettings(**settings)})

    def options(self) -> RefineOptions:
        """The same as a command's."""
        output = OutputOptions(
            crf=CRF, sound="copy", codec=self.codec, bits=self.bits, deinterlace=False, fps=None, start_number=None,
            work=self.work, force=False, anew=False,
        )  # fmt: skip
        models = ModelOptions(
            self.model, self.vae, None, "", self.vae_memory, device=None, dtype=None, footage=self.footage
        )
        farm = FarmOptions(self.address, None, cards=True)
        return RefineOptions(
            self.source, self.target, self.settings, prompt=None, motion=NO_MOTION, models=models,
            output=output, farm=farm, context=self.context,
        )  # fmt: skip


class Lines:
    """A `Watcher` of one job, which writes lines of JSON."""

    def __init__(self, _total: int, out: TextIO, _err: TextIO, _damaged: Any) -> None:
        self._out, self._again, self._said = out, False, set()
        self.code = 1

    def __enter__(self) -> Lines:
        """Ready already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def progress(self, _task: Any, phase: str, done: float, total: int) -> None:
        """How far the job is."""
        write_line(self._out, PROGRESS, [phase, done, total])

    def message(self, _task: Any, text: str) -> None:
        """What it has to say, once."""
        if text not in self._said:
            self._said.add(text)
            self.warn(text)

    def finished(self, _task: Any, result: Outcome) -> bool:
        """How it ended; a video in use is tried once more."""
        if result.in_use and not self._again:
            self._again = True
            return True
        if result.problem is None:
            self.code = 0
            for text in result.notes:
                self.warn(text)
            write_line(self._out, DONE, None)
        else:
            write_line(self._out, PROBLEM, result.problem)
        return False

    def failed(self, task: Any, reason: str) -> None:
        """There is no result."""
        self.finished(task, Outcome(problem=reason))

    def warn(self, text: str) -> None:
        """A line for the user."""
        write_line(self._out, NOTE, text)

    def sum_up(self) -> int:
        """The exit code."""
        return self.code


def write_line(out: TextIO, kind: str, value: Any) -> None:
    """Write a line at once."""
    out.write(json.dumps({kind: value}) + "\n")
    out.flush()


def main() -> None:
    """Do the job on standard input, and exit."""
    sys.exit(_run())


def _run() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    job = HandedOver.read(sys.stdin.readline())
    threading.Thread(target=_cancel_at_end, daemon=True).start()
    try:
        return refine_on_workers([Job(job.source, job.target)], job.options(), Lines)
    except (CommandError, CheckpointError) as error:
        write_line(sys.stdout, PROBLEM, str(error))
        return 1


def _cancel_at_end() -> None:
    """Cancel when nobody holds the other end of standard input."""
    sys.stdin.read()
    if os.name == "nt":  # there os.kill ends the process at once
        _thread.interrupt_main()
    else:
        os.kill(os.getpid(), signal.SIGINT)
