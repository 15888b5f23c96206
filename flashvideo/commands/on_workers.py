"""A command's clips on the workers of a Ray cluster: `--ray [ADDRESS]`.

Ray ends a program without a word when the head that it knows has been replaced. So the program that talks to Ray is a
process of its own, and the one that the user has started starts it again: results and unfinished work are files.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

from ..errors import CommandError, cancelled
from ..parallel.farm import Farm, FarmOptions, NoClusterError, Prepare, answers, cluster_folder
from .terminal import CANCELLED, DAMAGED, REFUSED, TERMINATED, warn
from .torchrun import processes

OURS = 100  # plus the exit code is that of the process that talks to Ray; Ray ends it with others
CANCELLED_MESSAGE = "Cancelled. The same command resumes the run."
LOST = 99  # the cluster's head is gone
SECONDS_FOR_HEAD = 600.0  # to come back
SECONDS_BETWEEN_BEATS = 5.0
LONGEST_BEAT = 90.0  # seconds; Ray itself gives up after 60
SHORT_RUN = 60.0  # seconds
LOSSES = 3  # of runs as short as that, one after another
SHOWN_CLIPS = 12  # bars below the one of the whole
SECONDS_A_LINE = 10.0  # about one clip, where there are no bars
_WHOLE_BAR = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}"
Show = Callable[[int, TextIO, TextIO, Any], Any]  # clips, standard output and error, whether one is damaged -> watcher


def farm_options(options: argparse.Namespace) -> FarmOptions | None:
    """The options of `add_farm_options`; None without --ray. Raises CommandError."""
    if options.ray is None:
        if options.workers is not None:
            raise CommandError("--workers goes with --ray.")
        return None
    if processes() > 1:
        raise CommandError("--ray and torchrun are two ways to use several cards: choose one.")
    if options.device not in (None, "cpu", "cuda", "mps"):
        raise CommandError(f"With --ray each worker takes a card, or --device cpu; got --device {options.device}.")
    return FarmOptions(options.ray or None, options.workers, cards=options.device != "cpu")


@dataclass(frozen=True)
class Clip:
    """A task: `name` is what the user calls it, `target` the result's file as the user gave it.

    `parts`: how many workers can work at it together.
    """

    name: str
    target: Path
    task: Any
    parts: int = 1


@dataclass(frozen=True)
class Outcome:
    """What became of a clip: `problem` is why it wasn't done, `in_use` that another program is at work there.

    `done`: what was made. `notes`: lines below that of the result. `damaged`: whether the source is.
    """

    done: str = "refined"
    problem: str | None = None
    in_use: bool = False
    notes: tuple[str, ...] = ()
    damaged: bool = False


def run_on_workers(farm: FarmOptions, prepare: Prepare, clips: Sequence[Clip], show: Show | None = None) -> int:
    """Do clips, which begin in this order, on a cluster; returns the exit code. Call `check_farm` before.

    `prepare` gives what returns a Clip's Outcome; it is a function that other processes can import, and so is `show`,
    the class of what is shown (default: `Display`). Raises CommandError.
    """
    try:
        with cluster_folder() if farm.address is None else nullcontext("") as folder:
            return _run_drivers(farm, folder, prepare, clips, show or Display)
    except KeyboardInterrupt:
        return cancelled(CANCELLED_MESSAGE)


def _run_drivers(farm: FarmOptions, folder: str, prepare: Prepare, clips: Sequence[Clip], show: Show) -> int:
    first = time.time()
    runs = losses = 0
    damaged = multiprocessing.RawValue("b", False)  # whether a source is, also one of a driver that has ended
    while clips:
        began = time.monotonic()
        code = _run_driver(farm, folder, prepare, clips, damaged, show, again=runs > 0)
        runs += 1
        if code != LOST:
            return code
        losses = losses + 1 if time.monotonic() - began < SHORT_RUN else 0
        clips = [clip for clip in clips if not _made_since(clip.target, first)]
        where = farm.address or "of this run"
        if losses == LOSSES:
            raise CommandError(f"The Ray cluster {where} ends again and again. The same command resumes the run.")
        warn(f"\nThe head of the Ray cluster {where} has ended. The run goes on when it is back.")
        if farm.address is not None and not _is_back(farm.address):
            raise CommandError(f"No Ray cluster answers at {where} any more. The same command resumes the run.")
    return DAMAGED if damaged.value else 0


def _made_since(path: Path, moment: float) -> bool:
    return path.exists() and path.stat().st_mtime >= moment


def _is_back(address: str) -> bool:
    end = time.monotonic() + SECONDS_FOR_HEAD
    while not answers(address):
        if time.monotonic() > end:
            return False
        time.sleep(1)
    return True


def _run_driver(
    farm: FarmOptions,
    folder: str,
    prepare: Prepare,
    clips: Sequence[Clip],
    damaged: ctypes.c_byte,
    show: Show,
    *,
    again: bool,
) -> int:
    """The exit code of a process that does the clips; LOST if it ended of itself, or can't meet the cluster `again`."""
    words = (farm, folder, prepare, clips, damaged, show, again)
    child = multiprocessing.get_context("spawn").Process(target=_drive, args=words, daemon=True)
    child.start()
    while True:
        try:
            child.join()
        except KeyboardInterrupt:
            if os.name == "posix":  # on Windows it would end at once, and Ctrl+C reaches it anyway
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGINT)
        else:
            break
    if child.exitcode < OURS:
        return LOST
    code = child.exitcode - OURS
    return cancelled(CANCELLED_MESSAGE) if code == CANCELLED else code


