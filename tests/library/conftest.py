"""The models and their mathematics, files, frames and plans: `flashvideo` without its training and without ComfyUI."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what the tests share
from alone import *  # noqa: F403


def pytest_addoption(parser: pytest.Parser) -> None:
    """`python -m pytest tests/library/test_damaged_files.py --damaged 300`: for people, with minutes to spare."""
    parser.getgroup("fuzz").addoption("--damaged", type=int, default=40, help="damaged files to try of each kind")
