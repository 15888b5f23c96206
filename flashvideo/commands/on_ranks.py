"""A command on several processes, as torchrun starts them: rank 0 reports and writes, the others compute with it.

Whatever ends one process ends all of them, with one sentence from whoever notices first.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ..errors import CommandError, exit_code
from ..parallel import RankEndedError
from ..parallel.launch import Meeting, own_device
from .torchrun import own_rank

SECONDS_FOR_RANK_0 = 10.0  # to report a mistake that all ranks find
SECONDS_FOR_OTHERS = 3.0  # to notice that somebody has reported
ONLY = "Only refine, generate and train run on several processes: start this command without torchrun."
CANCELLED = "Cancelled. The same command resumes the run."


def silence_other_ranks() -> None:
    """Let only rank 0 write to the terminal; torchrun gives the same one to all."""
    if own_rank():
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (until the process ends)


def run_on_ranks(options: argparse.Namespace, explain: Callable[[BaseException], str | None]) -> int:
    """Run a command together with the other processes; returns its exit code.

    `explain` gives the message for an error, None for one that is a fault of the program.
    """
    signal.signal(signal.SIGTERM, _stopped)  # torchrun ends the others that way when one has ended
    if not hasattr(options, "ranks"):
        raise CommandError(ONLY)
    meeting = Meeting()
    try:
        options.device = own_device(options.device)
        options.ranks = meeting.join(options.device)
        code = options.ranks.share(options.run(options) or 0)
    except KeyboardInterrupt:
        _report(getattr(options, "when_cancelled", CANCELLED), meeting)
        _end(exit_code(signal.SIGINT), meeting)
    except BaseException as error:
        message = explain(error)
        if message is None:  # a fault of the program: whoever finds it shows where
            message = traceback.format_exc()
        # A mistake that all find is best told by rank 0, which ends its own progress bar.
        if isinstance(error, RankEndedError) or meeting.rank == 0 or not meeting.has_heard(SECONDS_FOR_RANK_0):
            _report(message, meeting)
        _end(1, meeting)
    import torch.distributed as dist

    dist.destroy_process_group()
    return code


def _stopped(*_: Any) -> NoReturn:
    raise RankEndedError


def _report(message: str, meeting: Meeting) -> None:
    if meeting.may_report():
        below = "\n" if meeting.rank else ""  # rank 0's progress bar, which is still open
        sys.__stderr__.write(f"{below}{message}\n")


def _end(code: int, meeting: Meeting) -> NoReturn:
    """End at once: the group's threads may still wait for a process that has ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    meeting.leave(SECONDS_FOR_OTHERS)
    for worker in multiprocessing.active_children():  # which make training's batches, and would wait for more
        worker.terminate()
    for stream in (sys.stdout, sys.stderr, sys.__stderr__):
        stream.flush()
    os._exit(code)
