"""The harness itself, with ComfyUI's own nodes: start, convert, run, follow, cancel, report, stop."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import pytest
import set_up
import torch
from harness.bed import PACK_NAME, Bed
from harness.comfy_client import (
    ComfyClient,
    Executed,
    Executing,
    Failure,
    Interrupted,
    Progress,
    RejectedWorkflow,
    Success,
    saved_files,
)
from harness.comfy_server import ComfyServer, ServerError
from harness.contact_sheet import Row, contact_sheet, cut_clip, describe, read_frames, resized, side_by_side
from harness.workflow_api import WorkflowError, set_inputs, to_api
from harness.workflow_runs import run_workflow
from PIL import Image
from safetensors.torch import save_file

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
FRAMES, WIDTH, HEIGHT = 9, 64, 48
LONG_RUN = 3000  # frames: many seconds of work, to be cancelled


def node(kind: str, title: str = "", **inputs: object) -> dict[str, Any]:
    """A node of an API-format workflow."""
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title or kind}}


def grey_video(prefix: str) -> dict[str, Any]:
    """A workflow that saves a grey video."""
    return {
        "1": node("EmptyImage", width=WIDTH, height=HEIGHT, batch_size=FRAMES, color=0x808080),
        "2": node("CreateVideo", images=["1", 0], fps=8.0),
        "3": node("SaveVideo", video=["2", 0], filename_prefix=prefix, format="mp4", codec="h264"),
    }


def enlarged(server: ComfyServer, frames: int) -> dict[str, Any]:
    """A workflow with a node that reports progress: ComfyUI's upscaler with a tiny model, one step a frame."""
    models = server.base / "models" / "upscale_models"
    models.mkdir(exist_ok=True)
    shapes = {"0": (8, 3, 3, 3), "1": (8,), "2": (8, 8, 3, 3), "3": (8,), "4": (12, 8, 3, 3)}  # 12: 3 colours, 2x2
    weights = {f"body.{layer}.weight": torch.full(shape, 0.01) for layer, shape in shapes.items()}
    weights |= {f"body.{layer}.bias": torch.zeros(shapes[layer][0]) for layer in ("0", "2", "4")}
    save_file(weights, models / "tiny.safetensors")
    return {
        "1": node("EmptyImage", width=WIDTH, height=HEIGHT, batch_size=frames, color=frames),
        "2": node("UpscaleModelLoader", model_name="tiny.safetensors"),
        "3": node("ImageUpscaleWithModel", upscale_model=["2", 0], image=["1", 0]),
        "4": node("PreviewImage", images=["3", 0]),
    }


def ui_node(number: int, kind: str, widgets: list[Any], inputs: list[tuple], outputs: list[tuple], **more: Any) -> dict:
    """A node as ComfyUI's page saves it. Inputs are (name, type, link), outputs (name, type, links)."""
    return {
        "id": number, "type": kind, "mode": 0, "order": number, "pos": [number * 300, 0], "size": [270, 100],
        "inputs": [{"name": name, "type": of, "link": link} for name, of, link in inputs],
        "outputs": [{"name": name, "type": of, "links": links} for name, of, links in outputs],
        "properties": {"Node name for S&R": kind}, "widgets_values": widgets, **more,
    }  # fmt: skip


def ui_graph(nodes: list[dict[str, Any]], links: list[list[Any]]) -> dict[str, Any]:
    """A graph as ComfyUI's page saves it."""
    return {"last_node_id": 99, "last_link_id": 99, "nodes": nodes, "links": links, "groups": [], "version": 0.4}


