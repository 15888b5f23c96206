"""The shipped workflows, as files, through a running ComfyUI: real prompts, real video files, real websocket."""

from __future__ import annotations

import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from harness.comfy_client import ComfyClient, Executing, Failure, Interrupted, Preview, Progress, Success, saved_files
from harness.comfy_server import ComfyServer
from harness.workflow_api import read_workflow, set_inputs, to_api
from harness.workflow_files import BYPASSED, COMMIT, OWN_CLIP, WORKFLOWS, shipped, switch_on, titles
from PIL import Image

TEXT_TO_VIDEO = WORKFLOWS / "FlashVideo 02 Text to Video 1080p.json"
REGION = WORKFLOWS / "FlashVideo 13 Refine a Region.json"
REFINE = WORKFLOWS / "FlashVideo 03 Refine Any Video.json"
SMALL = ("Empty FlashVideo Latent.width=64", "Empty FlashVideo Latent.height=32", "Empty FlashVideo Latent.length=9")


@pytest.fixture()
def prompt_of(client: ComfyClient) -> Callable[..., dict[str, Any]]:
    """A workflow file in API format, committed unless told, with changes like "Node title.input=value"."""

    def convert(path: Path, *settings: str, commit: bool = True) -> dict[str, Any]:
        workflow = read_workflow(path)
        if commit and COMMIT in titles(workflow):
            workflow = switch_on(workflow, COMMIT)
        if any(setting.startswith("Load Video.") for setting in settings):
            workflow = switch_on(workflow, OWN_CLIP)
        prompt = to_api(workflow, client.object_info())
        set_inputs(prompt, settings)
        return prompt

    return convert


def node_id(prompt: dict[str, Any], class_type: str, title: str | None = None) -> str:
    """The id of the node of a class (and title) in an API-format workflow."""
    return next(
        key
        for key, node in prompt.items()
        if node["class_type"] == class_type and title in (None, node.get("_meta", {}).get("title"))
    )


def saved(client: ComfyClient, prompt_id: str, prompt: dict[str, Any], server: ComfyServer) -> dict[str, Path]:
    """The files that a finished prompt saved, by their filename_prefix."""
    outputs = client.history(prompt_id)["outputs"]
    files = {}
    for node, content in outputs.items():
        for path in saved_files(content, server.output):
            files[prompt[node]["inputs"]["filename_prefix"]] = path
    return files


def probe(path: Path) -> tuple[int, int, int, Fraction, int]:
    """Frames, width, height, frame rate and number of audio streams of a video file."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        frames = sum(1 for _ in file.decode(video=0))
        return frames, stream.width, stream.height, stream.average_rate, len(file.streams.audio)


def executed(events: list[Any], prompt: dict[str, Any]) -> list[str]:
    """The classes of the nodes that ran, in order; what the cache held is not among them."""
    return [prompt[event.node]["class_type"] for event in events if isinstance(event, Executing)]


def reduced(prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with fewer pixels, frames and steps."""
    small = {
        "EmptyFlashVideoLatent": {"width": 64, "height": 32},
        "FlashVideoStage1Sampler": {"steps": 4},
        "FlashVideoStage1Scheduler": {"steps": 4},
        "FlashVideoPrepareFrames": {"scale": 2.0, "short_side": 88},
        "FlashVideoStage2Refiner": {"steps": 2, "cfg": 1.0},
        "KSampler": {"steps": 2, "cfg": 1.0},
        "ImageScaleBy": {"scale_by": 2.0},
    }
    for node in prompt.values():
        node["inputs"].update(small.get(node["class_type"], {}))
        if node["class_type"] == "EmptyFlashVideoLatent":
            node["inputs"]["length"] = min(9, node["inputs"]["length"])
    return prompt


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
def test_every_workflow_runs_to_its_end(
    client: ComfyClient, server: ComfyServer, prompt_of: Callable[..., dict[str, Any]], path: Path
) -> None:
    """As it comes: with nothing in the input folder, and no model file."""
    prompt = reduced(prompt_of(path))
    prompt_id = client.queue(prompt)
    events = list(client.events(prompt_id))
    assert isinstance(events[-1], Success), events[-1]
    files = saved(client, prompt_id, prompt, server)
    assert len(files) == sum(node["class_type"] in {"SaveVideo", "SaveImage"} for node in prompt.values())
    assert all(file.stat().st_size > 0 for file in files.values())


