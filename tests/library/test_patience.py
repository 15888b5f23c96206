"""Waiting for a program ends with it, or when it hangs, and never by the clock alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
from patience import Hung, finished, wait_until

QUIET = 1.0  # seconds
IDLE = "import sys, time; print('idle', flush=True); time.sleep(600)"
BUSY = "import time\nwhile time.process_time() < 2.1: pass\nprint('done')"


def start(code: str) -> subprocess.Popen:
    """A Python that runs the code."""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_program_that_does_nothing_is_hung_and_ended() -> None:
    for wait in (finished, lambda process, quiet: wait_until(lambda: False, process, quiet)):
        with start(IDLE) as process:
            assert process.stdout.readline() == "idle\n"
            with pytest.raises(Hung, match="did nothing for 1 s"):
                wait(process, QUIET)
        assert process.returncode != 0


def test_a_program_that_works_for_longer_is_waited_for() -> None:
    with start(BUSY) as process:
        assert finished(process, 2 * QUIET) == ("done\n", "")


def test_a_program_that_ends_too_soon_is_reported_with_its_words() -> None:
    with start("raise SystemExit('no such file')") as process, pytest.raises(AssertionError, match="no such file"):
        wait_until(lambda: False, process)
