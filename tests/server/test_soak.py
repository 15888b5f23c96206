"""Many runs in a row, some cancelled: the server's memory stays where it is.

`make test ARGS="tests/server/test_soak.py --soak 200"` goes on for longer.
"""

from __future__ import annotations

from statistics import fmean

import psutil
import pytest
from harness.comfy_client import ComfyClient, Interrupted, Progress, Success
from harness.comfy_server import ComfyServer
from harness.workflow_api import read_workflow, set_inputs, to_api
from harness.workflow_files import COMMIT, WORKFLOWS, switch_on

SETTLED = 8  # runs after which everything is loaded, in all sizes, and a cancelled run has been cleared away
CANCELLED_EACH = 4  # one run in so many is cancelled while the draft is made
GROWTH = 0.05  # of the memory after the settled runs: allocators don't give back all at once
SIZES = ((64, 32, 9), (32, 64, 5), (64, 48, 1))  # of drafts: width, height, frames


def one_run(client: ComfyClient, number: int) -> None:
    """Queue text to video, both stages, with a new seed; every few runs cancel it in the sampler."""
    workflow = switch_on(read_workflow(WORKFLOWS / "FlashVideo 02 Text to Video 1080p.json"), COMMIT)
    prompt = to_api(workflow, client.object_info())
    width, height, length = SIZES[number % len(SIZES)]
    settings = {"width": width, "height": height, "length": length}
    set_inputs(prompt, [f"Empty FlashVideo Latent.{name}={value}" for name, value in settings.items()])
    seed = f"FlashVideo Stage I Sampler.seed={1000 + number}"
    set_inputs(prompt, [seed, "FlashVideo Stage I Sampler.steps=3", f"FlashVideo Latent Degradation.seed={number}"])
    set_inputs(prompt, ["FlashVideo Prepare Frames.scale=2"])
    sampler = next(key for key, node in prompt.items() if node["class_type"] == "FlashVideoStage1Sampler")
    to_cancel, end = number % CANCELLED_EACH == CANCELLED_EACH - 1, None
    for end in client.events(client.queue(prompt)):
        if to_cancel and isinstance(end, Progress) and end.node == sampler:
            client.interrupt()
            to_cancel = False
    assert isinstance(end, Success | Interrupted), end


def test_memory_stays_where_it_is(server: ComfyServer, request: pytest.FixtureRequest) -> None:
    runs = request.config.getoption("--soak")
    process = psutil.Process(server.pid)
    held = []
    with server.client() as client:
        for number in range(SETTLED + runs):
            one_run(client, number)
            held.append(process.memory_info().rss)
    held = held[SETTLED:]
    third = len(held) // 3
    assert fmean(held[-third:]) < fmean(held[:third]) * (1 + GROWTH), [round(each / 2**20) for each in held]
