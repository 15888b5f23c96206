"""Waiting for other programs while they work: a slow or busy machine makes no test fail, a hung program does."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import psutil

QUIET_SECONDS = 120.0  # with hardly any processor time, after which a program counts as hung
_LEAST_WORK_SECONDS = 0.01  # of processor time within that, one tick of the clock; a program that sleeps takes none
_LOOK_AGAIN_SECONDS = 0.02


class Hung(AssertionError):
    """A program that was waited for does nothing any more."""


class _Watch:
    """Tells whether a program, with all that it started, still uses the processor."""

    def __init__(self, process: subprocess.Popen | BaseProcess, quiet: float) -> None:
        self._process, self._quiet = process, quiet
        self._used, self._since = _processor_seconds(process.pid), time.monotonic()

    def check(self) -> None:
        """Raise Hung after `quiet` seconds without work; the program is ended then."""
        if time.monotonic() - self._since < self._quiet:
            return
        used = _processor_seconds(self._process.pid)
        if used - self._used < _LEAST_WORK_SECONDS:
            self._process.kill()
            raise Hung(f"{self._process} did nothing for {self._quiet:.0f} s")
        self._used, self._since = used, time.monotonic()


def finished(process: subprocess.Popen, quiet: float = QUIET_SECONDS) -> tuple[str, str]:
    """Wait for a program's end; returns what it wrote to standard output and error. Raises Hung."""
    watch = _Watch(process, quiet)
    while True:
        try:
            return process.communicate(timeout=quiet)
        except subprocess.TimeoutExpired:
            watch.check()


def joined(process: BaseProcess, quiet: float = QUIET_SECONDS) -> int:
    """Wait for the end of a process of multiprocessing; its exit code, or less a signal's number. Raises Hung."""
    watch = _Watch(process, quiet)
    while True:
        process.join(quiet)
        if process.exitcode is not None:
            return process.exitcode
        watch.check()


def wait_until(done: Callable[[], bool], process: subprocess.Popen, quiet: float = QUIET_SECONDS) -> None:
    """Wait until `done()`, for as long as the program works. Raises Hung; AssertionError if it ends before."""
    watch = _Watch(process, quiet)
    while not done():
        if process.poll() is not None and not done():
            raise AssertionError(f"ended with {process.returncode}: {process.stderr.read() if process.stderr else ''}")
        watch.check()
        time.sleep(_LOOK_AGAIN_SECONDS)


def _processor_seconds(pid: int) -> float:
    """Of a program and its children, those that have ended among them."""
    try:
        program = psutil.Process(pid)
        family = [program, *program.children(recursive=True)]
        return sum(sum(each.cpu_times()[:4]) for each in family)
    except psutil.NoSuchProcess:
        return 0.0