def test_draft_comes_first_and_committing_does_not_compute_it_again(
    client: ComfyClient, server: ComfyServer, prompt_of: Callable[..., dict[str, Any]]
) -> None:
    settings = (*SMALL, "FlashVideo Stage I Sampler.steps=4", "FlashVideo Stage I Sampler.seed=77")
    draft = prompt_of(TEXT_TO_VIDEO, *settings, commit=False)
    first = client.queue(draft)
    drafting = executed(list(client.events(first)), draft)
    assert drafting.count("FlashVideoStage1Sampler") == drafting.count("SaveVideo") == 1
    assert not {"FlashVideoStage2Refiner", "FlashVideoPrepareFrames", "VAEEncode"} & set(drafting)
    assert saved(client, first, draft, server).keys() == {"flashvideo/draft"}

    committed = prompt_of(TEXT_TO_VIDEO, *settings)
    second = client.queue(committed)
    committing = executed(list(client.events(second)), committed)
    assert not {"FlashVideoStage1Sampler", "EmptyFlashVideoLatent"} & set(committing)
    for kind in ("FlashVideoPrepareFrames", "FlashVideoStage2Refiner", "VAEDecode", "SaveVideo"):
        assert committing.count(kind) == 1, kind  # a second decoding would be the draft's
    assert "flashvideo/refined" in saved(client, second, committed, server)


def test_draft_is_shown_before_stage_two_even_when_both_run_at_once(
    client: ComfyClient, prompt_of: Callable[..., dict[str, Any]]
) -> None:
    seed = "FlashVideo Stage I Sampler.seed=78"
    prompt = prompt_of(TEXT_TO_VIDEO, *SMALL, "FlashVideo Stage I Sampler.steps=4", seed)
    order = [event.node for event in client.run(prompt) if isinstance(event, Executing)]
    shown, prepared = node_id(prompt, "SaveVideo", "The draft"), node_id(prompt, "FlashVideoPrepareFrames")
    assert order.index(shown) < order.index(prepared)


def test_text_to_video_saves_draft_and_refined_video(
    client: ComfyClient, server: ComfyServer, prompt_of: Callable[..., dict[str, Any]]
) -> None:
    prompt = prompt_of(TEXT_TO_VIDEO, *SMALL, "FlashVideo Stage I Sampler.steps=4")
    # Words of its own: what another test has encoded would come from the server's cache, without progress.
    prompt[node_id(prompt, "FlashVideoTextEncode")]["inputs"]["text"] = "a pink ring grows over a yellow desert"
    prompt_id = client.queue(prompt)
    events = list(client.events(prompt_id))
    assert isinstance(events[-1], Success), events[-1]

    files = saved(client, prompt_id, prompt, server)
    assert probe(files["flashvideo/draft"])[:3] == (9, 64, 32)
    assert probe(files["flashvideo/refined"])[:3] == (9, 256, 128)

    moved = {prompt[event.node]["class_type"] for event in events if isinstance(event, Progress)}
    assert moved >= {
        "FlashVideoTextEncode",
        "FlashVideoStage1Sampler",
        "VAEEncode",
        "FlashVideoStage2Refiner",
        "VAEDecode",
    }
    previews = [event for event in events if isinstance(event, Preview)]
    assert previews and all(event.image[:2] == b"\xff\xd8" for event in previews if event.kind == "jpeg")


