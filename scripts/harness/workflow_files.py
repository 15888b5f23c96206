"""The shipped workflow files: where they are, and which of their nodes are switched on."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from .bed import ROOT, TEMPORARY
from .workflow_api import WorkflowError, read_workflow

WORKFLOWS = ROOT / "workflows"
# The muted node that starts stage II, in the graph where a user looks at the draft first.
COMMIT = "Commit: save the refined video"
ALWAYS, MUTED, BYPASSED = 0, 2, 4  # a node's `mode` in ComfyUI's page


def shipped() -> list[Path]:
    """The workflow files, in the order of their names."""
    return sorted(WORKFLOWS.glob("*.json"))


def titles(workflow: dict[str, Any]) -> list[str]:
    """What each node of a UI-format workflow is called on the page, as far as its file tells."""
    return [node.get("title") or node["type"] for node in workflow["nodes"]]


def switch_on(workflow: dict[str, Any], title: str) -> dict[str, Any]:
    """A copy of a UI-format workflow in which the nodes of this title are neither muted nor bypassed."""
    changed = copy.deepcopy(workflow)
    nodes = [node for node, name in zip(changed["nodes"], titles(changed), strict=True) if name == title]
    if not nodes:
        raise WorkflowError(f"No node is called {title}.")
    for node in nodes:
        node["mode"] = ALWAYS
    return changed


def committed(path: Path) -> Path:
    """The workflow file, or, where a user looks at the draft first, a copy of it that goes on at once."""
    workflow = read_workflow(path)
    if COMMIT not in titles(workflow):
        return path
    TEMPORARY.mkdir(parents=True, exist_ok=True)
    copied = TEMPORARY / path.name
    copied.write_text(json.dumps(switch_on(workflow, COMMIT)), encoding="utf-8")
    return copied
