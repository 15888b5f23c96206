"""The test command says what it can't find before it runs anything, and knows every folder of tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_files_that_are_not_there_are_named() -> None:
    places = ("tests/library/test_run_tests.py", "tests/nothing.py", "tests/library/test_none.py::test_it")
    command = [sys.executable, "scripts/run_tests.py", *places]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.strip() == "There are no tests in tests/nothing.py, tests/library/test_none.py::test_it."


def test_every_folder_of_tests_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import run_tests

    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("*/test_*.py")}
    assert sorted(run_tests.FOLDERS) == sorted(folders)
    assert [task.folder for row in run_tests._rows([], newest=False) for task in row] == list(run_tests.FOLDERS)