def test_refining_a_clip_keeps_frames_size_ratio_rate_and_sound(
    client: ComfyClient, server: ComfyServer, prompt_of: Callable[..., dict[str, Any]], clip: Path
) -> None:
    prompt = prompt_of(REFINE, f"Load Video.file={clip.name}", "FlashVideo Prepare Frames.short_side=88")
    prompt_id = client.queue(prompt)
    events = list(client.events(prompt_id))
    assert isinstance(events[-1], Success), events[-1]

    files = saved(client, prompt_id, prompt, server)
    assert probe(files["flashvideo/refined"]) == (20, 140, 88, Fraction(12), 1)
    assert probe(files["flashvideo/side-by-side"]) == (20, 280, 88, Fraction(12), 1)
    outputs = client.history(prompt_id)["outputs"]
    told = "\n".join(outputs[node_id(prompt, "FlashVideoPrepareFrames")]["text"])
    assert "padded to 21 frames" in told


def test_the_shipped_region_graph_keeps_all_beyond_the_border_to_the_bit(
    client: ComfyClient, server: ComfyServer, prompt_of: Callable[..., dict[str, Any]], clip: Path
) -> None:
    """The clip keeps its size (the enlarging node is bypassed); its mask is a picture with a transparent hole."""
    hole = np.full((44, 70), 255, np.uint8)
    hole[14:30, 24:44] = 0  # rows, columns
    Image.merge("RGBA", [Image.new("L", (70, 44))] * 3 + [Image.fromarray(hole)]).save(server.input / "mask.png")
    workflow = switch_on(switch_on(read_workflow(REGION), OWN_CLIP), "Load Image: the mask")
    (enlarge,) = [node for node in workflow["nodes"] if node["type"] == "ImageScaleBy"]
    enlarge["mode"] = BYPASSED
    prompt = to_api(workflow, client.object_info())
    set_inputs(prompt, (f"Load Video.file={clip.name}", "Load Image: the mask.image=mask.png"))
    prompt[node_id(prompt, "FlashVideoCropRegion")]["inputs"] |= {"border": 4, "context": 2}
    composite = node_id(prompt, "ImageCompositeMasked")
    destination = prompt[composite]["inputs"]["destination"]
    for name, images in (("before", destination), ("after", [composite, 0])):
        prompt[name] = {"class_type": "SaveImage", "inputs": {"images": images, "filename_prefix": name}}
    prompt_id = client.queue(prompt)
    events = list(client.events(prompt_id))
    assert isinstance(events[-1], Success), events[-1]

    outputs = client.history(prompt_id)["outputs"]
    before, after = (
        np.stack([np.asarray(Image.open(path)) for path in saved_files(outputs[name], server.output)])
        for name in ("before", "after")
    )
    assert before.shape == after.shape == (20, 44, 70, 3)
    changed = (before != after).any(-1)
    assert changed[:, 14:30, 24:44].mean() > 0.5
    changed[:, 10:34, 20:48] = False  # the mask and its border
    assert not changed.any()


@pytest.mark.parametrize("class_type", ["FlashVideoStage1Sampler", "FlashVideoStage2Refiner"])
def test_cancel_stops_at_the_next_step_and_the_next_run_works(
    client: ComfyClient, prompt_of: Callable[..., dict[str, Any]], class_type: str
) -> None:
    steps = (
        "FlashVideo Stage I Sampler.steps=200"
        if class_type == "FlashVideoStage1Sampler"
        else "FlashVideo Stage II Refiner.steps=20"
    )
    prompt = prompt_of(TEXT_TO_VIDEO, *SMALL, "FlashVideo Stage I Sampler.steps=4", steps)
    node = node_id(prompt, class_type)
    done: list[float] = []
    end: Any = None
    for event in client.events(client.queue(prompt)):
        if isinstance(event, Progress) and event.node == node:
            done.append(event.value)
            if len(done) == 2:
                threading.Thread(target=client.interrupt).start()
        end = event
    assert isinstance(end, Interrupted), end
    assert end.node == node
    # The server answers between the request and the end of the step that runs then; nano's steps take milliseconds,
    # so a few may pass until the request arrives, but never the rest of the run.
    assert done[-1] < (100 if class_type == "FlashVideoStage1Sampler" else 20)

    events = client.run(prompt_of(TEXT_TO_VIDEO, *SMALL, "FlashVideo Stage I Sampler.steps=4"))
    assert isinstance(events[-1], Success), events[-1]


