"""Remake the pictures of the help pages: every node of the pack as ComfyUI's page draws it, some with what they do.

    python scripts/node_pictures.py [WORDS ...]

Writes `web/docs/img/NODE.jpg` and puts it into `web/docs/NODE.md` where it isn't yet; WORDS pick the nodes whose name
contains one of them. Below nodes that change a clip stand the example clip before and after a real run of a workflow.
FlashVideo Compare keeps its picture, which shows the node after a run. Needs a Chromium on the
path, or the one that FLASHVIDEO_CHROMIUM names.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import set_up
from harness.bed import ROOT, TEMPORARY, Bed, say

if TYPE_CHECKING:
    from PIL import Image

DOCS = ROOT / "web" / "docs"
EXAMPLE = ROOT / "nodes" / "example_clip.mp4"
_VIEW = {"width": 1200, "height": 1000}
_QUALITY = 82
_KEPT = "FlashVideoCompare"
# The workflow that shows what a node does to the example clip, by the end of its name.
_EFFECTS = {
    "FlashVideoStage2Refiner": "Refine Any Video",
    "FlashVideoRefineLongVideo": "Refine Any Video",
    "FlashVideoCropRegion": "Refine a Region",
}
_IN_ONE = "FlashVideoRefineLongVideo"  # what this node stands for, and what it gets from where:
_STANDS_FOR = {
    "FlashVideoPrepareFrames": ("size", "short_side", "scale", "width", "height", "resample"),
    "FlashVideoLatentDegradation": ("strength", "seed"),
    "FlashVideoStage2Refiner": ("steps", "cfg", "shift", "window", "overlap"),
    "FlashVideoFinishFrames": ("color_match",),
}
_SOURCES = (
    ("model", "FlashVideoModelLoader", 0),
    ("vae", "FlashVideoVAELoader", 0),
    ("positive", "FlashVideoTextEncode", 0),
    ("negative", "FlashVideoTextEncode", 1),
    ("video", "FlashVideoExampleClip", 0),
)
_LABELS, _INK, _GAP = ("before", "after"), (235, 235, 235), 8
_SECTION = "## When to use it\n"
_NAMES = """() => Object.keys(window.LiteGraph.registered_node_types)
    .filter(name => name.includes('FlashVideo') && !name.includes('/')).sort()"""
# Draws one node alone; returns left, top, width and height of its picture in pixels of the page.
_DRAW = """async name => {
    const { app, LiteGraph } = window, zoom = 1.25, margin = 14, title = 30, badge = 20;
    app.graph.clear();
    const node = LiteGraph.createNode(name);
    app.graph.add(node);
    const [width, height] = node.computeSize();
    node.setSize([Math.max(width, 400), height]);
    node.pos = [200, 160];
    app.canvas.ds.scale = zoom;
    app.canvas.ds.offset = [0, 0];
    app.canvas.setDirty(true, true);
    await new Promise(resolve => setTimeout(resolve, 800));
    return [zoom * 200 - margin, zoom * (160 - title - badge) - margin / 2,
        zoom * node.size[0] + 2 * margin, zoom * (node.size[1] + title + badge) + 1.5 * margin];
}"""


def main() -> int:
    """Command line; returns the exit code."""
    return set_up.run_inside(__file__, lambda: _make_all([word.lower() for word in sys.argv[1:]]))


def _make_all(words: list[str]) -> None:
    """The imports inside need the bed's Python, in which this now runs."""
    from harness.browser import PATIENCE, READY, launch, write_settings
    from harness.comfy_server import ComfyServer

    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        raise RuntimeError("There is no Chromium on the path; FLASHVIDEO_CHROMIUM may name one.") from None
    bed, base = Bed.load(), TEMPORARY / "node-pictures"
    if bed is None:
        raise RuntimeError("The ComfyUI in .bed/ is not complete.")
    shutil.rmtree(base, ignore_errors=True)
    write_settings(base)
    loras = base / "models" / "loras"
    loras.mkdir(parents=True)
    (loras / "cogvideox_5b_lora.safetensors").touch()  # for the LoRA loader to show a name
    with ComfyServer(bed, base, device_options=["--cpu"]) as server, sync_playwright() as playwright:
        browser = launch(playwright)
        if browser is None:
            raise RuntimeError("There is no Chromium on the path; FLASHVIDEO_CHROMIUM may name one.")
        page = browser.new_page(viewport=_VIEW)
        page.set_default_timeout(PATIENCE)
        page.goto(server.address, wait_until="domcontentloaded")
        page.wait_for_function(READY)
        for name in page.evaluate(_NAMES):
            if name != _KEPT and (not words or any(word in name.lower() for word in words)):
                left, top, width, height = page.evaluate(_DRAW, name)
                drawn = page.screenshot(clip={"x": left, "y": top, "width": width, "height": height})
                _save(name, drawn, _refined(server, name) if name in _EFFECTS else None)
                say(name)
        browser.close()


