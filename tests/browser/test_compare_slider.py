"""The slider of FlashVideo Compare on ComfyUI's page: what it shows, by its pixels, and how it is used.

The clips tell each pixel's origin: red is the clip and the frame, green grows to the right, blue downwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from harness.comfy_server import ComfyServer

HEIGHT, WIDTH, FRAMES, RATE = 180, 320, 8, 4
BEFORE, AFTER, DARKER = 120, 220, 12  # red of the first frame; of each further frame less
NEAR = 5  # of 255: two encodings of smooth colours
COMPARE = 5
_HOST = ".flashvideo-compare"
_PIXEL = """([x, y]) => {
    const canvas = document.querySelector('.flashvideo-compare').shadowRoot.querySelector('canvas');
    return [...canvas.getContext('2d').getImageData(x * canvas.width, y * canvas.height, 1, 1).data].slice(0, 3);
}"""
_IS_AT = "frame => document.querySelector('.flashvideo-compare')?.dataset.frame === String(frame)"
_GET = "name => window.app.extensionManager.setting.get(name)"
_SET = """([name, value]) => window.app.extensionManager.setting.set(name, value)"""
LOCALE = "Comfy.Locale"
_SET_LOCALE = """async locale => {  // and wait for the page, which then loads its graph anew
    const app = window.app, load = app.loadGraphData;
    if (app.extensionManager.setting.get('Comfy.Locale') === locale) return;
    const loaded = new Promise(resolve => {
        app.loadGraphData = async (...values) => {
            app.loadGraphData = load;
            try { return await load.apply(app, values) } finally { resolve() }
        };
    });
    await app.extensionManager.setting.set('Comfy.Locale', locale);
    await loaded;
}"""


def node(number: int, kind: str, left: int, inputs: list, outputs: list, values: list) -> dict[str, Any]:
    """A node of a workflow; inputs are (name, type, link), outputs (name, type, links)."""
    widgets = {"layout", "fps"}
    return {
        **{"id": number, "type": kind, "pos": [left, 60 + 380 * (number % 2)], "size": [260, 100], "mode": 0},
        **{"flags": {}, "order": number, "properties": {}, "widgets_values": values},
        "inputs": [
            {"name": name, "type": type_, "link": link, **({"widget": {"name": name}} if name in widgets else {})}
            for name, type_, link in inputs
        ],
        "outputs": [{"name": name, "type": type_, "links": links} for name, type_, links in outputs],
    }


def graph(before: str, after: str) -> dict[str, Any]:
    """Two files into a Compare with nothing behind it."""
    parts = [("images", "IMAGE", []), ("audio", "AUDIO", []), ("fps", "FLOAT", [])]
    first, second = [[(*part[:2], list(part[2])) for part in parts] for _ in range(2)]
    first[0][2].append(3)
    first[2][2].append(5)
    second[0][2].append(4)
    inputs = [("before", "IMAGE", 3), ("after", "IMAGE", 4), ("layout", "COMBO", None), ("fps", "FLOAT", 5)]
    nodes = [
        node(1, "LoadVideo", 0, [], [("VIDEO", "VIDEO", [1])], [before, "image"]),
        node(2, "LoadVideo", 0, [], [("VIDEO", "VIDEO", [2])], [after, "image"]),
        node(3, "GetVideoComponents", 400, [("video", "VIDEO", 1)], first, []),
        node(4, "GetVideoComponents", 400, [("video", "VIDEO", 2)], second, []),
        node(COMPARE, "FlashVideoCompare", 600, inputs, [("images", "IMAGE", [])], ["side by side", 24]),
    ]
    nodes[-1].update(pos=[900, 60], size=[400, 106])
    links = [[1, 1, 0, 3, 0], [2, 2, 0, 4, 0], [3, 3, 0, 5, 0], [4, 4, 0, 5, 1], [5, 3, 2, 5, 3]]
    types = ["VIDEO", "VIDEO", "IMAGE", "IMAGE", "FLOAT"]
    return {
        **{"id": "6c3c0a53-5a6f-4b6e-9d67-2a4a3f1a26c1", "revision": 0, "last_node_id": 5, "last_link_id": 5},
        **{"nodes": nodes, "links": [[*link, kind] for link, kind in zip(links, types, strict=True)]},
        **{"groups": [], "config": {}, "extra": {}, "version": 0.4},
    }


@pytest.fixture(scope="module", autouse=True)
def clips(server: ComfyServer) -> None:
    """What the graphs load."""
    for name, red, frames in (
        *(("before.mp4", BEFORE, FRAMES), ("after.mp4", AFTER, FRAMES)),
        *(("before picture.mp4", BEFORE, 1), ("after picture.mp4", AFTER, 1)),
    ):
        write_clip(server.input / name, red, frames)


def write_clip(path: Path, red: int, frames: int) -> None:
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[..., 1] = np.linspace(20, 230, WIDTH)
    pixels[..., 2] = np.linspace(20, 230, HEIGHT)[:, None]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(RATE), options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(frames):
            pixels[..., 0] = red - DARKER * index
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


class Slider:
    """A page that has run a graph with a Compare."""

    def __init__(self, comfy_page: Any, *, picture: bool = False) -> None:
        self.comfy, self.page = comfy_page, comfy_page.page
        self.comfy.problems.clear()
        files = (f"{name}{' picture' if picture else ''}.mp4" for name in ("before", "after"))
        self.page.evaluate("graph => window.app.loadGraphData(graph)", graph(*files))
        self.page.wait_for_timeout(500)
        self.run()
        self.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.page.wait_for_function("() => document.querySelector('.flashvideo-compare')?.dataset.frame")
        self.page.wait_for_timeout(700)  # the view moves

    def run(self) -> None:
        end, details = self.comfy.run()
        assert end == "execution_success", details

    def place(self, x: float, y: float) -> tuple[float, float]:
        """A point of the stage, given as shares of its sides, on the page."""
        box = self.page.locator(f"{_HOST} canvas").bounding_box()
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def point(self, x: float, y: float = 0.5) -> None:
        """Move the mouse there, as a hand does: in more than one step."""
        self.page.mouse.move(*self.place(x - 0.02, y))
        self.page.mouse.move(*self.place(x, y), steps=2)

    def drag(self, x: float, to: float, y: float = 0.5) -> None:
        self.point(x, y)
        self.page.mouse.down()
        self.page.mouse.move(*self.place(to, y), steps=4)
        self.page.mouse.up()

    def pixel(self, x: float, y: float = 0.5) -> list[int]:
        return self.page.evaluate(_PIXEL, [x, y])

    def red(self, x: float) -> int:
        return self.pixel(x)[0]

    def stop_at_start(self) -> None:
        """Pause, and go back to the first frame."""
        self.point(0.5)
        if self.page.locator(f"{_HOST} button.play").get_attribute("aria-label") == "Pause":
            self.page.keyboard.press(" ")
        self.page.locator(f"{_HOST} input.time").fill("0")
        self.wait_for_frame(0)

    def wait_for_frame(self, frame: int) -> None:
        self.page.wait_for_function(_IS_AT, arg=frame)

    def frame(self) -> int:
        return int(self.page.locator(_HOST).get_attribute("data-frame"))


def near(value: int, expected: float) -> bool:
    return abs(value - expected) <= NEAR


@pytest.fixture()
def setting(comfy_page: Any) -> Iterator[Callable[[str, Any], None]]:
    """Set one of the page's settings; all are as before after the test."""
    before: dict[str, Any] = {}

    def change(name: str, value: Any) -> None:
        before.setdefault(name, comfy_page.page.evaluate(_GET, name))
        if name == LOCALE:
            comfy_page.page.evaluate(_SET_LOCALE, value)
        else:
            comfy_page.page.evaluate(_SET, [name, value])

    yield change
    for name, value in [*before.items()]:
        change(name, value)
    comfy_page.page.evaluate("() => window.app.graph.clear()")


