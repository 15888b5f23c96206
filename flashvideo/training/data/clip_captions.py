"""Captions of fetched clips: from a user's file, or the prompts of the ComfyUI workflows that made them."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import TrainingError

TEMPLATE_INDEX = "index.json"  # of the workflow templates: which file each picture of a template shows
_INPUT = "input/"  # folder of that file if a workflow reads it; results are in other folders
_FEWEST_WORDS = 4  # of a prompt; shorter texts are names and choices
_WITHOUT_SPACES = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")  # letters of Chinese and Japanese
_MOST_LETTERS = 1000  # of a caption: more than the text encoder's 226 tokens
_NOT_SHOWN = ("note", "math", "sigma", "regex")  # parts of the types of nodes whose text is no prompt
_MUTED, _BYPASSED = 2, 4  # modes of nodes that don't run


def read_caption_file(path: Path) -> dict[str, str]:
    """A JSON object or a CSV table of names and texts, UTF-8; a name is a clip's file name, with or without ending.

    Raises TrainingError, with the line where there is one.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as problem:
        raise TrainingError(f"{path}: there is no such caption file.") from problem
    except UnicodeDecodeError as problem:
        raise TrainingError(f"{path} is not UTF-8 text.") from problem
    if path.suffix.lower() == ".json":
        return _read_json_captions(path, text)
    captions = {}
    for number, row in enumerate(csv.reader(io.StringIO(text)), start=1):
        if not row:
            continue
        if len(row) != 2:
            raise TrainingError(f"{path}, line {number}: there must be a name and a text; got {len(row)} columns.")
        captions[row[0].strip()] = " ".join(row[1].split())
    return captions


def _read_json_captions(path: Path, text: str) -> dict[str, str]:
    try:
        table = json.loads(text)
    except ValueError as problem:
        raise TrainingError(f"{path} is not a readable JSON file: {problem}.") from problem
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise TrainingError(f"{path} must be one JSON object of names and texts.")
    return {name: " ".join(value.split()) for name, value in table.items()}


def captions_of_workflows(files: Iterable[tuple[str, bytes]]) -> dict[str, str]:
    """Captions by name, from a package's JSON files (name within the package, content).

    A template NAME.json made NAME-1.webp, NAME-2.webp, ...: NAME stands for all of them. Where the templates' index
    says that a picture shows a workflow's input, that one's caption is empty: no one knows what it was made from.
    """
    captions: dict[str, str] = {}
    for path, content in files:
        name = PurePosixPath(path).name
        try:
            table = json.loads(content)
        except ValueError:
            continue
        if name == TEMPLATE_INDEX:
            captions |= dict.fromkeys(_inputs(table), "")
        elif isinstance(table, dict) and isinstance(table.get("nodes"), list) and (prompt := prompt_of(table)):
            captions[PurePosixPath(name).stem] = prompt
    return captions


def _inputs(index: Any) -> Iterator[str]:
    """Names of the templates' pictures that show what a workflow reads."""
    for group in index if isinstance(index, list) else ():
        for template in group.get("templates", ()):
            for number, shown in enumerate(template.get("thumbnail") or (), start=1):
                if str(shown).startswith(_INPUT):
                    yield f"{template['name']}-{number}"


def prompt_of(workflow: Mapping[str, Any]) -> str:
    """The text that a workflow (ComfyUI's own format) makes its video from; empty if there is none.

    The longest of the texts that are most clearly one: in a node that is called a prompt, then at the top level, then
    in a subgraph. Notes, negative prompts and nodes that don't run don't count.
    """
    found: list[tuple[int, int, str]] = []
    for depth, graph in enumerate((workflow, *_subgraphs(workflow))):
        negative = set(_negative_nodes(graph))
        for node in graph.get("nodes", ()):
            title = f"{node.get('title') or ''} {node.get('type')}".lower()
            if node.get("id") in negative or "negative" in title or any(word in title for word in _NOT_SHOWN):
                continue
            if node.get("mode") in (_MUTED, _BYPASSED):
                continue
            text = next(_texts(node), "")
            if text:
                rank = 2 * ("prompt" in title) + (depth == 0)
                found.append((rank, len(text), text))
    return _shortened(max(found)[2]) if found else ""


def _subgraphs(workflow: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list((workflow.get("definitions") or {}).get("subgraphs") or ())


def _texts(node: Mapping[str, Any]) -> Iterator[str]:
    """Texts of a node's widgets; of a prompt and its negative the prompt comes first."""
    values = node.get("widgets_values") or ()
    for value in values.values() if isinstance(values, Mapping) else values:
        if isinstance(value, str):
            text = " ".join(value.split())
            if len(text.split()) >= _FEWEST_WORDS or len(_WITHOUT_SPACES.findall(text)) >= 2 * _FEWEST_WORDS:
                yield text


def _negative_nodes(graph: Mapping[str, Any]) -> Iterator[Any]:
    """Ids of the nodes whose output goes to an input called "negative"."""
    origins = {}
    for link in graph.get("links") or ():
        if isinstance(link, Mapping):
            origins[link.get("id")] = link.get("origin_id")
        elif isinstance(link, list) and len(link) > 1:
            origins[link[0]] = link[1]
    for node in graph.get("nodes", ()):
        for entry in node.get("inputs") or ():
            if "negative" in str(entry.get("name")).lower() and entry.get("link") in origins:
                yield origins[entry["link"]]


def _shortened(text: str) -> str:
    """At most so many letters, up to the end of a sentence if there is one."""
    if len(text) <= _MOST_LETTERS:
        return text
    head = text[:_MOST_LETTERS]
    end = max(head.rfind(mark) for mark in (". ", "! ", "? "))
    return head[: end + 1] if end > 0 else head.rsplit(" ", 1)[0]