@pytest.mark.skipif(os.name == "nt", reason="shells of POSIX start background programs so")
@pytest.mark.parametrize(("prepare", "heeded"), [("bed.stop_on_terminate()", "True"), ("pass", "False")])
def test_what_is_started_in_the_background_heeds_ctrl_c(prepare: str, heeded: str) -> None:
    child = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    start = f"subprocess.run([sys.executable, '-c', {child!r}])"
    script = f"import subprocess, sys; from harness import bed; {prepare}; {start}"
    background = ["sh", "-c", """trap '' INT; exec "$0" "$@" """, sys.executable, "-c", script]
    found = subprocess.run(background, cwd=SCRIPTS, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == heeded


def test_the_bed_is_changed_by_one_program_at_a_time(tmp_path: Path) -> None:
    script = f"""
import pathlib, sys, time
from harness import bed
bed.LOCK = pathlib.Path({str(tmp_path / "lock")!r})
with bed.alone("waiting"):
    bed.say("alone")
    time.sleep(float(sys.argv[1]))
"""

    def start(stay: int) -> subprocess.Popen:
        command = [sys.executable, "-c", script, str(stay)]
        return subprocess.Popen(command, cwd=SCRIPTS, stdout=subprocess.PIPE, text=True)

    with start(stay=600) as first:
        assert first.stdout.readline() == "alone\n"
        with start(stay=0) as second:
            assert second.stdout.readline() == "waiting\n"
            first.kill()
            assert second.stdout.read() == "alone\n"
    assert second.returncode == 0


@pytest.fixture()
def ui_workflow() -> dict[str, Any]:
    """Image, inverted by a bypassed node, saved twice: once by a muted node."""
    image = ui_node(1, "EmptyImage", [WIDTH, HEIGHT, FRAMES, 255], [], [("IMAGE", "IMAGE", [1])])
    invert = ui_node(2, "ImageInvert", [], [("image", "IMAGE", 1)], [("IMAGE", "IMAGE", [2, 4])], mode=4)
    slots = [("images", "IMAGE", 2), ("audio", "AUDIO", None)]
    video = ui_node(3, "CreateVideo", [8], slots, [("VIDEO", "VIDEO", [3])])
    save = ui_node(4, "SaveVideo", ["flashvideo/blue", "auto", "auto"], [("video", "VIDEO", 3)], [], title="Keep")
    muted = ui_node(5, "PreviewImage", [], [("images", "IMAGE", 4)], [], mode=2)
    links = [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"], [3, 3, 0, 4, 0, "VIDEO"], [4, 2, 0, 5, 0, "IMAGE"]]
    return ui_graph([image, invert, video, save, muted], links)


HERE = str(Path(__file__).parent)


@pytest.mark.parametrize(
    ("host", "theirs", "answers", "chosen"),
    [
        ("", "", True, "clone"),
        ("", "", False, "copy"),
        ("newest", "", True, "clone"),
        ("0.3.75", "", True, "copy"),
        ("", "/somewhere", True, "theirs, /somewhere"),
        ("newest", "", False, "HOST=newest needs the ComfyUI on GitHub"),
        ("newest", "/somewhere", True, "leave one out"),
        ("0.33", "", True, "HOST is 0.33: choose newest, 0.3.75 or the folder of a ComfyUI"),
        (HERE, "", True, f"theirs, {HERE}"),
        (HERE, "/somewhere", True, "leave one out"),
    ],
)
def test_host_says_which_comfyui_is_taken(
    host: str, theirs: str, answers: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMFYUI_PATH", theirs)
    monkeypatch.setattr(set_up, "_their_comfyui", lambda _key, named: f"theirs, {named}")
    monkeypatch.setattr(set_up, "_cloned_comfyui", lambda _key: "clone" if answers else None)
    monkeypatch.setattr(set_up, "_packaged_comfyui", lambda _key: "copy")
    if chosen.split()[0] not in ("theirs,", "clone", "copy"):
        with pytest.raises(set_up.SetUpError, match=chosen):
            set_up._chosen_comfyui("key", host)
    else:
        assert set_up._chosen_comfyui("key", host) == chosen


def test_another_host_is_set_up_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {set_up._key({"FLASHVIDEO_HOST": host}) for host in ("", "newest", "0.3.75")}
    assert len(keys) == 3


def test_server_has_the_pack_and_imported_everything(server: ComfyServer) -> None:
    assert (server.base / "custom_nodes" / PACK_NAME / "pyproject.toml").exists()
    assert server.import_failures == []


def test_a_workflow_reports_each_node_and_saves_a_video(server: ComfyServer, client: ComfyClient) -> None:
    prompt_id = client.queue(grey_video("harness/grey"))
    events = list(client.events(prompt_id))
    assert [event.node for event in events if isinstance(event, Executing)] == ["1", "2", "3"]
    assert isinstance(events[-1], Success)
    (done,) = [event for event in events if isinstance(event, Executed)]
    (video,) = saved_files(done.outputs, server.output)
    with av.open(str(video)) as container:
        assert sum(1 for _ in container.decode(video=0)) == FRAMES
    assert client.history(prompt_id)["outputs"].keys() == {"3"}


def test_progress_of_a_long_node_arrives(server: ComfyServer, client: ComfyClient) -> None:
    events = client.run(enlarged(server, frames=FRAMES))
    steps = [event for event in events if isinstance(event, Progress)]
    values = [step.value for step in steps]
    assert values == sorted(set(values))  # newer versions leave some out
    assert (values[0], values[-1]) == (1, FRAMES)
    assert {(step.node, step.maximum) for step in steps} == {("3", FRAMES)}


def test_cancel_stops_inside_a_node_and_the_next_run_works(server: ComfyServer, client: ComfyClient) -> None:
    events = client.events(client.queue(enlarged(server, frames=LONG_RUN)))
    for event in events:
        if isinstance(event, Progress):
            client.interrupt()
            break
    rest = list(events)
    assert rest[-1] == Interrupted("3")
    assert len([event for event in rest if isinstance(event, Progress)]) < LONG_RUN // 10
    assert isinstance(client.run(grey_video("harness/after"))[-1], Success)


def test_ui_format_follows_bypass_mute_and_widgets(client: ComfyClient, ui_workflow: dict[str, Any]) -> None:
    prompt = to_api(ui_workflow, client.object_info())
    assert set(prompt) == {"1", "3", "4"}
    assert prompt["1"]["inputs"] == {"width": WIDTH, "height": HEIGHT, "batch_size": FRAMES, "color": 255}
    assert {"images": ["1", 0], "fps": 8}.items() <= prompt["3"]["inputs"].items()  # newer versions have more
    saved = {"video": ["3", 0], "filename_prefix": "flashvideo/blue", "format": "auto"}
    assert saved.items() <= prompt["4"]["inputs"].items()
    assert "auto" in (prompt["4"]["inputs"].get("codec"), prompt["4"]["inputs"].get("format.codec"))


def test_seeds_keep_their_hidden_control(client: ComfyClient) -> None:
    """A seed is followed by its "control after generate" in the saved values; the server must not see it."""
    noise = ui_node(1, "RandomNoise", [123, "randomize"], [], [("NOISE", "NOISE", [])])
    prompt = to_api(ui_graph([noise], []), client.object_info())
    assert prompt["1"]["inputs"] == {"noise_seed": 123}


def test_a_workflow_file_runs_and_tells_each_phase(
    server: ComfyServer, ui_workflow: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "blue.json"
    file.write_text(json.dumps(ui_workflow))
    lines: list[str] = []
    run = run_workflow(server, file, lines.append, settings=["Keep.filename_prefix=flashvideo/own", "1.color=65280"])
    names = [phase.name for phase in run.phases]
    assert [name.replace(" ", "") for name in names] == ["EmptyImage", "CreateVideo", "Keep"]
    assert [re.split("  +", line.strip())[0] for line in lines] == names
    (video,) = run.files["flashvideo/own"]
    red, green, blue = read_frames(video)[0].getpixel((WIDTH // 2, HEIGHT // 2))
    assert green > 200 and red < 60 and blue < 60


def test_an_unknown_node_is_named(client: ComfyClient) -> None:
    with pytest.raises(WorkflowError, match=r"no node of these types: NoSuchNode\."):
        to_api(ui_graph([ui_node(1, "NoSuchNode", [], [], [])], []), client.object_info())


def test_a_file_that_is_no_workflow_is_named(server: ComfyServer, tmp_path: Path) -> None:
    file = tmp_path / "letter.json"
    file.write_text("Dear all,")
    with pytest.raises(WorkflowError, match="letter.json is not a workflow file"):
        run_workflow(server, file, str)
    with pytest.raises(WorkflowError, match="nowhere.json can't be read"):
        run_workflow(server, tmp_path / "nowhere.json", str)


def test_a_wrong_input_is_named_before_anything_runs(client: ComfyClient) -> None:
    prompt = grey_video("harness/never")
    prompt["1"]["inputs"]["width"] = 0
    with pytest.raises(RejectedWorkflow, match="EmptyImage: Value 0 smaller than min of 1"):
        client.queue(prompt)


def test_a_failing_node_is_named_with_its_message(server: ComfyServer, client: ComfyClient, tmp_path: Path) -> None:
    (server.input / "broken.mp4").write_text("this is no video")
    prompt = {
        "1": node("LoadVideo", "My clip", file="broken.mp4"),
        "2": node("GetVideoComponents", "Frames", video=["1", 0]),
        "3": node("PreviewImage", images=["2", 0]),
    }
    failure = client.run(prompt)[-1]
    assert isinstance(failure, Failure)
    assert (failure.node, failure.node_type) == ("2", "GetVideoComponents")
    file = tmp_path / "broken.json"
    file.write_text(json.dumps(prompt))
    with pytest.raises(WorkflowError, match=r"^Frames: .*[Ii]nvalid data"):
        run_workflow(server, file, str)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("width", "write NODE.INPUT=VALUE"),
        ("9.width=1", "No nodes are called 9"),
        ("1.breadth=1", "node 1 has the inputs width, height, batch_size, color"),
    ],
)
def test_a_wrong_setting_is_explained(setting: str, message: str) -> None:
    with pytest.raises(WorkflowError, match=message):
        set_inputs(grey_video("x"), [setting])


def test_settings_keep_the_kind_of_value() -> None:
    prompt = grey_video("x")
    set_inputs(prompt, ["1.width=128", "createvideo.fps=12.5", "3.filename_prefix=7"])
    assert prompt["1"]["inputs"]["width"] == 128
    assert prompt["2"]["inputs"]["fps"] == 12.5
    assert prompt["3"]["inputs"]["filename_prefix"] == "7"


def test_clip_and_contact_sheet(server: ComfyServer, client: ComfyClient, tmp_path: Path) -> None:
    (done,) = [event for event in client.run(grey_video("harness/sheet")) if isinstance(event, Executed)]
    (video,) = saved_files(done.outputs, server.output)
    clip, sheet = tmp_path / "clip.mp4", tmp_path / "sheet.png"
    cut_clip(video, clip, first=2, count=5, size=(32, 16))
    assert describe(clip) == "32x16, 5 frames, 8 fps"
    contact_sheet([Row("Input", clip), Row("Whole", video)], sheet)
    width, height = Image.open(sheet).size
    assert width == 6 * 408 + 8  # six frames, although the clip has only five
    assert height == 200 + 300 + 2 * 48
    with pytest.raises(RuntimeError, match="is too short: 20 frames from frame 0 on"):
        cut_clip(video, clip, first=0, count=20, size=(32, 16))


def test_three_videos_are_shown_side_by_side_pixel_for_pixel(tmp_path: Path) -> None:
    whole = tmp_path / "whole.mp4"
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 48), (200, 40, 90)))))
        container.mux(stream.encode(None))
    small, large, page = (tmp_path / name for name in ("small.mp4", "large.mp4", "page.png"))
    cut_clip(whole, small, first=0, count=3, size=(16, 12))
    resized(small, large, (64, 48))
    assert describe(large) == "64x48, 3 frames, 8 fps"
    side_by_side([Row("Bicubic", large), Row("Truth", whole), Row("Small", small)], page)
    picture = Image.open(page)
    assert picture.size == (64 + 64 + 16 + 4 * 8, 48 + 48)
    for left in (8 + 32, 8 + 72 + 32, 8 + 144 + 8):
        assert max(abs(a - b) for a, b in zip(picture.getpixel((left, 40 + 6)), (200, 40, 90), strict=True)) < 8


def test_stopping_leaves_no_process_and_frees_the_port(bed: Bed, tmp_path: Path) -> None:
    with ComfyServer(bed, tmp_path / "a base", with_pack=False, device_options=["--cpu"]) as server:
        pid, port = server.pid, int(server.address.rpartition(":")[2])
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def test_a_start_that_fails_shows_the_log(bed: Bed, tmp_path: Path) -> None:
    broken = ComfyServer(bed, tmp_path, with_pack=False, device_options=["--cpu"], options=["--no-such-option"])
    with pytest.raises(ServerError, match="unrecognized arguments: --no-such-option"), broken:
        pass
