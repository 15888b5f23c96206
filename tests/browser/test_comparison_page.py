"""The page of `compare` in a real browser: the same frame on both sides, the slider, the keys."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from harness.bed import BED

ROOT = Path(__file__).resolve().parents[2]
HEIGHT, WIDTH, FRAMES = 144, 256, 8
SCREENSHOTS = BED / "screenshots"
SHIFT = 90  # of the brightness from one version to the other
_PIXEL = """([x, y]) => {
    const canvas = document.querySelector('canvas');
    return canvas.getContext('2d').getImageData(x * canvas.width, y * canvas.height, 1, 1).data[0];
}"""
_DRAWN = "frame => document.querySelector('canvas').dataset.drawn === String(frame)"


def grey(path: Path, brightest: int) -> Path:
    """A video whose brightness falls by 10 each frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(8), options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for index in range(FRAMES):
            pixels = np.full((HEIGHT, WIDTH, 3), brightest - 10 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture()
def page(browser: Any, tmp_path: Path) -> Any:
    """The page of two versions; it may have no complaint at the end."""
    videos = [grey(tmp_path / "before.mp4", 110), grey(tmp_path / "after.mp4", 110 + SHIFT)]
    command = [sys.executable, "-m", "flashvideo", "compare", *map(str, videos), str(tmp_path / "page.html")]
    subprocess.run(command, cwd=ROOT, check=True)
    context = browser.new_context(viewport={"width": 1200, "height": 1000}, offline=True)
    opened, problems = context.new_page(), []
    opened.on("console", lambda message: message.type == "error" and problems.append(message.text))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.goto((tmp_path / "page.html").as_uri())
    opened.wait_for_function(_DRAWN, arg=0)
    yield opened
    assert not problems
    context.close()


def test_both_sides_show_the_same_frame(page: Any) -> None:
    for frame in range(1, 5):
        page.keyboard.press("ArrowRight")
        page.wait_for_function(_DRAWN, arg=frame)
        page.wait_for_timeout(100)
        left, right = (page.evaluate(_PIXEL, [x, 0.5]) for x in (0.2, 0.8))
        assert abs(left - (110 - 10 * frame)) < 4
        assert abs(right - left - SHIFT) < 4
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(SCREENSHOTS / "comparison page.png"))


def test_the_line_follows_the_pointer_and_keys_show_one_side(page: Any) -> None:
    box = page.locator("canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + 60)
    page.mouse.up()
    assert abs(page.evaluate(_PIXEL, [0.8, 0.5]) - 110) < 4
    page.keyboard.press("b")
    assert abs(page.evaluate(_PIXEL, [0.1, 0.5]) - 110 - SHIFT) < 4
    page.keyboard.press("a")
    assert abs(page.evaluate(_PIXEL, [0.95, 0.5]) - 110) < 4
    page.keyboard.press("0")
    assert abs(page.evaluate(_PIXEL, [0.95, 0.5]) - 110 - SHIFT) < 4
    page.locator("#left").select_option("1")
    assert abs(page.evaluate(_PIXEL, [0.1, 0.5]) - 110 - SHIFT) < 4


def test_it_plays(page: Any) -> None:
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("() => Number(document.querySelector('canvas').dataset.drawn) >= 3")
    page.keyboard.press(" ")
    page.get_by_role("button", name="Play").wait_for()
