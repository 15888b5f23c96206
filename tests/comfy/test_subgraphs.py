"""The blueprints in subgraphs/: ComfyUI lists them, and everything in them fits the nodes as they are."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

NAMES = ("FlashVideo Refine Video", "FlashVideo Text to Video")
OPTIONAL = 7  # the shape of an optional input's dot
OUTSIDE = -10  # id that a link from the blueprint's own inputs begins at
RESULT = -20  # and the one that a link to its outputs ends at
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}

Graph = dict[str, Any]


@pytest.fixture(scope="module")
def blueprints(comfy_nodes: dict[str, Any]) -> dict[str, Graph]:
    """What ComfyUI's page gets of this pack's blueprints, by name."""
    manager = pytest.importorskip("app.subgraph_manager").SubgraphManager()

    async def read() -> dict[str, Graph]:
        entries = await manager.get_custom_node_subgraphs({})
        loaded = [await manager.load_entry_data(entry) for entry in entries.values()]
        return {entry["name"]: json.loads(entry["data"]) for entry in loaded}

    return asyncio.run(read())


def inside(graph: Graph) -> Graph:
    """The one subgraph that a blueprint's single node stands for."""
    (node,), (subgraph,) = graph["nodes"], graph["definitions"]["subgraphs"]
    assert node["type"] == subgraph["id"]
    return subgraph


def test_comfyui_lists_both(blueprints: dict[str, Graph]) -> None:
    assert sorted(blueprints) == sorted(NAMES)
    for name, graph in blueprints.items():
        subgraph = inside(graph)
        assert subgraph["name"] == graph["nodes"][0]["title"] == name == Path(name).stem
        assert subgraph["category"] == "FlashVideo" and subgraph["description"]


@pytest.mark.parametrize("name", NAMES)
def test_inner_nodes_are_as_comfyui_has_them(
    blueprints: dict[str, Graph], comfy_nodes: dict[str, Any], name: str
) -> None:
    for node in inside(blueprints[name])["nodes"]:
        info = ports(comfy_nodes[node["type"]])
        # ComfyUI and this pack add inputs at the end only; a ComfyUI that doesn't have them ignores them.
        known = [port for port in node["inputs"] if port["name"] in info]
        assert known == node["inputs"][: len(known)] != [], node["type"]
        for port in known:
            assert port["type"] == info[port["name"]], (node["type"], port["name"])
        # Values are kept by position.
        widgets = [port["name"] for port in known if port["type"] in WIDGETS]
        assert widgets == [name for name, kind in info.items() if kind in WIDGETS][: len(widgets)], node["type"]
        values = sum(port["type"] in WIDGETS for port in node["inputs"])
        values += "seed" in widgets  # what comes after it is a value of its own
        assert len(node.get("widgets_values", [])) == values, node["type"]


def ports(node: Any) -> dict[str, str]:
    """Names and types of a node's inputs, in the order that the page shows."""
    if hasattr(node, "define_schema"):
        return {port.id: port.io_type for port in node.define_schema().inputs}
    kinds = node.INPUT_TYPES()
    return {name: entry[0] for name, entry in {**kinds["required"], **kinds.get("optional", {})}.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_wire_has_two_ends_of_one_type(blueprints: dict[str, Graph], name: str) -> None:
    subgraph = inside(blueprints[name])
    nodes = {node["id"]: node for node in subgraph["nodes"]}
    for link in subgraph["links"]:
        start = (subgraph["inputs"] if link["origin_id"] == OUTSIDE else nodes[link["origin_id"]]["outputs"])[
            link["origin_slot"]
        ]
        end = (subgraph["outputs"] if link["target_id"] == RESULT else nodes[link["target_id"]]["inputs"])[
            link["target_slot"]
        ]
        assert start["type"] == end["type"] == link["type"], link
    for node in nodes.values():
        for port in node["inputs"]:
            free = "widget" in port or port.get("shape") == OPTIONAL
            assert port["link"] is not None or free, (node["type"], port["name"])


@pytest.mark.parametrize("name", NAMES)
def test_the_outer_node_shows_what_it_stands_for(blueprints: dict[str, Graph], name: str) -> None:
    graph = blueprints[name]
    node, subgraph = graph["nodes"][0], inside(graph)
    for side in ("inputs", "outputs"):
        assert [port["name"] for port in node[side]] == [port["name"] for port in subgraph[side]]
        assert all(port["linkIds"] for port in subgraph[side]), "each leads somewhere"
    widgets = [port["name"] for port in node["inputs"] if "widget" in port]
    assert len(node["widgets_values"]) == len(widgets)
    values = dict(zip(widgets, node["widgets_values"], strict=True))
    footage = " for real footage" if name == "FlashVideo Refine Video" else ""
    assert values["stage2_name"] == f"FlashVideo-Nano Stage II{footage} (built-in)", "runs without a download"
    assert values["vae_name"] == f"FlashVideo-Nano{footage} (built-in)"
