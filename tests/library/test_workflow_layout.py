"""How the shipped workflows look on ComfyUI's page, computed from their files: readable, tidy, nothing hidden."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from harness.fewer_dots import ONE_LINE, without_spare_dots
from harness.graph_layout import (
    box,
    fitted_scale,
    group_box,
    group_number_box,
    nodes_crossed,
    shared_length,
    whole,
    wires,
)
from harness.workflow_api import read_workflow
from harness.workflow_files import shipped

PAGE = (1600, 1000)  # pixels of a usual window
SMALLEST_SCALE = 0.5
UNREAD = 8 / 14  # below this scale the page draws no titles: 8 pixels is its smallest type, 14 a title's at full size
LARGE = {"FlashVideo 10 Compare Strengths and Steps"}  # four refiners: titles need a wider window than PAGE
SIDEBAR, TOOLBAR = 70, 95  # pixels at the left and at the top that the page itself takes
BELOW = 14  # units: Nodes 2.0 are a little taller than what the file says
DOTS = 2.5  # for each wire, in the mean
FILES = pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)


@FILES
def test_titles_can_be_read_when_the_whole_graph_is_shown(path: Path) -> None:
    scale = fitted_scale(read_workflow(path), PAGE)
    assert scale >= (SMALLEST_SCALE if path.stem in LARGE else UNREAD), scale


@FILES
def test_the_saved_view_shows_the_whole_graph_beside_the_page_s_own_bars(path: Path) -> None:
    workflow = read_workflow(path)
    view = workflow["extra"]["ds"]
    left, top, right, bottom = whole(workflow)
    x, y = view["offset"]
    assert (left + x) * view["scale"] >= SIDEBAR
    assert (top + y) * view["scale"] >= TOOLBAR
    assert (right + x) * view["scale"] <= PAGE[0]
    assert (bottom + y) * view["scale"] <= PAGE[1]


@FILES
def test_nodes_have_room_below_for_a_taller_kind(path: Path) -> None:
    for one, other in itertools.permutations(read_workflow(path)["nodes"], 2):
        a, b = box(one), box(other)
        beside = a[2] <= b[0] or b[2] <= a[0]
        assert beside or a[1] > b[1] or a[3] + BELOW <= b[1] or one["mode"] or other["mode"], (one["id"], other["id"])


@FILES
def test_no_wire_runs_behind_a_node(path: Path) -> None:
    workflow = read_workflow(path)
    hidden = {wire.link: crossed for wire in wires(workflow) if (crossed := nodes_crossed(wire, workflow["nodes"]))}
    assert not hidden


@FILES
def test_no_two_wires_lie_on_one_line(path: Path) -> None:
    pairs = itertools.combinations(wires(read_workflow(path)), 2)
    assert not [(a.link, b.link) for a, b in pairs if shared_length(a, b) > ONE_LINE]


@FILES
def test_wires_have_few_reroute_dots(path: Path) -> None:
    workflow = read_workflow(path)
    assert len(workflow["extra"].get("reroutes", [])) <= DOTS * len(workflow["links"])


def test_spare_dots_are_taken_out_and_wires_stay_where_they_are() -> None:
    """Of a wire over a node in between only the dots at the turns stay."""
    nodes = [
        {"id": number, "pos": [left, 100], "size": [100, 60], "inputs": [{"name": "in"}], "outputs": [{"name": "out"}]}
        for number, left in ((1, 0), (2, 200), (3, 400))
    ]
    turns = [(130, 114), (150, 60), (170, 30), (200, 30), (250, 30), (300, 30), (330, 30), (350, 60), (370, 114)]
    dots = [{"id": number, "pos": list(pos), "linkIds": [1]} for number, pos in enumerate(turns, 1)]
    for dot in dots[1:]:
        dot["parentId"] = dot["id"] - 1
    extra = {"reroutes": dots, "linkExtensions": [{"id": 1, "parentId": len(dots)}]}
    fewer = without_spare_dots({"nodes": nodes, "links": [[1, 1, 0, 3, 0, "IMAGE"]], "groups": [], "extra": extra})
    (wire,) = wires(fewer)
    assert not nodes_crossed(wire, nodes)
    assert 0 < len(fewer["extra"]["reroutes"]) <= len(dots) // 2
    assert len(extra["reroutes"]) == len(turns)
    assert min(y for _, y in wire.points) > -2  # 32 units above the highest dot


@FILES
def test_no_wire_lies_over_a_group_s_number(path: Path) -> None:
    workflow = read_workflow(path)
    dots = [tuple(dot["pos"]) for dot in workflow["extra"].get("reroutes", [])]
    for group in workflow["groups"]:
        if group["title"].strip()[0].isdigit():
            left, top, right, bottom = group_number_box(group)
            points = [point for wire in wires(workflow) for point in wire.points] + dots
            assert not [(x, y) for x, y in points if left <= x <= right and top <= y <= bottom], group["title"]


@FILES
def test_groups_lie_apart_and_have_a_title_that_fits(path: Path) -> None:
    groups = read_workflow(path)["groups"]
    for one, other in itertools.combinations(groups, 2):
        a, b = group_box(one), group_box(other)
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (one["title"], other["title"])
    for group in groups:
        assert len(group["title"].strip()) * group["font_size"] * 0.55 <= group["bounding"][2], group["title"]
