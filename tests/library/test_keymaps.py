"""Every key of the official full-size files has its place, and converted names are ComfyUI core's."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from flashvideo.checkpoints.architecture import dit_config, vae_config
from flashvideo.checkpoints.keymaps import find_layout, make_plan, original_name
from flashvideo.config import STAGE1, STAGE2, VAE
from flashvideo.dit import FlashVideoDiT
from flashvideo.vae import VideoVAE

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
NETWORKS = {
    "stage1": (FlashVideoDiT, STAGE1, "stage1_5b"),
    "stage2": (FlashVideoDiT, STAGE2, "stage2_2b"),
    "vae": (VideoVAE, VAE, "vae"),
}
EXTRA = ("degradation_embedding.", "frame_count_embedding.")


@pytest.fixture(scope="module", params=NETWORKS)
def official(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]:
    layout = json.loads((GOLDEN / f"layout_{request.param}.json").read_text())
    return request.param, layout, {key: tuple(shape) for key, (shape, _) in layout["keys"].items()}


def converted_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    plan = make_plan(shapes, find_layout(shapes))
    return {part.name: part.shape(shapes[source.key]) for source in plan.sources for part in source.parts}


def test_each_key_is_consumed_once_or_unused(official: tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]) -> None:
    _, layout, shapes = official
    plan = make_plan(shapes, find_layout(shapes))
    consumed = Counter(key for source in plan.sources for key in (source.key, *source.lora_a, *source.lora_b))
    assert set(consumed.values()) == {1}
    assert set(consumed) | set(plan.unused) == set(shapes)
    assert not set(consumed) & set(plan.unused)
    assert list(plan.unused) == layout.get("unused_keys", [])
    assert plan.foreign == () and plan.unexpected == ()


def test_each_row_of_a_source_goes_to_one_place(
    official: tuple[str, dict[str, Any], dict[str, tuple[int, ...]]],
) -> None:
    _, _, shapes = official
    for source in make_plan(shapes, find_layout(shapes)).sources:
        rows = sorted(chunk for part in source.parts for chunk in part.chunks)
        assert rows == list(range(source.parts[0].of))
        assert len({part.of for part in source.parts}) == 1


def test_keys_dropped_before_loading_are_unused(
    official: tuple[str, dict[str, Any], dict[str, tuple[int, ...]]],
) -> None:
    name, layout, shapes = official
    dropped = layout.get("dropped_before_load", []) + (["loss.discriminator.weight"] if name == "vae" else [])
    plan = make_plan([*shapes, *dropped], find_layout(shapes))
    assert set(dropped) <= set(plan.unused)


def test_converted_names_and_shapes_are_core_s(
    official: tuple[str, dict[str, Any], dict[str, tuple[int, ...]]],
) -> None:
    name, _, shapes = official
    core = json.loads((GOLDEN / "core_cogvideox_keys.json").read_text())[NETWORKS[name][2]]
    blocks = range(core.get("num_layers", 1))  # block 0 stands for every block
    expected = {
        key.replace("blocks.0.", f"blocks.{i}.") if key.startswith("blocks.0.") else key: tuple(shape)
        for key, shape in core["keys"].items()
        for i in blocks
    }
    converted = converted_shapes(shapes)
    assert {key: shape for key, shape in converted.items() if not key.startswith(EXTRA)} == expected
    extra = [key for key in converted if key.startswith(EXTRA)]
    assert len(extra) == (8 if name == "stage2" else 0)


def test_architecture_follows_from_shapes(official: tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]) -> None:
    name, _, shapes = official
    read = vae_config if name == "vae" else dit_config
    assert read(converted_shapes(shapes)) == NETWORKS[name][1]


def test_full_size_network_has_exactly_the_converted_weights(
    official: tuple[str, dict[str, Any], dict[str, tuple[int, ...]]],
) -> None:
    name, layout, shapes = official
    network, config, _ = NETWORKS[name]
    state = network(config, device="meta").state_dict()
    converted = converted_shapes(shapes)
    assert {key: tuple(value.shape) for key, value in state.items()} == converted
    unused = sum(torch.Size(shapes[key]).numel() for key in layout.get("unused_keys", []))
    merged = layout.get("parameters_after_merge", layout["parameters"])
    assert sum(value.numel() for value in state.values()) == merged - unused


def test_original_names_are_found_again(official: tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]) -> None:
    name, _, shapes = official
    layout = find_layout(shapes)
    for source in make_plan(shapes, layout).sources:
        for part in source.parts:
            key = original_name(part.name, layout, levels=len(VAE.channel_multipliers) if name == "vae" else 0)
            assert key == source.key.replace(".original.", ".")
