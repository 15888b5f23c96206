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
# The muted node that takes the user's clip instead of the example; it has no title of its own.
OWN_CLIP = "LoadVideo"
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


def committed(path: Path, *, own_clip: bool = False) -> Path:
    """The workflow file, or a copy of it in which more is switched on.

    That is stage II, where a user looks at the draft first, and with `own_clip` the node that loads the user's clip.
    """
    workflow = read_workflow(path)
    wanted = {COMMIT, OWN_CLIP} if own_clip else {COMMIT}
    found = wanted & set(titles(workflow))
    if not found:
        return path
    for title in found:
        workflow = switch_on(workflow, title)
    TEMPORARY.mkdir(parents=True, exist_ok=True)
    copied = TEMPORARY / path.name
    copied.write_text(json.dumps(workflow), encoding="utf-8")
    return copied
