"""Takes out the reroute dots of a UI-format workflow that its wires don't need."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from .graph_layout import Wire, nodes_crossed, resampled, shared_length, wires

_EDGE = 1  # units of a node's border that a wire may touch
ONE_LINE = 56  # units side by side: less is a crossing, or how wires leave and reach neighbouring dots
_NEAR = 32  # units that a wire may move


def without_spare_dots(workflow: dict[str, Any]) -> dict[str, Any]:
    """A copy of a workflow without the dots that change little.

    Each wire stays within 32 units of where it was, and neither runs behind a node nor lies on another wire.
    """
    workflow = copy.deepcopy(workflow)
    drawn = {wire.link: wire for wire in wires(workflow)}
    first, kept = drawn, set()
    while dots := [dot["id"] for dot in workflow["extra"].get("reroutes", []) if dot["id"] not in kept]:
        fewer = _without(workflow, dots[0])
        redrawn = {wire.link: wire for wire in wires(fewer)}
        moved = [link for link, wire in redrawn.items() if wire.points != drawn[link].points]
        if _is_tidy(moved, redrawn, first, workflow["nodes"]):
            workflow, drawn = fewer, redrawn
        else:
            kept.add(dots[0])
    return workflow


def _without(workflow: dict[str, Any], number: int) -> dict[str, Any]:
    """A copy in which what came after a dot comes after the one before it."""
    extra = workflow["extra"]
    (gone,) = [dot for dot in extra["reroutes"] if dot["id"] == number]
    parent = gone.get("parentId")
    dots = [dict(dot) for dot in extra["reroutes"] if dot["id"] != number]
    ends = [dict(end) for end in extra["linkExtensions"]]
    for each in (*dots, *ends):
        if each.get("parentId") == number:
            each["parentId"] = parent
            if parent is None:
                del each["parentId"]
    ends = [end for end in ends if "parentId" in end]
    return {**workflow, "extra": {**extra, "reroutes": dots, "linkExtensions": ends}}


def _is_tidy(
    moved: Sequence[int], drawn: dict[int, Wire], first: dict[int, Wire], nodes: Sequence[dict[str, Any]]
) -> bool:
    """Whether the links in `moved` are still near where they were, in sight, and apart from all others."""
    return (
        all(_distance(drawn[link], first[link]) <= _NEAR for link in moved)
        and not any(nodes_crossed(drawn[link], nodes, edge=_EDGE) for link in moved)
        and all(
            max(shared_length(drawn[link], other), shared_length(other, drawn[link])) <= ONE_LINE
            for link in moved
            for other in drawn.values()
        )
    )


def _distance(wire: Wire, before: Wire) -> float:
    """How far a wire's farthest point is from where the wire was."""
    here, there = resampled(wire.points, 8), resampled(before.points, 8)
    return float(np.hypot(*(here[:, None] - there[None]).transpose(2, 0, 1)).min(axis=1).max())
