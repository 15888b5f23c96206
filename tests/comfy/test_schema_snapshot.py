"""Saved workflows go on working: what a release has called a node, an input, an option or an output stays.

tests/data/schema.json is the nodes as they are released. Whoever changes a node rewrites it with

    FLASHVIDEO_UPDATE_SCHEMA=1 make test ARGS="-k schema_snapshot"

which takes what is new, and refuses what would break a saved workflow. Where such a break can't be avoided,
"migrations" in that file names the node, and says since which version and what a user has to do (CONTRIBUTING.md).
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import folder_paths
import pytest

SNAPSHOT = Path(__file__).resolve().parents[1] / "data" / "schema.json"
UPDATE = "FLASHVIDEO_UPDATE_SCHEMA"
BUILT_IN = "(built-in)"  # ends the names of the models that come with the pack

Node = dict[str, Any]


def input_facts(port: Any) -> Node:
    """What a saved workflow depends on in an input; of a loader's options only those that are always there."""
    facts: Node = {"id": port.id, "type": port.io_type, "optional": bool(port.optional)}
    for name in ("default", "min", "max", "step", "control_after_generate"):
        value = getattr(port, name, None)
        if value is not None:
            facts[name] = value
    loader = port.id.endswith("_name")
    options = [option for option in getattr(port, "options", None) or [] if not loader or option.endswith(BUILT_IN)]
    if options:
        facts["options"] = options
    return facts


def node_facts(schema: Any) -> Node:
    """What a saved workflow depends on in a node."""
    return {
        "display_name": schema.display_name,
        "category": schema.category,
        "inputs": [input_facts(port) for port in schema.inputs],
        "outputs": [{"name": port.display_name, "type": port.io_type} for port in schema.outputs],
        "output_node": bool(schema.is_output_node),
    }


def breaks(released: dict[str, Node], now: dict[str, Node]) -> list[str]:
    """What a saved workflow would stumble over, a line each."""
    found = [f"{node} is gone" for node in released if node not in now]
    for node in released.keys() & now.keys():
        found += [f"{node}: {line}" for line in _node_breaks(released[node], now[node])]
    return sorted(found)


def _node_breaks(old: Node, new: Node) -> list[str]:
    found = []
    if new["outputs"][: len(old["outputs"])] != old["outputs"]:
        found.append(f"outputs were {old['outputs']}, are {new['outputs']}")
    # Widget values are saved by position, and so are wires: names, types and order are one thing.
    before, after = ([(port["id"], port["type"]) for port in node["inputs"]] for node in (old, new))
    if after[: len(before)] != before:
        return [*found, f"inputs were {before}, are {after}"]
    added = new["inputs"][len(before) :]
    found += [f"new input {port['id']} must be optional" for port in added if not port["optional"]]
    for was, is_ in zip(old["inputs"], new["inputs"], strict=False):
        found += [f"{was['id']} {line}" for line in _input_breaks(was, is_)]
    return found


def _input_breaks(old: Node, new: Node) -> list[str]:
    gone = [option for option in old.get("options", []) if option not in new.get("options", [])]
    found = [f"has lost the options {gone}"] if gone else []
    if old["optional"] and not new["optional"]:
        found.append("is not optional any more")
    if new.get("min", 0) > old.get("min", 0) or new.get("max", 0) < old.get("max", 0):
        found.append(f"takes less than from {old['min']} to {old['max']}")
    if old.get("control_after_generate") != new.get("control_after_generate"):
        found.append("saves another number of widget values")  # the control is a value of its own
    return found


@pytest.fixture(scope="module")
def live(our_nodes: dict[str, Any]) -> dict[str, Node]:
    """The nodes as the code has them now."""
    return {name: node_facts(node.define_schema()) for name, node in sorted(our_nodes.items())}


@pytest.fixture(scope="module")
def snapshot() -> dict[str, Any]:
    """The nodes as they were released, and where a release had to break with an earlier one."""
    return json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_saved_workflows_find_everything_they_know(live: dict[str, Node], snapshot: dict[str, Any]) -> None:
    kept = {name: node for name, node in snapshot["nodes"].items() if name not in snapshot["migrations"]}
    assert breaks(kept, live) == [], "a saved workflow breaks: keep the old, or write a migration (CONTRIBUTING.md)"


