"""Remake the pictures of the help pages: every node of the pack as ComfyUI's page draws it.

    python scripts/node_pictures.py [WORDS ...]

Writes `web/docs/img/NODE.jpg` and puts it into `web/docs/NODE.md` where it isn't yet; WORDS pick the nodes whose name
contains one of them. FlashVideo Compare keeps its picture, which shows the node after a run. Needs a Chromium on the
path, or the one that FLASHVIDEO_CHROMIUM names.
"""

from __future__ import annotations

import io
import shutil
import sys

import set_up
from harness.bed import ROOT, TEMPORARY, Bed, say

DOCS = ROOT / "web" / "docs"
_VIEW = {"width": 1200, "height": 1000}
_QUALITY = 82
_KEPT = "FlashVideoCompare"
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
                _save(name, page.screenshot(clip={"x": left, "y": top, "width": width, "height": height}))
                say(name)
        browser.close()


def _save(name: str, picture: bytes) -> None:
    """Write the picture, and the help page's line for it."""
    from PIL import Image

    (DOCS / "img").mkdir(exist_ok=True)
    Image.open(io.BytesIO(picture)).convert("RGB").save(DOCS / "img" / f"{name}.jpg", quality=_QUALITY, optimize=True)
    page = DOCS / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    line = f"![{text.splitlines()[0].removeprefix('# ')}](img/{name}.jpg)\n\n"
    if line not in text:
        page.write_text(text.replace(_SECTION, line + _SECTION, 1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
