"""ComfyUI in this process, as for tests/comfy, and how many calls to try."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

# The same fixtures: a conftest.py is only found from its own folder.
_PLACE = Path(__file__).resolve().parents[1] / "comfy" / "conftest.py"
_spec = importlib.util.spec_from_file_location("comfy_fixtures", _PLACE)
_fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fixtures)
globals().update({name: value for name, value in vars(_fixtures).items() if not name.startswith("__")})

CALLS = 200  # of the ordinary tests: less than a minute


def pytest_addoption(parser: pytest.Parser) -> None:
    """`python -m pytest tests/fuzz --calls 10000 --first 0`: for people, with hours to spare."""
    group = parser.getgroup("fuzz")
    group.addoption("--calls", type=int, default=CALLS, help="how many node calls to try")
    group.addoption("--first", type=int, default=0, help="number of the first call; a failing call names its own")