@pytest.mark.parametrize("kind", ["canvas", "Nodes 2.0"])
def test_the_slider_shows_before_and_after_at_the_same_frame(
    comfy_page: Any, setting: Callable[[str, Any], None], kind: str
) -> None:
    setting("Comfy.VueNodes.Enabled", kind == "Nodes 2.0")
    slider = Slider(comfy_page)
    slider.stop_at_start()
    name = f"slider, {kind}"
    for frame in range(1, 5):
        slider.page.keyboard.press("ArrowRight")
        slider.wait_for_frame(frame)
        assert near(slider.red(0.2), BEFORE - DARKER * frame)
        assert near(slider.red(0.8), AFTER - DARKER * frame)
    slider.comfy.photograph(name, whole_graph=False)

    slider.point(0.9)
    assert near(slider.red(0.85), BEFORE - DARKER * 4), "the line follows the pointer"
    slider.drag(0.5, 0.2)
    assert near(slider.red(0.15), BEFORE - DARKER * 4)
    assert near(slider.red(0.25), AFTER - DARKER * 4)

    slider.page.keyboard.press("a")
    assert near(slider.red(0.95), BEFORE - DARKER * 4), "pressed"
    slider.page.keyboard.press("a")
    assert near(slider.red(0.95), AFTER - DARKER * 4)
    slider.page.keyboard.down("b")
    assert near(slider.red(0.05), AFTER - DARKER * 4)
    slider.page.wait_for_timeout(500)
    slider.page.keyboard.up("b")
    assert near(slider.red(0.05), BEFORE - DARKER * 4), "held"

    _zooms(slider)
    slider.comfy.photograph(f"{name}, used", whole_graph=False)
    assert slider.comfy.problems == []


