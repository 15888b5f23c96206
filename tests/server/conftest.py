"""A running ComfyUI server with the pack in it, as `scripts/` start it for the demo."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from harness.bed import Bed, inside, stop_on_terminate

if not inside():
    pytest.exit("These tests start ComfyUI from .bed/: use `make test`.", 2)
from harness.comfy_client import ComfyClient
from harness.comfy_server import ComfyServer

stop_on_terminate()


@pytest.fixture(scope="session")
def bed() -> Bed:
    """The ComfyUI that the set-up made."""
    found = Bed.load()
    assert found is not None, "The set-up is not complete."
    return found


@pytest.fixture(scope="session")
def server(bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """ComfyUI on the CPU, with the pack, in folders of its own; stopped when the tests end."""
    with ComfyServer(bed, tmp_path_factory.mktemp("server"), device_options=["--cpu"]) as running:
        yield running


@pytest.fixture()
def client(server: ComfyServer) -> Iterator[ComfyClient]:
    """A client that receives the events of its own prompts."""
    with server.client() as connected:
        yield connected


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--soak 200`: for people, with an hour to spare."""
    parser.addoption("--soak", type=int, default=9, help="how many runs in a row watch the server's memory")
