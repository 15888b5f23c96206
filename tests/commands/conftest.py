"""The command line as people use it: whole runs, also over several processes and on a Ray cluster."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what the tests share
from alone import *  # noqa: F403


def pytest_addoption(parser: pytest.Parser) -> None:
    """`python -m pytest tests/commands/test_farm.py --farm-clips 40 --farm-kills 10 --farm-workers 4`: for people, with
    minutes to spare.
    """
    for name, default, text in (
        ("clips", 6, "clips to refine on a Ray cluster"),
        ("kills", 2, "workers of it that are killed"),
        ("workers", 2, "workers at a time"),
    ):
        parser.getgroup("farm").addoption(f"--farm-{name}", type=int, default=default, help=text)
