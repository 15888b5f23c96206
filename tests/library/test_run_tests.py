"""The test command says what it can't find before it runs anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_files_that_are_not_there_are_named() -> None:
    places = ("tests/library/test_run_tests.py", "tests/nothing.py", "tests/library/test_none.py::test_it")
    command = [sys.executable, "scripts/run_tests.py", *places]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.strip() == "There are no tests in tests/nothing.py, tests/library/test_none.py::test_it."


@pytest.fixture
def run_tests(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import run_tests

    return run_tests


@pytest.mark.parametrize(("cores", "alone", "beside_two"), [(1, 1, 1), (2, 2, 2), (6, 6, 4), (64, 8, 6)])
def test_processes_are_as_many_as_cores_within_limits(
    run_tests: Any, monkeypatch: pytest.MonkeyPatch, cores: int, alone: int, beside_two: int
) -> None:
    """Each takes memory, and folders that only wait have one."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    tasks = {name: SimpleNamespace(folder=f"tests/{name}") for name in ("library", "comfy", "server", "fuzz")}
    assert run_tests._processes([tasks["library"]]) == alone
    assert run_tests._processes([tasks["comfy"], tasks["server"], tasks["fuzz"]]) == beside_two


def test_every_folder_of_tests_is_run_once(run_tests: Any) -> None:
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("*/test_*.py")}
    assert sorted(run_tests.FOLDERS) == sorted(folders)
    assert [task.folder for row in run_tests._rows([], newest=False) for task in row] == list(run_tests.FOLDERS)
