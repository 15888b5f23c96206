"""A real Chromium on the real page of a real ComfyUI with the pack in it.

Chromium is the one that FLASHVIDEO_CHROMIUM names, one on the path, or Playwright's own. Without one, or without the
Python package `playwright`, these tests are skipped and say so. Screenshots go to .bed/screenshots, to be looked at.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from harness.bed import BED, PACK_NAME, Bed, inside, stop_on_terminate

if not inside():
    pytest.exit("These tests start ComfyUI from .bed/: use `make test`.", 2)
from harness.browser import PATIENCE, READY, launch, write_settings
from harness.comfy_server import ComfyServer

stop_on_terminate()

SCREENSHOTS = BED / "screenshots"
VIEW = {"width": 2400, "height": 1300}
POLL = 250  # milliseconds between looks at a run; as it is, Playwright looks at each frame, and all are drawn for it
# ComfyUI's own page, without any pack: files that a fresh folder lacks, and addresses that it may not call.
NOT_OURS = (
    "user.css",
    "/templates/",
    "api.comfy.org",
    "/docs/",
    "reading 'id'",
    "Content Security Policy",
    "huggingface.co",  # sizes of the models that a workflow names
    "Error fetching file size",
    "core workflow templates",  # the bed has none but ours
)

_LISTEN = """() => {
    window.ended = [];
    window.news = 0;  // of the server about a run
    for (const kind of ['status', 'execution_start', 'execution_cached', 'executing', 'executed', 'progress',
                        'progress_state', 'b_preview', 'b_preview_with_metadata'])
        window.app.api.addEventListener(kind, () => { window.news += 1 });
    for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
        window.app.api.addEventListener(kind, event => window.ended.push([kind, event.detail]));
}"""
_ENDED_OR_NEWS = "([ended, news]) => window.ended.length > ended || window.news > news"
_UNKNOWN = """() => window.app.graph.nodes
    .filter(node => !window.LiteGraph.registered_node_types[node.type] || node.has_errors).map(node => node.type)"""
_MARK = "() => window.app.graph.nodes.forEach(node => { node.seenBefore = true })"
_NEW = "count => window.app.graph.nodes.length === count && window.app.graph.nodes.every(node => !node.seenBefore)"
_SET = """values => {
    for (const node of window.app.graph.nodes)
        for (const [name, value] of Object.entries(values[node.type] ?? {})) {
            const widget = node.widgets.find(widget => widget.name === name);
            widget.value = value;
            widget.callback?.(value);
        }
}"""
_VIDEO = """prefix => [...document.querySelectorAll('video')].some(video => video.videoWidth > 0
    && new URL(video.currentSrc).searchParams.get('filename')?.startsWith(prefix))"""
_CARD_PICTURE = """name => {
    const card = document.querySelector(`[data-testid="template-workflow-${name}"]`);
    return [...card?.querySelectorAll('img') ?? []].some(picture => picture.naturalWidth > 0);
}"""
_PICTURE = """prefix => window.app.graph.nodes.flatMap(node => node.imgs ?? []).some(picture => picture.naturalWidth > 0
    && new URL(picture.src).searchParams.get('filename')?.startsWith(prefix))"""


class ComfyPage:
    """ComfyUI's page in the browser, as a user uses it.

    `problems` collects what its console complains about, `loaded` the names of files that the server gave it.
    """

    def __init__(self, page: Any, address: str) -> None:
        self.page = page
        self.problems: list[str] = []  # what the console reports as an error, and any warning of the pack's own scripts
        self.loaded: set[str] = set()
        page.set_default_timeout(PATIENCE)
        page.on("console", self._note)
        page.on("pageerror", lambda error: self._remember(str(error)))
        page.on("response", self._loaded)
        page.goto(address, wait_until="domcontentloaded")
        page.wait_for_function(READY)
        page.evaluate(_LISTEN)

    def open_templates(self) -> Any:
        """Open the template browser at this pack; returns the cards."""
        self.page.evaluate("() => { window.app.extensionManager.command.execute('Comfy.BrowseTemplates') }")
        self.page.get_by_text(PACK_NAME, exact=True).first.click()
        cards = self.page.locator("[data-testid^='template-workflow-FlashVideo']")
        cards.first.wait_for()
        return cards

    def wait_for_card_picture(self, name: str) -> None:
        """Wait until a template's card shows its picture."""
        self.page.wait_for_function(_CARD_PICTURE, arg=name)

    def open_template(self, name: str, nodes: int) -> None:
        """Open a workflow by a click on its card, and wait until its nodes are on the page."""
        self.open_templates()
        self.page.evaluate(_MARK)
        self.page.get_by_test_id(f"template-workflow-{name}").click()
        self.page.wait_for_function(_NEW, arg=nodes)
        self.page.wait_for_timeout(500)  # a dialog about missing nodes or models comes after the graph

    def dialog(self) -> str:
        """The text of the dialog that is open, and close it; empty without one."""
        dialogs = self.page.locator(".p-dialog:visible")
        if dialogs.count() == 0:
            return ""
        text = dialogs.first.inner_text()
        dialogs.first.press("Escape")
        dialogs.first.wait_for(state="hidden")
        return text

    def unknown_nodes(self) -> list[str]:
        """Nodes that the page doesn't know or paints red."""
        return self.page.evaluate(_UNKNOWN)

    def saved(self) -> dict[str, Any]:
        """The graph as the page would save it now."""
        return self.page.evaluate("() => window.app.graph.serialize()")

    def set_widgets(self, values: dict[str, dict[str, Any]]) -> None:
        """Set widgets of every node of a type: {type: {widget: value}}."""
        self.page.evaluate(_SET, values)

    def press_on(self, title: str, keys: str) -> None:
        """Select the node of this title and press keys."""
        self.page.evaluate(
            "title => window.app.canvas.selectNode(window.app.graph.nodes.find(node => node.title === title))", title
        )
        self.page.locator("#graph-canvas").focus()
        self.page.keyboard.press(keys)

    def run(self) -> tuple[str, dict[str, Any]]:
        """Press Run and wait for the end; returns its kind, such as execution_success, and the details.

        However long it takes: only PATIENCE without any news is too long.
        """
        before = self.page.evaluate("() => window.ended.length")
        self.page.locator("[data-testid='queue-button'] button, button[data-testid='queue-button']").first.click()
        while self.page.evaluate("() => window.ended.length") == before:
            news = self.page.evaluate("() => window.news")
            self.page.wait_for_function(_ENDED_OR_NEWS, arg=[before, news], polling=POLL)
        return self.page.evaluate("count => window.ended[count]", before)

    def shows_video(self, prefix: str) -> bool:
        """Whether a player shows a video whose file name begins so."""
        return self.page.evaluate(_VIDEO, prefix)

    def wait_for_video(self, prefix: str) -> None:
        """Wait until a player shows a video whose file name begins so."""
        self.page.wait_for_function(_VIDEO, arg=prefix)

    def wait_for_picture(self, prefix: str) -> None:
        """Wait until a node shows a picture whose file name begins so."""
        self.page.wait_for_function(_PICTURE, arg=prefix)

    def photograph(self, name: str, *, whole_graph: bool = True) -> Path:
        """Take a screenshot for people to look at."""
        if whole_graph:
            self.page.evaluate("() => window.app.canvas.deselectAll()")  # else only what is selected is fitted
            self.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
            self.page.wait_for_timeout(700)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        self.page.screenshot(path=str(path))
        return path

    def _loaded(self, response: Any) -> None:
        if response.ok:
            self.loaded.add(unquote(urlparse(response.url).path).rpartition("/")[2])

    def _note(self, message: Any) -> None:
        place = message.location.get("url", "")
        if message.type == "error" or (message.type == "warning" and f"/extensions/{PACK_NAME}/" in place):
            self._remember(f"{message.text} ({place})")

    def _remember(self, text: str) -> None:
        if not any(words in text for words in NOT_OURS):
            self.problems.append(text)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    with playwright.sync_playwright() as running:
        started = launch(running)
        if started is None:
            pytest.skip("no Chromium is on the path; FLASHVIDEO_CHROMIUM may name one")
        yield started
        started.close()


@pytest.fixture(scope="session")
def server(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """ComfyUI on the CPU, with the pack, in folders of its own. Asks for the browser first: without it, none starts."""
    bed = Bed.load()
    assert bed is not None, "The set-up is not complete."
    base = tmp_path_factory.mktemp("page")
    write_settings(base)
    with ComfyServer(bed, base, device_options=["--cpu"]) as running:
        yield running


@pytest.fixture(scope="session")
def comfy_page(browser: Any, server: ComfyServer) -> Iterator[ComfyPage]:
    """The page, opened once."""
    context = browser.new_context(viewport=VIEW)
    yield ComfyPage(context.new_page(), server.address)
    context.close()
