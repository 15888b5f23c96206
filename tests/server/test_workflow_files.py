"""The shipped workflow files as files: they fit the running ComfyUI, explain themselves, and nothing overlaps."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from harness.comfy_client import ComfyClient
from harness.comfy_server import ComfyServer
from harness.workflow_api import read_workflow
from harness.workflow_files import ALWAYS, BYPASSED, MUTED, WORKFLOWS, shipped
from PIL import Image

NAMES = (  # in the order in which one learns them
    "01 Draft from a Prompt",
    "02 Text to Video 1080p",
    "03 Refine Any Video",
    "04 Single Image",
    "05 Low Memory",
    "06 Long Video",
    "07 Refine after Wan",
    "08 Refine after LTX",
    "09 Refine after HunyuanVideo",
    "10 Compare Strengths and Steps",
    "11 LoRA and Torch Compile",
    "12 Stage I in Full Control",
    "13 Refine a Region",
)
FILES = pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
ON_THE_PAGE_ONLY = {"MarkdownNote"}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}  # the last in newer versions
TITLE_HEIGHT, SPACE = 30, 8  # pixels of the page at full size
LOADERS = {
    "FlashVideoModelLoader": "diffusion_models",
    "FlashVideoTextEncoderLoader": "text_encoders",
    "FlashVideoVAELoader": "vae",
    "UNETLoader": "diffusion_models",
    "CLIPLoader": "text_encoders",
    "DualCLIPLoader": "text_encoders",
    "VAELoader": "vae",
    "CheckpointLoaderSimple": "checkpoints",
}
FILE_CHOICES = {"file", "image"} | {f"{kind}_name" for kind in ("lora", "unet", "clip", "vae", "ckpt")}
FILE_CHOICES |= {"clip_name1", "clip_name2"}

Node = dict[str, Any]


@pytest.fixture(scope="module")
def object_info(server: ComfyServer) -> dict[str, Any]:
    """What the running ComfyUI says of its nodes."""
    return ComfyClient(server.address).object_info()


def declared(info: dict[str, Any]) -> dict[str, list[Any]]:
    """A node's inputs in order: name -> [type, options]; a type that is a list of choices becomes COMBO."""
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    return {
        name: ["COMBO", {"options": spec[0], **(spec[1] if len(spec) > 1 else {})}]
        if isinstance(spec[0], list)
        else [spec[0], spec[1] if len(spec) > 1 else {}]
        for name, spec in inputs.items()
    }


def widgets(inputs: dict[str, list[Any]]) -> list[str]:
    """Names of the values that the page saves for a node, in order."""
    names = []
    for name, (kind, options) in inputs.items():
        if kind not in WIDGET_TYPES or options.get("forceInput"):
            continue
        names.append(name)
        if options.get("control_after_generate"):
            names.append(f"{name}: control after generate")
        if any(options.get(f"{medium}_upload") for medium in ("image", "video", "audio")):
            names.append(f"{name}: upload")
    return names


def fits(node: Node, saved: list[Any], today: list[Any]) -> bool:
    """Whether what is saved is what the node has today; ComfyUI's own grow at their end from version to version."""
    return saved == (today if node["type"].startswith("FlashVideo") else today[: len(saved)])


def box(node: Node) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a node with its title."""
    (left, top), (width, height) = node["pos"], node["size"]
    return left, top - TITLE_HEIGHT, left + width, top + height


def test_the_workflows_are_there_in_learning_order() -> None:
    assert [path.stem for path in shipped()] == [f"FlashVideo {name}" for name in NAMES]


def test_no_template_has_the_name_of_a_blueprint() -> None:
    """Frontend 1.32.9 opens such a template as a blueprint, which can't be saved as a workflow."""
    blueprints = {path.stem.casefold() for path in (WORKFLOWS.parent / "subgraphs").glob("*.json")}
    assert len(blueprints) == 2
    assert not blueprints & {path.stem.casefold() for path in shipped()}


@FILES
def test_nodes_inputs_and_widgets_are_those_of_the_server(path: Path, object_info: dict[str, Any]) -> None:
    for node in read_workflow(path)["nodes"]:
        if node["type"] in ON_THE_PAGE_ONLY:
            continue
        info = object_info[node["type"]]
        inputs = declared(info)
        ports = {port["name"] for port in node["inputs"]} - {"upload"}
        assert fits(node, [name for name in inputs if name in ports], list(inputs)), node["type"]
        assert ports <= inputs.keys(), node["type"]
        names, values = widgets(inputs), node.get("widgets_values") or []
        assert fits(node, names[: len(values)], names), node["type"]
        assert fits(node, [port["type"] for port in node["outputs"]], info["output"]), node["type"]