def test_snapshot_is_the_nodes_as_they_are(live: dict[str, Node], snapshot: dict[str, Any]) -> None:
    kept = {name: node for name, node in snapshot["nodes"].items() if name not in snapshot["migrations"]}
    if os.environ.get(UPDATE) and not breaks(kept, live):
        snapshot["nodes"] = live
        SNAPSHOT.write_text(json.dumps(snapshot, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    changed = [name for name in live.keys() | snapshot["nodes"].keys() if live.get(name) != snapshot["nodes"].get(name)]
    assert not changed, f'{sorted(changed)} changed; run: {UPDATE}=1 make test ARGS="-k schema_snapshot"'


def test_migrations_say_since_when_and_what_to_do(snapshot: dict[str, Any]) -> None:
    for name, migration in snapshot["migrations"].items():
        assert set(migration) == {"since", "advice"} and all(migration.values()), name


SAMPLER = "FlashVideoStage1Sampler"
REFINER = "FlashVideoStage2Refiner"


def rename_input(nodes: dict[str, Node]) -> None:
    nodes[SAMPLER]["inputs"][5]["id"] = "number_of_steps"


def change_type(nodes: dict[str, Node]) -> None:
    nodes[SAMPLER]["inputs"][5]["type"] = "FLOAT"


def swap_inputs(nodes: dict[str, Node]) -> None:
    inputs = nodes[SAMPLER]["inputs"]
    inputs[5], inputs[6] = inputs[6], inputs[5]


def put_input_in_the_middle(nodes: dict[str, Node]) -> None:
    nodes[SAMPLER]["inputs"].insert(5, {"id": "new", "type": "INT", "optional": True})


def add_required_input(nodes: dict[str, Node]) -> None:
    nodes[SAMPLER]["inputs"].append({"id": "new", "type": "INT", "optional": False})


def rename_node(nodes: dict[str, Node]) -> None:
    nodes["FlashVideoDraftSampler"] = nodes.pop(SAMPLER)


def drop_option(nodes: dict[str, Node]) -> None:
    nodes[REFINER]["inputs"][7]["options"].remove("heun")


def narrow_range(nodes: dict[str, Node]) -> None:
    nodes[REFINER]["inputs"][4]["max"] -= 1


def change_output(nodes: dict[str, Node]) -> None:
    nodes[REFINER]["outputs"][0]["type"] = "IMAGE"


@pytest.mark.parametrize(
    "change",
    [
        rename_input,
        change_type,
        swap_inputs,
        put_input_in_the_middle,
        add_required_input,
        rename_node,
        drop_option,
        narrow_range,
        change_output,
    ],
)
def test_every_kind_of_break_is_noticed(live: dict[str, Node], change: Callable[[dict[str, Node]], None]) -> None:
    changed = copy.deepcopy(live)
    change(changed)
    assert len(breaks(live, changed)) == 1, breaks(live, changed)


def test_what_is_added_at_the_end_breaks_nothing(live: dict[str, Node]) -> None:
    changed = copy.deepcopy(live)
    changed["FlashVideoNew"] = copy.deepcopy(changed[SAMPLER])
    changed[SAMPLER]["inputs"].append({"id": "new", "type": "INT", "optional": True})
    changed[REFINER]["inputs"][7]["options"].append("new solver")
    changed[REFINER]["display_name"] = "Another Name"
    assert breaks(live, changed) == []


@pytest.mark.parametrize(
    ("node", "entry", "folder", "files"),
    [
        ("FlashVideoModelLoader", "model_name", "diffusion_models", ("stage1.pt", "stage2.pt")),
        ("FlashVideoTextEncoderLoader", "text_encoder_name", "text_encoders", ("t5xxl_fp16.safetensors",)),
        ("FlashVideoVAELoader", "vae_name", "vae", ("3d-vae.pt",)),
    ],
)
def test_a_missing_file_is_answered_with_what_to_put_where(
    live: dict[str, Node], run_prompt: Any, node: str, entry: str, folder: str, files: tuple[str, ...]
) -> None:
    inputs = {entry: "not there.safetensors", **({"weight_dtype": "default"} if node.endswith("ModelLoader") else {})}
    show = {"class_type": "TestCapture", "inputs": {"value": ["1", 0], "name": "loaded"}}
    errors = run_prompt({"1": {"class_type": node, "inputs": inputs}, "2": show}, validation_errors=True)
    said = errors["1"]["errors"][0]["details"]
    place = next(place for place in folder_paths.get_folder_paths(folder) if Path(place).name == folder)
    for words in ("not there.safetensors", *files, "huggingface.co/", place):
        assert words in said, f"{words}: {said}"


def _record(said: list[str], *words: str) -> dict[str, Any]:
    said.extend(words)
    return {}


def test_search_finds_the_nodes_by_what_users_call_it(
    live: dict[str, Node], comfy_nodes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the nodes say, whether this ComfyUI's search knows such words or not."""
    found: dict[str, list[str]] = {}
    for name in live:
        node, said = comfy_nodes[name], []
        recorder = partial(_record, said)
        monkeypatch.setattr(sys.modules[node.__module__], "found_as", recorder)
        schema = node.define_schema()
        assert said, name
        for words in said:
            found.setdefault(words, []).append(name)
        monkeypatch.undo()
        assert getattr(node.define_schema(), "search_aliases", said) == said
        assert schema.node_id == name
    for words in ("video upscale", "refine", "enhance", "text to video", "super resolution"):
        assert found[words], words
