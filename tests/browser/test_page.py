"""The shipped workflows on ComfyUI's page: found, opened, run and looked at as a user does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from harness.comfy_server import ComfyServer
from harness.workflow_api import read_workflow
from harness.workflow_files import ALWAYS, COMMIT, OWN_CLIP, shipped
from PIL import Image

FRAMES, WIDTH, HEIGHT = 9, 112, 48
FILES = pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
DRAFT_AND_REFINE = next(path for path in shipped() if path.stem.endswith("Text to Video 1080p"))
AS_IT_COMES = [DRAFT_AND_REFINE, *(path for path in shipped() if path.stem.endswith("Refine Any Video"))]
SMALLER = {  # for all others, which differ from these two by what else they hold
    "EmptyFlashVideoLatent": {"length": 1},
    "FlashVideoStage1Sampler": {"steps": 6},
    "FlashVideoStage1Scheduler": {"steps": 6},
    "FlashVideoPrepareFrames": {"scale": 2.0, "short_side": 96},
    "FlashVideoStage2Refiner": {"steps": 2, "cfg": 1.0},
    "KSampler": {"steps": 2, "cfg": 1.0},
    "ImageScaleBy": {"scale_by": 2.0},
}


@pytest.fixture(scope="session", autouse=True)  # before the page asks what there is
def clip(server: ComfyServer) -> None:
    """A clip where Load Video looks for one: with nothing to choose, the page asks for the preview of no file.

    And the picture that ComfyUI's own input folder has.
    """
    Image.new("RGB", (WIDTH, HEIGHT), (70, 110, 60)).save(server.input / "example.png")
    with av.open(str(server.input / "clip.mp4"), "w") as file:
        video = file.add_stream("libx264", rate=12)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(FRAMES):
            picture = np.full((HEIGHT, WIDTH, 3), (70, 110, 60), np.uint8)
            picture[12:36, 4 + 6 * i : 28 + 6 * i] = (220, 60, 40)
            file.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(video.encode())


def active(workflow: dict[str, Any], types: set[str]) -> list[dict[str, Any]]:
    """The nodes of these types that are switched on."""
    return [node for node in workflow["nodes"] if node["type"] in types and node["mode"] == ALWAYS]


def test_the_template_browser_shows_every_workflow_with_its_picture(comfy_page: Any) -> None:
    cards = comfy_page.open_templates()
    comfy_page.page.wait_for_timeout(1000)
    names = {card.get_attribute("data-testid").removeprefix("template-workflow-") for card in cards.all()}
    assert names == {path.stem for path in shipped()}
    for card in cards.all():
        card.scroll_into_view_if_needed()
        name = card.get_attribute("data-testid").removeprefix("template-workflow-")
        comfy_page.wait_for_card_picture(name)
        assert name in card.inner_text()
        assert f"{name}.jpg" in comfy_page.loaded
    comfy_page.photograph("templates", whole_graph=False)


@FILES
def test_a_workflow_opens_complete_and_runs_to_its_end(comfy_page: Any, path: Path) -> None:
    workflow = read_workflow(path)
    comfy_page.problems.clear()
    comfy_page.open_template(path.stem, len(workflow["nodes"]))

    assert comfy_page.dialog() == "", "nothing is missing, not even for the generators that are off"
    assert comfy_page.unknown_nodes() == []
    values = {node["id"]: node.get("widgets_values", []) for node in comfy_page.saved()["nodes"]}
    for node in workflow["nodes"]:
        if node["type"] in {OWN_CLIP, "LoadImage"}:  # the page chooses a file of the input folder, if there is one
            continue
        saved = node.get("widgets_values", [])  # ComfyUI's own nodes grow at their end from version to version
        ours = node["type"].startswith("FlashVideo")
        assert values[node["id"]] == saved if ours else values[node["id"]][: len(saved)] == saved, node["type"]
    comfy_page.photograph(path.stem)

    if path not in AS_IT_COMES:
        comfy_page.set_widgets(SMALLER)
    end, details = comfy_page.run()
    assert end == "execution_success", details
    for node in active(workflow, {"SaveVideo"}):
        comfy_page.wait_for_video(Path(node["widgets_values"][0]).name)
    for node in active(workflow, {"SaveImage"}):
        comfy_page.wait_for_picture(Path(node["widgets_values"][0]).name)
    comfy_page.photograph(f"{path.stem}, after a run")
    if path == DRAFT_AND_REFINE:
        _commit(comfy_page)
    assert comfy_page.problems == []


def _commit(comfy_page: Any) -> None:
    """The draft is there, and one key more refines it."""
    assert not comfy_page.shows_video("refined")
    comfy_page.press_on(COMMIT, "Control+m")
    end, details = comfy_page.run()
    assert end == "execution_success", details
    comfy_page.wait_for_video("refined")
    comfy_page.photograph(f"{DRAFT_AND_REFINE.stem}, committed")
