"""The test command says what it can't find before it runs anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_files_that_are_not_there_are_named() -> None:
    places = ("tests/library/test_run_tests.py", "tests/nothing.py", "tests/library/test_none.py::test_it")
    command = [sys.executable, "scripts/run_tests.py", *places]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.strip() == "There are no tests in tests/nothing.py, tests/library/test_none.py::test_it."