def _drive(
    farm: FarmOptions,
    folder: str,
    prepare: Prepare,
    clips: Sequence[Clip],
    damaged: ctypes.c_byte,
    show: Show,
    again: bool,
) -> NoReturn:
    out, err = _own_terminal()
    display = show(len(clips), out, err, damaged)
    signal.signal(signal.SIGINT, _interrupt_once)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        code = _do_clips(Farm(farm, folder), prepare, clips, display)
    except CommandError as error:
        if again and isinstance(error, NoClusterError):
            os._exit(LOST)
        err.write(f"{error.with_hint}\n")
        code = REFUSED
    except Exception:  # a fault of the program
        err.write(traceback.format_exc())
        code = REFUSED
    except KeyboardInterrupt:
        code = CANCELLED
    except SystemExit as ended:
        code = ended.code
    if folder and not multiprocessing.parent_process().is_alive():  # whose folder it was
        shutil.rmtree(folder, ignore_errors=True)
    out.flush()
    err.flush()
    os._exit(OURS + code)


def _do_clips(cluster: Farm, prepare: Prepare, clips: Sequence[Clip], display: Display) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # Ray has put its own
    with cluster, _watched(cluster.heartbeat), display:
        cluster.run(prepare, clips, display, parts=lambda clip: clip.parts)
    return display.sum_up()


def _own_terminal() -> tuple[TextIO, TextIO]:
    """Standard output and error for us alone: what Ray writes to either goes nowhere."""
    nowhere, ours = os.open(os.devnull, os.O_WRONLY), []
    for number in (1, 2):
        ours.append(os.fdopen(os.dup(number), "w", buffering=1, errors="backslashreplace"))
        os.dup2(nowhere, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    return ours[0], ours[1]


def _interrupt_once(*_: object) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl+C comes here twice: from it, and from the parent
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _watched(heartbeat: Callable[[], None]) -> Iterator[None]:
    """End this process if the cluster's head is gone: calls to its workers would wait for ever."""
    alive, ended, beating = threading.Event(), threading.Event(), threading.Lock()

    def beat() -> None:
        while not ended.wait(SECONDS_BETWEEN_BEATS):
            with beating:
                try:
                    heartbeat()  # Ray ends the process itself if another head answers
                except Exception:  # Ray has no class for it
                    os._exit(LOST)
            alive.set()

    def count_down() -> None:
        while alive.wait(LONGEST_BEAT):
            alive.clear()
        os._exit(LOST)

    for run in (beat, count_down):
        threading.Thread(target=run, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with beating:  # nobody asks a cluster that is being left
            pass


@dataclass
class Display:
    """A `Watcher`: bars on a terminal, lines in a log, and what to sum up."""

    total: int
    out: TextIO
    err: TextIO
    damaged: ctypes.c_byte
    problems: dict[str, str] = field(default_factory=dict)
    again: set[str] = field(default_factory=set)
    said: dict[str, set[str]] = field(default_factory=dict)
    lines: dict[str, float] = field(default_factory=dict)  # when a clip's last line was written
    bars: dict[str, tqdm] = field(default_factory=dict)

    def __enter__(self) -> Display:
        tqdm.set_lock(threading.RLock())  # its own is for several processes, and would have to be given back
        self.whole = tqdm(total=self.total, desc="clips", unit="clip", bar_format=_WHOLE_BAR, position=0, file=self.err)
        return self

    def __exit__(self, *_: object) -> None:
        for bar in (*self.bars.values(), self.whole):
            bar.close()

    def progress(self, task: Clip, phase: str, done: float, total: int) -> None:
        """Show how far a clip is."""
        name, text = task.name, f"{phase} {100 * done / max(total, 1):.0f} %"
        if self.err.isatty():
            if name not in self.bars and len(self.bars) < SHOWN_CLIPS:
                self.bars[name] = tqdm(bar_format="  {desc}", position=1 + len(self.bars), leave=False, file=self.err)
            if name in self.bars:
                self.bars[name].set_description_str(f"{name}: {text}")
        elif time.monotonic() - self.lines.setdefault(name, time.monotonic()) > SECONDS_A_LINE:
            self.lines[name] = time.monotonic()
            self._write(f"{name}: {text}", self.err)

    def message(self, task: Clip, text: str) -> None:
        """Show what a clip has to say, once."""
        said = self.said.setdefault(task.name, set())
        if text not in said:
            said.add(text)
            self._write(f"{task.name}: {text}", self.err)

    def finished(self, task: Clip, result: Outcome) -> bool:
        """Show a result. A clip in use is tried again once: the program there may be what is left of a dead worker."""
        if result.in_use and task.name not in self.again:
            self.again.add(task.name)
            return True
        if result.problem is None:
            self.damaged.value |= result.damaged
            self._write("\n  ".join((f"{task.target}: {result.done}", *result.notes)), self.out)
        else:
            if not result.in_use:
                self.problems[task.name] = result.problem
            self._write(f"{task.name}: {result.problem}", self.err)
        self._leave(task)
        return False

    def failed(self, task: Clip, reason: str) -> None:
        """Show that a clip has no result."""
        self.finished(task, Outcome(problem=reason))

    def warn(self, text: str) -> None:
        """Show a line."""
        self._write(text, self.err)

    def sum_up(self) -> int:
        """Show what failed; returns the exit code."""
        if not self.problems:
            return DAMAGED if self.damaged.value else 0
        lines = [f"  {name}: {problem}" for name, problem in self.problems.items()]
        self.err.write("\n".join(["These clips failed:", *lines, ""]))
        return REFUSED

    def _leave(self, task: Clip) -> None:
        for kept in (self.said, self.lines):
            kept.pop(task.name, None)
        bar = self.bars.pop(task.name, None)
        if bar is not None:
            bar.close()
        self.whole.update(1)

    def _write(self, line: str, file: TextIO) -> None:
        tqdm.write(line, file=file)
        file.flush()
