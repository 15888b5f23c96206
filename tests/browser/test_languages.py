"""The pack's nodes in the user's language, on the page and in its search."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.browser import PATIENCE, READY
from harness.comfy_server import ComfyServer

LOCALES = Path(__file__).resolve().parents[2] / "locales"
NODE = "FlashVideoPrepareFrames"
_SET_LANGUAGE = "locale => window.app.extensionManager.setting.set('Comfy.Locale', locale)"
_SHOWN = """name => {
    const node = window.LiteGraph.createNode(name);
    window.app.graph.add(node);
    return [node.title, node.widgets[0].label ?? node.widgets[0].name];
}"""


@pytest.fixture
def page(browser: Any, server: ComfyServer) -> Iterator[Any]:
    """A page of its own, in English again afterwards."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(server.address, wait_until="domcontentloaded")
    page.wait_for_function(READY)
    yield page
    page.evaluate(_SET_LANGUAGE, "en")
    context.close()


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_nodes_have_their_names_in_the_user_s_language(page: Any, language: str) -> None:
    expected = json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))[NODE]
    page.evaluate(_SET_LANGUAGE, language)
    page.reload(wait_until="domcontentloaded")
    page.wait_for_function(READY)
    title, widget = page.evaluate(_SHOWN, NODE)
    assert title == expected["display_name"]
    assert widget == expected["inputs"]["size"]["name"]
