"""Where ComfyUI's page draws the nodes and wires of a UI-format workflow, computed from the file alone.

Units are those of the page at full size. A wire is a chain of cubic curves from an output over its reroutes to an
input, as the page's front end draws it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TITLE_HEIGHT = 30
EM_SPACE = "\u2003"  # as wide as its type is high
_GROUP_PADDING, _DIGIT_WIDTH, _CAPITAL_TOP = 4, 0.6, 0.27  # of a group's title: units, then shares of its type
_SLOT_HEIGHT, _WIDGET_HEIGHT = 20, 24
_SLOT_INSET = 10  # of a slot's dot from the node's edge
_FIRST_SLOT = 0.7  # its middle, in slot heights
_STRAIGHT = 0.25  # of a curve's length, before it bends
_LONGEST_STRAIGHT = 80  # beside a reroute
_FIT, _FIT_PADDING = 0.75, 10  # "Fit view" fills so much of the page, with so much around the graph
_SAMPLES = 16  # of each curve

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom
Node = dict[str, Any]


@dataclass(frozen=True)
class Wire:
    """A link as it is drawn: `points` lie on the curve, about evenly."""

    link: int
    source: int
    output: int
    target: int
    points: tuple[Point, ...]


def box(node: Node) -> Box:
    """A node with its title."""
    (left, top), (width, height) = node["pos"], node["size"]
    return left, top - TITLE_HEIGHT, left + width, top + height


def group_box(group: dict[str, Any]) -> Box:
    """A group's frame."""
    left, top, width, height = group["bounding"]
    return left, top, left + width, top + height


def group_number_box(group: dict[str, Any]) -> Box:
    """The number that a group's title begins with, behind an EM_SPACE where a wire turns at the group's corner."""
    (left, top, _, _), size = group["bounding"], group["font_size"]
    start = left + _GROUP_PADDING + size * group["title"].count(EM_SPACE)
    return start, top + size * _CAPITAL_TOP, start + size * _DIGIT_WIDTH, top + size


def whole(workflow: dict[str, Any]) -> Box:
    """What "Fit view" fits: nodes, groups and reroutes."""
    boxes = [*map(box, workflow["nodes"]), *map(group_box, workflow["groups"])]
    boxes += [(*reroute["pos"], *reroute["pos"]) for reroute in workflow["extra"].get("reroutes", [])]
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def fitted_scale(workflow: dict[str, Any], page: tuple[int, int]) -> float:
    """The scale that "Fit view" chooses on a page of this width and height in pixels."""
    left, top, right, bottom = whole(workflow)
    width, height = right - left + 2 * _FIT_PADDING, bottom - top + 2 * _FIT_PADDING
    return min(_FIT * page[0] / width, _FIT * page[1] / height)


def output_at(node: Node, slot: int) -> Point:
    """The middle of an output's dot."""
    (left, top), (width, _) = node["pos"], node["size"]
    return left + width - _SLOT_INSET, top + _SLOT_HEIGHT * (slot + _FIRST_SLOT)


def input_at(node: Node, slot: int) -> Point:
    """The middle of an input's dot; for an input that is also a widget, roughly."""
    ports = node["inputs"]
    widgets = [port for port in ports if "widget" in port]
    plain = [port for port in ports if "widget" not in port]
    left, top = node["pos"][0] + _SLOT_INSET, node["pos"][1]
    if "widget" not in ports[slot]:
        return left, top + _SLOT_HEIGHT * (plain.index(ports[slot]) + _FIRST_SLOT)
    rows = max(len(plain), len(node["outputs"]))
    return left, top + _SLOT_HEIGHT * rows + _WIDGET_HEIGHT * widgets.index(ports[slot]) + _SLOT_HEIGHT