def _refined(server: Any, name: str) -> Path:
    """The video that a workflow with this node makes of the example clip."""
    from harness.workflow_files import shipped
    from harness.workflow_runs import run_workflow

    (path,) = [path for path in shipped() if path.stem.endswith(_EFFECTS[name])]
    adjust = _use_one_node if name == _IN_ONE else None
    files = run_workflow(server, path, lambda _line: None, adjust=adjust).files
    return next(paths[0] for prefix, paths in files.items() if prefix.endswith("refined"))


def _use_one_node(prompt: dict[str, Any]) -> None:
    """Let one node do what several do in a workflow (API format), with their numbers."""
    ids = {node["class_type"]: number for number, node in prompt.items()}
    inputs = {
        name: value
        for kind, names in _STANDS_FOR.items()
        for name, value in prompt[ids[kind]]["inputs"].items()
        if name in names
    }
    for name, kind, output in _SOURCES:
        inputs[name] = [ids[kind], output]
    prompt["one"] = {"class_type": _IN_ONE, "inputs": inputs}
    for node in prompt.values():
        if node["class_type"] == "SaveVideo" and node["inputs"]["filename_prefix"].endswith("refined"):
            node["inputs"]["video"] = ["one", 0]


def _save(name: str, drawn: bytes, refined: Path | None) -> None:
    """Write the picture, and the help page's line for it."""
    from PIL import Image

    picture = Image.open(io.BytesIO(drawn)).convert("RGB")
    if refined is not None:
        picture = _with_effect(picture, refined)
    (DOCS / "img").mkdir(exist_ok=True)
    picture.save(DOCS / "img" / f"{name}.jpg", quality=_QUALITY, optimize=True)
    page = DOCS / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    line = f"![{text.splitlines()[0].removeprefix('# ')}](img/{name}.jpg)\n\n"
    if line not in text:
        page.write_text(text.replace(_SECTION, line + _SECTION, 1), encoding="utf-8")


def _with_effect(node: Image.Image, refined: Path) -> Image.Image:
    """A node's picture with the middle frame of the example clip below it, enlarged, beside the refined one."""
    from harness.contact_sheet import read_frames
    from PIL import Image, ImageDraw, ImageFont

    width = (node.width - _GAP) // 2
    pair = [frames[len(frames) // 2] for frames in map(read_frames, (EXAMPLE, refined))]
    height = round(width * pair[1].height / pair[1].width)
    whole = Image.new("RGB", (node.width, node.height + _GAP + height))
    whole.paste(node)
    for number, (label, frame) in enumerate(zip(_LABELS, pair, strict=True)):
        cell = frame.resize((width, height), Image.Resampling.BILINEAR)
        ImageDraw.Draw(cell).text((_GAP, _GAP), label, _INK, ImageFont.load_default(18), stroke_width=2, stroke_fill=0)
        whole.paste(cell, (number * (width + _GAP), node.height + _GAP))
    return whole


if __name__ == "__main__":
    sys.exit(main())
