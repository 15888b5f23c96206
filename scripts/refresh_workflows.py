"""Bring the shipped workflows up to date when nodes have got new optional inputs or new outputs.

    python scripts/refresh_workflows.py [--fewer-dots]

Both go last, so that a saved workflow stays valid; this writes them into the files, inputs with their defaults, as
ComfyUI's page would when somebody opens and saves them. Everything else stays as it is. Nodes grow downwards: look at
the page afterwards. --fewer-dots also takes out the reroute dots that wires don't need; it takes minutes.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import set_up
from harness.bed import Bed, say, stop_on_terminate

_ROW_HEIGHT, _SLOT_HEIGHT = 24, 20  # of a widget and of a dot on the page
_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
_OPTIONAL = 7  # the shape of an optional input's dot


def main() -> int:
    """Command line; returns the exit code."""
    set_up.enter(__file__)
    stop_on_terminate()
    # Only the bed's Python, in which this now runs, has the packages that the following modules need.
    from harness.comfy_server import ComfyServer, ServerError
    from harness.fewer_dots import without_spare_dots
    from harness.workflow_api import read_workflow
    from harness.workflow_files import shipped

    bed = Bed.load()
    if bed is None:
        say("The private ComfyUI in .bed/ is not complete: run scripts/set_up.py.")
        return 1
    try:
        with ComfyServer(bed, bed.base) as server, server.client() as client:
            object_info = client.object_info()
    except ServerError as error:
        say(f"Stopped. {error}")
        return 1
    for path in shipped():
        workflow = read_workflow(path)
        before, added = workflow, refresh(workflow, object_info)
        if "--fewer-dots" in sys.argv[1:]:
            workflow = without_spare_dots(workflow)
        if added or workflow != before:
            path.write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            say(f"{path.stem}: {', '.join(added) or 'fewer dots'}")
    return 0


def refresh(workflow: dict[str, Any], object_info: dict[str, Any]) -> list[str]:
    """Add the optional inputs and the outputs that a UI-format workflow's nodes lack, in place; returns their names."""
    added = []
    for node in workflow["nodes"]:
        info, rows = object_info.get(node["type"], {}), _slot_rows(node)
        optional = info.get("input", {}).get("optional", {})
        known = {port["name"] for port in node["inputs"]}
        for name, spec in optional.items():
            if name in known:
                continue
            kind, options = ("COMBO", spec[1]) if isinstance(spec[0], list) else (spec[0], spec[1])
            port = {"name": name, "shape": _OPTIONAL, "type": kind, "link": None}
            if kind in _WIDGETS:
                port["widget"] = {"name": name}
                node["widgets_values"].append(options["default"])
                node["size"][1] += _ROW_HEIGHT
            node["inputs"].append(port)
            added.append(f"{node['type']}.{name}")
        outputs = list(zip(info.get("output_name", []), info.get("output", []), strict=True))
        for name, kind in outputs[len(node["outputs"]) :]:
            node["outputs"].append({"name": name, "type": kind, "links": None})
            added.append(f"{node['type']}.{name} (output)")
        node["size"][1] += _SLOT_HEIGHT * (_slot_rows(node) - rows)
    return added


def _slot_rows(node: dict[str, Any]) -> int:
    """Rows of dots above a node's widgets."""
    return max(sum("widget" not in port for port in node["inputs"]), len(node["outputs"]))


if __name__ == "__main__":
    sys.exit(main())
