"""The user's download, unpacked into a clean ComfyUI: all nodes come up, and Text to Video runs from its files."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import pack
import pytest
from harness.bed import PACK_NAME, ROOT, Bed
from harness.comfy_client import Success
from harness.comfy_server import ComfyServer
from harness.workflow_api import read_workflow, set_inputs, to_api

TEXT_TO_VIDEO = "workflows/FlashVideo 01 Draft from a Prompt.json"
SMALL = (
    "Empty FlashVideo Latent.width=48",
    "Empty FlashVideo Latent.height=32",
    "Empty FlashVideo Latent.length=5",
    "FlashVideo Stage I Sampler.steps=2",
)


@pytest.fixture(scope="module")
def installed(bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ComfyServer, Path]]:
    """A ComfyUI with nothing but the unpacked download in custom_nodes, and the folder it was unpacked to."""
    if not (ROOT / ".git").exists():
        pytest.skip("only a git repository knows what belongs to the pack")
    base = tmp_path_factory.mktemp("clean")
    folder = base / "custom_nodes" / PACK_NAME
    pack.pack(base / "pack.zip")
    zipfile.ZipFile(base / "pack.zip").extractall(folder)
    with ComfyServer(bed, base, with_pack=False, device_options=["--cpu"]) as server:
        yield server, folder


def test_all_nodes_come_up(installed: tuple[ComfyServer, Path]) -> None:
    server, folder = installed
    assert not any(PACK_NAME in line for line in server.import_failures), server.log_tail()
    with server.client() as client:
        nodes = {name for name, info in client.object_info().items() if PACK_NAME in info["python_module"]}
    assert nodes == {page.stem for page in (folder / "web" / "docs").glob("*.md")}


def test_text_to_video_runs(installed: tuple[ComfyServer, Path]) -> None:
    server, folder = installed
    with server.client() as client:
        prompt = to_api(read_workflow(folder / TEXT_TO_VIDEO), client.object_info())
        set_inputs(prompt, SMALL)
        events = client.run(prompt)
        assert isinstance(events[-1], Success), events[-1]
    assert list((server.output / "flashvideo").glob("draft*.mp4"))
