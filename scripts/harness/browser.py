"""A Chromium without a window on ComfyUI's page, for the tests and for the pictures of the help pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .install import chromium

PATIENCE = 600_000  # milliseconds in which the page does nothing that is waited for; not of a run as a whole
READY = """() => window.app?.extensionManager && window.app.graph
    && Object.keys(window.LiteGraph.registered_node_types).some(name => name.startsWith('FlashVideo'))"""
_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # nothing outside this machine
]
# Texts stay readable when a whole graph is on the screen, and no banner or tour covers it.
_SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
    "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0.01,
}


def launch(playwright: Any) -> Any | None:
    """Start the browser that is there, or Playwright's own; None if there is neither."""
    program = chromium() or playwright.chromium.executable_path
    if not Path(program).exists():
        return None
    return playwright.chromium.launch(executable_path=program, args=_OPTIONS, timeout=PATIENCE)


def write_settings(base: Path) -> None:
    """Give the user of a ComfyUI folder the page's settings; before the server starts."""
    path = base / "user" / "default" / "comfy.settings.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(_SETTINGS), encoding="utf-8")