def _zooms(slider: Slider) -> None:
    """By the wheel where the pointer is, by drags, and back by a double click."""
    whole = [slider.pixel(x)[1] for x in (0.25, 0.75)]
    graph_scale = slider.page.evaluate("() => window.app.canvas.ds.scale")
    slider.point(0.25)
    for _ in range(3):
        slider.page.mouse.wheel(0, -300)
    assert near(slider.pixel(0.25)[1], whole[0]), "what lies under the pointer stays there"
    part = slider.pixel(0.75)[1] - slider.pixel(0.25)[1]
    assert part == pytest.approx((whole[1] - whole[0]) / np.exp(900 * 0.0015), abs=NEAR)
    place = slider.page.evaluate("id => [...window.app.graph.getNodeById(id).pos]", COMPARE)
    slider.drag(0.3, 0.8)
    assert near(slider.pixel(0.75)[1], whole[0]), "dragged to the right by half of the stage"
    assert slider.page.evaluate("id => [...window.app.graph.getNodeById(id).pos]", COMPARE) == place
    assert slider.page.evaluate("() => window.app.canvas.ds.scale") == graph_scale
    slider.page.mouse.dblclick(*slider.place(0.4, 0.5))
    assert [near(slider.pixel(x)[1], green) for x, green in zip((0.25, 0.75), whole, strict=True)] == [True, True]


def test_it_plays_in_step_and_a_run_renews_it(comfy_page: Any) -> None:
    slider = Slider(comfy_page)
    slider.stop_at_start()
    slider.page.keyboard.press(" ")
    seen = set()
    for _ in range(100):
        slider.page.wait_for_timeout(120)
        left, right = slider.page.evaluate(f"() => [[0.2, 0.5], [0.8, 0.5]].map({_PIXEL})")  # at one moment
        assert near(right[0] - left[0], AFTER - BEFORE)
        seen.add(round((BEFORE - left[0]) / DARKER))
        if len(seen) == 4:
            break
    assert len(seen) == 4, seen
    slider.page.keyboard.press(" ")
    shown = slider.frame()
    slider.page.wait_for_timeout(600)
    assert slider.frame() == shown, "paused"

    values = slider.comfy.saved()["nodes"][-1]["widgets_values"]
    assert values == ["side by side", 24], "the slider is no value of the workflow"
    slider.run()  # cached: the same file
    assert slider.frame() == shown
    assert slider.page.locator(_HOST).count() == 1
    slider.comfy.set_widgets({"FlashVideoCompare": {"layout": "split"}})
    slider.run()
    slider.page.wait_for_function(_IS_AT, arg=0)
    assert slider.page.locator(_HOST).count() == 1

    slider.page.evaluate(
        "() => window.app.loadGraphData(window.app.graph.serialize(), false, false)"
    )  # as an undo does
    slider.page.wait_for_function("() => document.querySelector('.flashvideo-compare')?.dataset.frame")
    assert slider.page.locator(_HOST).count() == 1
    slider.page.evaluate("id => window.app.graph.remove(window.app.graph.getNodeById(id))", COMPARE)
    slider.page.wait_for_function("() => !document.querySelector('.flashvideo-compare')")
    assert slider.comfy.problems == []


def test_pictures_and_lists_have_a_slider_too_and_other_languages_their_words(
    comfy_page: Any, setting: Callable[[str, Any], None]
) -> None:
    setting(LOCALE, "ja")
    slider = Slider(comfy_page, picture=True)
    assert not slider.page.locator(f"{_HOST} button.play").is_visible()
    assert slider.page.locator(f"{_HOST} .name.before").inner_text() == "前"
    assert near(slider.red(0.2), BEFORE) and near(slider.red(0.8), AFTER)
    # As ComfyUI reports a node that ran once for each entry of a list; the second is gone, a third is not ours.
    slider.page.evaluate(
        """id => {
            const node = window.app.graph.getNodeById(id), key = 'flashvideo_compare';
            const first = window.app.nodeOutputs[id][key][0];
            const gone = { ...first, file: { ...first.file, filename: 'no & such?.png' } };
            node.onExecuted({ [key]: [first, gone, { file: null }] });
        }""",
        COMPARE,
    )
    assert slider.page.locator(f"{_HOST} .number").inner_text() == "1/2"
    slider.page.locator(f"{_HOST} button.next").click()
    slider.page.locator(f"{_HOST} .message").wait_for()
    (problem,) = comfy_page.problems  # Chromium's own line on the missing file, whose name is whole
    assert "404" in problem and "filename=no+%26+such%3F.png" in problem
    slider.page.locator(f"{_HOST} button.previous").click()
    slider.page.locator(f"{_HOST} .message").wait_for(state="hidden")
    slider.page.wait_for_function("() => document.querySelector('.flashvideo-compare')?.dataset.frame === '0'")
    assert near(slider.red(0.8), AFTER)
    slider.comfy.photograph("slider, a picture", whole_graph=False)
