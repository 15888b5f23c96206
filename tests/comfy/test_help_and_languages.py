"""Every node explains itself: a help page, and its names, tooltips and options in every language of the pack.

The schema in the code is the only source of names, order, ranges and defaults. What is written elsewhere is held
against it here, so that it cannot fall behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "web" / "docs"
TRANSLATIONS = ("zh", "ja")
SCRIPTS = {"zh": re.compile(r"[\u4e00-\u9fff]"), "ja": re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")}
KANA = re.compile(r"[\u3041-\u3096\u30a1-\u30fa]")
FIVE_WORDS = re.compile(r"(?:\b[A-Za-z][A-Za-z'-]*[ ,.;:]+){4}[A-Za-z]+")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
# Names of formats and of methods, the same in every language.
UNTRANSLATED_OPTIONS = {"fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2", "euler", "heun", "dpmpp_2m", "res_multistep"}
JARGON = re.compile(r"\b(tensors?|dtypes?|embeddings?|logits|broadcast\w*|float(16|32)|bf16)\b", re.I)
MEANT_BY_THE_FRONTEND = re.compile(r"[{}@|]")  # its translation library reads these as placeholders, links and plurals

Texts = dict[str, Any]


@pytest.fixture(scope="module")
def schemas(our_nodes: dict[str, Any]) -> dict[str, Any]:
    """The pack's schemas by node id."""
    return {name: node.define_schema() for name, node in our_nodes.items()}


@pytest.fixture(scope="module")
def served(comfy_nodes: dict[str, Any]) -> dict[str, Texts]:
    """Each language's node texts, as ComfyUI gives them to its page at /i18n."""
    from app.custom_node_manager import CustomNodeManager

    manager = CustomNodeManager()
    return {language: texts["nodeDefs"] for language, texts in manager.build_translations().items()}


def options_of(port: Any) -> list[str]:
    """A combo's own options; of a loader's only the built-in models, not the files that happen to be there."""
    options = getattr(port, "options", None) or []
    return [option for option in options if not port.id.endswith("_name") or option.endswith("(built-in)")]


def texts_of(schema: Any) -> Texts:
    """A node's texts in the frontend's form, from the schema. The frontend writes "_" for "." in a key."""
    inputs: Texts = {}
    for port in schema.inputs:
        inputs[port.id] = {"name": port.display_name or port.id, "tooltip": port.tooltip}
        if options_of(port):
            inputs[port.id]["options"] = {option.replace(".", "_"): option for option in options_of(port)}
    outputs = {
        str(index): {"name": port.display_name or port.id, "tooltip": port.tooltip}
        for index, port in enumerate(schema.outputs)
    }
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": inputs,
        "outputs": outputs,
    }


def flat(texts: Texts, path: str = "") -> Iterator[tuple[str, str]]:
    """Each text of a tree with its path, such as FlashVideoCompare.inputs.layout.tooltip."""
    for key, value in texts.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from flat(value, here)
        else:
            yield here, value


def heading_of(port: Any) -> str:
    """How a help page has to begin the paragraph of an input."""
    default = getattr(port, "default", None)
    if default is None:
        return f"- **{port.id}**:"
    if isinstance(default, bool):
        facts = "on" if default else "off"
    elif isinstance(default, str):
        facts = f"`{default}`" if default else "empty"
    else:
        facts = f"{default:.10g}"
        if not getattr(port, "control_after_generate", None):
            facts += f", from {port.min:.10g} to {port.max:.10g}"
        if isinstance(default, int) and (port.step or 1) > 1:
            facts += f", in steps of {port.step}"
    return f"- **{port.id}** (default {facts}):"


def chapter(page: str, title: str) -> str:
    """What stands under a second-level heading."""
    match = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    return match.group(1) if match else ""


def paragraphs(text: str) -> dict[str, str]:
    """The top-level list entries of a chapter by the name at their beginning."""
    entries = re.split(r"^(?=- \*\*)", text, flags=re.M)[1:]
    return {re.match(r"- \*\*(.+?)\*\*", entry).group(1): entry for entry in entries}


def test_exactly_the_nodes_of_the_pack_have_help_pages(schemas: dict[str, Any]) -> None:
    assert sorted(page.stem for page in DOCS.glob("*.md")) == sorted(schemas)


