"""From the graph that ComfyUI's page saves (UI format) to what its server runs (API format): the one place for it.

The conversion itself is comfy-cli's, run as a program of its own. It follows ComfyUI's page: subgraphs, muted and
bypassed nodes, reroutes, primitives, widget order with the hidden "control after generate" values. Of ComfyUI's own
nodes it leaves out only LoadImageOutput, the picker of pictures from the output folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .bed import CONVERTER, clean_environment

_CONVERT = """
import json, logging, sys
sys.path.insert(0, sys.argv[1])
from comfy_cli.workflow_to_api import WorkflowConversionError, convert_ui_to_api

class Strict(logging.Handler):  # the converter logs a node that it can't convert, and goes on without it
    def emit(self, record):
        sys.exit(record.getMessage())

logging.getLogger("comfy_cli").addHandler(Strict(logging.ERROR))
task = json.load(sys.stdin)
try:
    json.dump(convert_ui_to_api(task["workflow"], task["object_info"]), sys.stdout)
except WorkflowConversionError as error:
    sys.exit(str(error))
"""


class WorkflowError(RuntimeError):
    """A workflow can't be run as it is; the message gives the reason in the user's words."""


def read_workflow(path: Path) -> dict[str, Any]:
    """A workflow file's content. Raises WorkflowError if it is missing or is no workflow."""
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WorkflowError(f"{path} can't be read: {error.strerror}.") from None
    except ValueError as error:
        raise WorkflowError(f"{path} is not a workflow file (no valid JSON: {error}).") from None
    if not isinstance(workflow, dict) or not workflow:
        raise WorkflowError(f"{path} is not a workflow file.")
    return workflow


def to_api(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """Convert a UI-format workflow (one in API format passes through).

    Args:
        workflow: what ComfyUI's page saves.
        object_info: the server's `/object_info`.

    Raises:
        WorkflowError: it is no workflow, or uses nodes that this ComfyUI doesn't have.
    """
    result = subprocess.run(
        [sys.executable, "-c", _CONVERT, str(CONVERTER)],
        input=json.dumps({"workflow": workflow, "object_info": object_info}),
        env=clean_environment(), capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise WorkflowError(f"The workflow can't be converted: {reason}")
    prompt = json.loads(result.stdout)
    missing = sorted({node["class_type"] for node in prompt.values()} - object_info.keys())
    if missing:
        raise WorkflowError(f"This ComfyUI has no node of these types: {', '.join(missing)}.")
    if not prompt:
        raise WorkflowError("The workflow has nothing to run.")
    return prompt


def set_inputs(prompt: dict[str, Any], settings: Iterable[str]) -> None:
    """Apply settings like `6.text=a fox` or `Prompt.text=a fox` (node id or title) to an API-format workflow.

    Values are read as JSON where the input holds no text (numbers, true, false). Raises WorkflowError.
    """
    for setting in settings:
        target, equals, value = setting.partition("=")
        name, dot, input_name = target.rpartition(".")
        if not (equals and dot):
            raise WorkflowError(f"--set {setting}: write NODE.INPUT=VALUE, for example 6.text=a fox in snow.")
        inputs = prompt[find_node(prompt, name)]["inputs"]
        if input_name not in inputs:
            raise WorkflowError(f"--set {setting}: node {name} has the inputs {', '.join(inputs)}.")
        inputs[input_name] = _value(value, inputs[input_name])


def find_node(prompt: dict[str, Any], name: str) -> str:
    """Id of the node with this id or, if only one has it, this title. Raises WorkflowError."""
    if name in prompt:
        return name
    titles = {node_id: (node.get("_meta") or {}).get("title", "") for node_id, node in prompt.items()}
    found = [node_id for node_id, title in titles.items() if title.lower() == name.lower()]
    if len(found) == 1:
        return found[0]
    listing = ", ".join(f"{node_id} ({title})" for node_id, title in titles.items())
    raise WorkflowError(f"{len(found) or 'No'} nodes are called {name}. The workflow's nodes: {listing}.")


def _value(text: str, current: object) -> object:
    if isinstance(current, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text
