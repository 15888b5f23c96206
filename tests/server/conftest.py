"""A running ComfyUI server with the pack in it, as `scripts/` start it for the demo."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
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


@pytest.fixture()
def clip(server: ComfyServer) -> Path:
    """A clip from elsewhere: 20 frames of 70x44 at 12 frames a second, with sound."""
    path = server.input / "clip.mp4"
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=12)
        video.width, video.height, video.pix_fmt = 70, 44, "yuv420p"
        audio = file.add_stream("aac", rate=16000)
        for i in range(20):
            picture = np.full((44, 70, 3), 40, np.uint8)
            picture[10:30, 2 + 2 * i : 22 + 2 * i] = (220, 60, 40)
            file.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        tone = np.sin(np.arange(16000 * 20 // 12) * 2 * math.pi * 440 / 16000).astype(np.float32)[None]
        sound = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        sound.sample_rate = 16000
        file.mux(audio.encode(sound))
        file.mux(video.encode())
        file.mux(audio.encode())
    return path


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--soak 200`: for people, with an hour to spare."""
    parser.addoption("--soak", type=int, default=9, help="how many runs in a row watch the server's memory")