def test_a_user_s_mistake_is_told_in_words(client: ComfyClient, prompt_of: Callable[..., dict[str, Any]]) -> None:
    prompt = prompt_of(TEXT_TO_VIDEO, *SMALL)
    refiner = prompt[node_id(prompt, "FlashVideoStage2Refiner")]
    sampler = prompt[node_id(prompt, "FlashVideoStage1Sampler")]
    sampler["inputs"]["model"] = refiner["inputs"]["model"]
    end = client.run(prompt)[-1]
    assert isinstance(end, Failure)
    assert end.message.startswith("FlashVideo Stage I Sampler: model must be FlashVideo stage I")


def test_running_again_computes_nothing_again(client: ComfyClient, prompt_of: Callable[..., dict[str, Any]]) -> None:
    prompt = prompt_of(TEXT_TO_VIDEO, *SMALL, "FlashVideo Stage I Sampler.steps=4")
    client.run(prompt)
    again = client.run(prompt)
    assert not [kind for kind in executed(again, prompt) if kind.startswith("FlashVideo")]


def around(blueprint: str, wires: list[tuple[int, str]], clip: Path | None = None) -> dict[str, Any]:
    """A UI-format workflow of a blueprint's node, whose outputs (slot, filename_prefix) are saved, fed with a clip."""
    graph = read_workflow(WORKFLOWS.parent / "subgraphs" / f"{blueprint}.json")
    node, links = graph["nodes"][0], graph["links"]
    if clip is not None:
        loader = {"id": 101, "type": "LoadVideo", "inputs": [], "widgets_values": [clip.name, "image"]}
        graph["nodes"].append({**loader, "outputs": [{"name": "VIDEO", "type": "VIDEO", "links": [100]}]})
        links.append([100, 101, 0, node["id"], 0, "VIDEO"])
        node["inputs"][0]["link"] = 100
    for slot, prefix in wires:
        number = 110 + slot
        entry = {"name": "video", "type": "VIDEO", "link": number}
        saver = {"id": number, "type": "SaveVideo", "widgets_values": [prefix, "auto", "auto"]}
        graph["nodes"].append({**saver, "inputs": [entry], "outputs": []})
        links.append([number, node["id"], slot, number, 0, "VIDEO"])
        node["outputs"][slot]["links"] = [number]
    for each in graph["nodes"]:
        each.update({"mode": 0, "order": 0, "flags": {}, "pos": [0, 0], "size": [100, 100]} | each)
    return graph


def test_blueprints_run_as_they_come(client: ComfyClient, server: ComfyServer, clip: Path) -> None:
    """Each as a single node in a graph: the clip keeps frames and shape, the draft comes with the video."""
    refine = around("FlashVideo Refine Video", [(0, "refined")], clip)
    draft = around("FlashVideo Text to Video", [(0, "video"), (1, "draft")])
    for graph, expected in (
        (refine, {"refined": (20, 140, 88)}),
        (draft, {"video": (9, 128, 64), "draft": (9, 64, 32)}),
    ):
        prompt = reduced(to_api(graph, client.object_info()))
        prompt_id = client.queue(prompt)
        events = list(client.events(prompt_id))
        assert isinstance(events[-1], Success), events[-1]
        files = saved(client, prompt_id, prompt, server)
        assert {name: probe(path)[:3] for name, path in files.items()} == expected