def test_comfyui_serves_the_help_pages(comfy_nodes: dict[str, Any], pack: ModuleType) -> None:
    import nodes

    assert DOCS.parent in [Path(folder).resolve() for folder in nodes.EXTENSION_WEB_DIRS.values()]


def test_help_pages_say_every_input_with_its_default_and_range(schemas: dict[str, Any]) -> None:
    for name, schema in schemas.items():
        page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {schema.display_name}\n"), name
        explained = paragraphs(chapter(page, "Inputs"))
        assert list(explained) == [port.id for port in schema.inputs], name
        for port in schema.inputs:
            entry = explained[port.id]
            assert entry.startswith(heading_of(port)), f"{name}: expected {heading_of(port)}; found {entry}"
            missing = [option for option in options_of(port) if f"`{option}`" not in entry]
            assert not missing, f"{name}.{port.id} does not explain {missing}"
        assert list(paragraphs(chapter(page, "Outputs"))) == [port.display_name for port in schema.outputs], name


def test_help_pages_are_short_and_complete_and_speak_to_users(schemas: dict[str, Any]) -> None:
    display_names = {schema.display_name for schema in schemas.values()}
    for name in schemas:
        page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
        assert len(page.split()) <= 500, f"{name} is longer than two screens"
        for title in ("When to use it", "Example"):
            assert chapter(page, title).strip(), f"{name} lacks {title}"
        assert not JARGON.search(page), f"{name}: {JARGON.search(page).group()}"
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page):
            assert (DOCS / picture).is_file(), f"{name}: {picture}"
        emphasised = [" ".join(words.split()) for words in re.findall(r"\*([^*]+)\*", page.replace("**", ""))]
        named = {words for words in emphasised if "FlashVideo " in words and not words.startswith('"')}
        assert named <= display_names, f"{name} names {named - display_names}"


def test_english_equals_the_schema(schemas: dict[str, Any], served: dict[str, Texts]) -> None:
    expected = dict(flat({name: texts_of(schema) for name, schema in schemas.items()}))
    found = dict(flat({name: served["en"].get(name, {}) for name in schemas}))
    wrong = {path: text for path, text in expected.items() if found.get(path) != text}
    assert not wrong, f"put these into locales/en/nodeDefs.json, and their meaning into the other languages: {wrong}"


@pytest.mark.parametrize("language", ["en", *TRANSLATIONS])
def test_every_text_is_there_and_nothing_else(schemas: dict[str, Any], served: dict[str, Texts], language: str) -> None:
    expected = {path for path, _ in flat({name: texts_of(schema) for name, schema in schemas.items()})}
    found = dict(flat(served[language]))
    assert sorted(expected - set(found)) == [], "missing"
    assert sorted(set(found) - expected) == [], "no such node, input or output"
    for path, text in found.items():
        assert isinstance(text, str) and text == text.strip() and text, path
        assert not MEANT_BY_THE_FRONTEND.search(text), path


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_translations_are_in_their_language(schemas: dict[str, Any], served: dict[str, Texts], language: str) -> None:
    for path, text in flat({name: served[language][name] for name in schemas}):
        if text in UNTRANSLATED_OPTIONS and ".options." in path:
            continue
        assert SCRIPTS[language].search(text), f"{path}: {text}"
        assert not FIVE_WORDS.search(text), f"{path}: {FIVE_WORDS.search(text).group()}"
        assert language == "ja" or not KANA.search(text), f"{path}: {text}"


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_translations_keep_every_number(schemas: dict[str, Any], served: dict[str, Texts], language: str) -> None:
    found = dict(flat(served[language]))
    for path, text in flat({name: texts_of(schema) for name, schema in schemas.items()}):
        lost = set(NUMBER.findall(text)) - set(NUMBER.findall(found[path]))
        assert not lost, f"{path} lost {sorted(lost)}: {found[path]}"


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_translations_name_nodes_as_the_page_shows_them(
    schemas: dict[str, Any], served: dict[str, Texts], language: str
) -> None:
    opening, closing = {"zh": "“”", "ja": "「」"}[language]
    shown = {served[language][name]["display_name"] for name in schemas}
    for path, text in flat(served[language]):
        quoted = re.findall(f"{opening}([^{closing}]*FlashVideo[^{closing}]*){closing}", text)
        assert set(quoted) <= shown, f"{path}: {set(quoted) - shown}"