@FILES
def test_saved_values_are_accepted(path: Path, object_info: dict[str, Any]) -> None:
    for node in read_workflow(path)["nodes"]:
        if node["type"] in ON_THE_PAGE_ONLY:
            continue
        inputs = declared(object_info[node["type"]])
        for name, value in zip(widgets(inputs), node.get("widgets_values") or [], strict=False):
            kind, options = inputs.get(name, ["", {}])
            where = f"{node['type']}.{name} = {value!r}"
            if kind == "COMBO" and name not in FILE_CHOICES:
                assert value in options["options"], where
            elif kind in {"INT", "FLOAT"}:
                assert options["min"] <= value <= options["max"], where
            elif kind in {"STRING", "BOOLEAN"}:
                assert isinstance(value, {"STRING": str, "BOOLEAN": bool}[kind]), where


@FILES
def test_wires_connect_what_belongs_together(path: Path, object_info: dict[str, Any]) -> None:
    workflow = read_workflow(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    wires = {link[0]: link for link in workflow["links"]}
    for _, source, output, target, entry, kind in wires.values():
        assert nodes[source]["outputs"][output]["type"] == kind
        assert nodes[target]["inputs"][entry]["type"] == kind
    for node in nodes.values():
        if node["type"] in ON_THE_PAGE_ONLY or node["mode"] != ALWAYS:
            continue
        required = object_info[node["type"]]["input"].get("required", {})
        linked = {port["name"]: wires[port["link"]] for port in node["inputs"] if port.get("link") is not None}
        needed = {name: link for name, link in linked.items() if name in required}
        loose = [name for name, spec in declared({"input": {"required": required}}).items()
                 if spec[0] not in WIDGET_TYPES and name not in linked]  # fmt: skip
        assert not loose, f"{node['type']}: {loose}"
        muted = [name for name, link in needed.items() if nodes[link[1]]["mode"] == MUTED]
        assert not muted, f"{node['type']} waits for a node that is off: {muted}"


@FILES
def test_files_and_downloads_are_named_where_the_page_looks_for_them(path: Path) -> None:
    """Those of a generator that is off stand in the note instead: the page would ask for them at the start."""
    workflow = read_workflow(path)
    (note,) = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    for node in workflow["nodes"]:
        if node["type"] not in LOADERS:
            continue
        if node["mode"] == MUTED:
            assert "models" not in node["properties"]
            for file in (value for value in node["widgets_values"] if str(value).endswith(".safetensors")):
                link = rf"\[{re.escape(file)}\]\(https://huggingface\.co/\S+/{re.escape(file)}\)"
                assert re.search(rf"{link} into `models/{LOADERS[node['type']]}`", note), file
            continue
        models = node["properties"]["models"]
        assert models, node["type"]
        for model in models:
            assert model["directory"] == LOADERS[node["type"]]
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith(f"/{model['name']}")
        chosen = [value for value in node["widgets_values"] if isinstance(value, str) and "." in value]
        assert set(chosen) <= {model["name"] for model in models}, node["type"]


@FILES
def test_only_what_needs_a_file_of_the_user_is_off(path: Path) -> None:
    nodes = read_workflow(path)["nodes"]
    assert all(node["mode"] == MUTED for node in nodes if node["type"] in {"LoadVideo", "LoadImage"})
    bypassed = {node["type"] for node in nodes if node["mode"] == BYPASSED}
    assert bypassed <= {"FlashVideoLoraLoader", "TorchCompileModel"}
    assert not [node["type"] for node in nodes if node["type"].startswith("FlashVideo") and node["mode"] == MUTED]


@FILES
def test_a_note_says_what_to_do_with_the_official_models(path: Path) -> None:
    workflow = read_workflow(path)
    (note,) = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    text = note["widgets_values"][0]
    assert text.startswith("## ") and "**With the official models**" in text
    loaders = [node for node in workflow["nodes"] if node["type"].startswith("FlashVideo") and node["type"] in LOADERS]
    for node in loaders:
        assert node["properties"]["models"][0]["name"] in text
    assert workflow["nodes"][0]["id"] == note["id"]


@FILES
def test_nothing_overlaps_and_every_node_has_its_group(path: Path) -> None:
    workflow = read_workflow(path)
    for first, second in itertools.combinations(workflow["nodes"], 2):
        a, b = box(first), box(second)
        apart = a[2] + SPACE <= b[0] or b[2] + SPACE <= a[0] or a[3] + SPACE <= b[1] or b[3] + SPACE <= a[1]
        assert apart, f"{first['type']} and {second['type']}"
    frames = [(x, y, x + width, y + height) for x, y, width, height in (g["bounding"] for g in workflow["groups"])]
    for node in workflow["nodes"]:
        left, top, right, bottom = box(node)
        around = [f for f in frames if f[0] <= left and f[1] <= top and f[2] >= right and f[3] >= bottom]
        crossing = [f for f in frames if f[0] < right and left < f[2] and f[1] < bottom and top < f[3]]
        assert len(around) == (0 if node["type"] in ON_THE_PAGE_ONLY else 1) == len(crossing), node["type"]


@FILES
def test_the_template_browser_has_a_picture(path: Path) -> None:
    picture = path.with_suffix(".jpg")
    assert picture.stat().st_size < 100_000
    with Image.open(picture) as image:
        assert image.format == "JPEG"
        assert image.size == (512, 512)
