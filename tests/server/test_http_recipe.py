"""The recipe of docs/api.md, run as it stands against a real server."""

from __future__ import annotations

import json
import re
from pathlib import Path

import av
import pytest
import requests
from harness.comfy_client import ComfyClient
from harness.comfy_server import ComfyServer
from harness.workflow_api import read_workflow, to_api
from harness.workflow_files import OWN_CLIP, WORKFLOWS, switch_on

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture()
def recipe(server: ComfyServer) -> str:
    """The page's Python, for this server."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    return code.replace("http://127.0.0.1:8188", server.address)


def exported(client: ComfyClient, name: str) -> dict:
    """What the page exports of a shipped workflow, for a small result."""
    prompt = to_api(switch_on(read_workflow(WORKFLOWS / name), OWN_CLIP), client.object_info())
    for node in prompt.values():
        if node["class_type"] == "FlashVideoPrepareFrames":
            node["inputs"].update(size="short side", short_side=64)
    return prompt


def test_the_recipe_uploads_refines_and_downloads(
    server: ComfyServer, client: ComfyClient, clip: Path, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"image": ("sent.mp4", clip.read_bytes())}
    name = requests.post(f"{server.address}/upload/image", files=files, timeout=60).json()["name"]
    prompt = exported(client, "FlashVideo 03 Refine Any Video.json")
    for node in prompt.values():
        if node["class_type"] == "LoadVideo":
            node["inputs"]["file"] = name
    Path("workflow_api.json").write_text(json.dumps(prompt), encoding="utf-8")
    exec(recipe, {})
    refined = next(path for path in tmp_path.glob("*.mp4") if path.name.startswith("refined"))
    with av.open(str(refined)) as container:
        video = container.streams.video[0]
        assert (video.height, len(container.streams.audio)) == (64, 1)
        assert sum(1 for _ in container.decode(video=0)) == 20


def test_a_wrong_input_is_refused_by_name(
    server: ComfyServer, client: ComfyClient, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prompt = exported(client, "FlashVideo 03 Refine Any Video.json")
    for node in prompt.values():
        if node["class_type"] == "LoadVideo":
            node["inputs"]["file"] = "nowhere.mp4"
    answer = requests.post(f"{server.address}/prompt", json={"prompt": prompt}, timeout=60)
    assert answer.status_code == 400
    assert "LoadVideo" in answer.text and "nowhere.mp4" in answer.text