def wires(workflow: dict[str, Any]) -> list[Wire]:
    """All links of a workflow as they are drawn."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    extra = workflow["extra"]
    reroutes = {each["id"]: each for each in extra.get("reroutes", [])}
    last = {each["id"]: each["parentId"] for each in extra.get("linkExtensions", [])}
    stops, ends = {}, {}
    for link, source, output, target, entry, _ in workflow["links"]:
        chain, number = [], last.get(link)
        while number is not None:
            chain.insert(0, number)
            number = reroutes[number].get("parentId")
        stops[link] = chain
        ends[link] = (output_at(nodes[source], output), input_at(nodes[target], entry))
    after: dict[int, list[Point]] = {number: [] for number in reroutes}
    for link, chain in stops.items():
        for number, following in zip(chain, [*chain[1:], None], strict=False):
            after[number].append(ends[link][1] if following is None else tuple(reroutes[following]["pos"]))
    drawn = []
    for link, source, output, target, _, _ in workflow["links"]:
        places = [tuple(reroutes[number]["pos"]) for number in stops[link]]
        turns = [after[number] for number in stops[link]]
        drawn.append(Wire(link, source, output, target, chain_of_curves(*ends[link], places, turns)))
    return drawn


def chain_of_curves(
    start: Point, end: Point, places: Sequence[Point], after: Sequence[list[Point]]
) -> tuple[Point, ...]:
    """Points on the curves from start to end over reroutes; `after` has what follows each of them, on any wire."""
    stops = [start, *places, end]
    headings = [0.0]
    for before, here, following in zip(stops, places, after, strict=False):
        headings.append(_heading(before, here, following))
    headings.append(0.0)
    points = [start]
    for i, (here, there) in enumerate(zip(stops, stops[1:], strict=False)):
        straight = math.dist(here, there) * _STRAIGHT
        lead = straight if i == 0 else min(_LONGEST_STRAIGHT, straight)
        trail = straight if i == len(stops) - 2 else min(_LONGEST_STRAIGHT, straight)
        controls = (
            here,
            (here[0] + lead * math.cos(headings[i]), here[1] + lead * math.sin(headings[i])),
            (there[0] - trail * math.cos(headings[i + 1]), there[1] - trail * math.sin(headings[i + 1])),
            there,
        )
        points += [_on_curve(controls, k / _SAMPLES) for k in range(1, _SAMPLES + 1)]
    return tuple(points)


def _heading(before: Point, here: Point, following: list[Point]) -> float:
    """The direction in which wires pass a reroute, in radians: halfway between how they come and how they go on."""
    going = sum(math.atan2(y - here[1], x - here[0]) for x, y in following) / len(following)
    coming = math.atan2(here[1] - before[1], here[0] - before[0])
    half = (coming - going) / 2
    return coming - (half + math.pi if abs(half) > math.pi / 2 else half)


def _on_curve(controls: tuple[Point, Point, Point, Point], t: float) -> Point:
    shares = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
    x, y = (sum(share * point[axis] for share, point in zip(shares, controls, strict=True)) for axis in (0, 1))
    return x, y


def resampled(points: Sequence[Point], step: float = 4) -> np.ndarray:
    """Points along a chain, at most `step` apart: [N, 2]."""
    corners = np.asarray(points, float)
    lengths = np.hypot(*np.diff(corners, axis=0).T)
    along = np.concatenate([[0.0], np.cumsum(lengths)])
    steps = np.linspace(0, along[-1], max(2, math.ceil(along[-1] / step) + 1))
    return np.stack([np.interp(steps, along, corners[:, axis]) for axis in (0, 1)], axis=1)


def nodes_crossed(wire: Wire, nodes: Sequence[Node], edge: float = 1) -> list[int]:
    """Ids of the nodes behind which a wire disappears; at its own two only the way to the dot is allowed."""
    x, y = resampled(wire.points).T
    crossed = []
    for node in nodes:
        left, top, right, bottom = box(node)
        inside = (left + edge < x) & (x < right - edge) & (top + edge < y) & (y < bottom - edge)
        if node["id"] == wire.source:
            inside &= x < right - _SLOT_INSET - edge
        if node["id"] == wire.target:
            inside &= x > left + _SLOT_INSET + edge
        if inside.any():
            crossed.append(node["id"])
    return crossed


def shared_length(first: Wire, second: Wire, *, step: float = 4, near: float = 5) -> float:
    """The longest stretch on which two wires lie on one line, in units; 0 where they come from one output."""
    if (first.source, first.output) == (second.source, second.output):
        return 0.0
    here, there = resampled(first.points, step), resampled(second.points, step)
    low, high = there.min(axis=0) - near, there.max(axis=0) + near
    maybe = ((low < here) & (here < high)).all(axis=1)
    close = np.zeros(len(here), bool)
    close[maybe] = (np.abs(here[maybe, None] - there[None]).max(axis=2) < near).any(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], close.astype(int), [0]])))
    return float(max(edges[1::2] - edges[::2], default=0) * step)
