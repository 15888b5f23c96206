"""Each node checks what arrives against its own schema: one sentence with the node's name, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

NAN, INFINITE = float("nan"), float("inf")
NUMBERS = ("INT", "FLOAT")
WIRES = ("IMAGE", "MASK", "LATENT", "MODEL", "CONDITIONING", "VAE", "CLIP", "VIDEO")


@pytest.fixture(scope="module")
def schemas(our_nodes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The pack's nodes with their schemas, by id."""
    return {name: (node, node.define_schema()) for name, node in our_nodes.items()}


@pytest.fixture(scope="module")
def sound(model: Any, text: dict[str, list]) -> Callable[[Any], dict[str, Any]]:
    """Arguments of a schema that pass every check, with stand-ins for what only runs look at."""
    wires = {
        "IMAGE": torch.zeros(1, 16, 16, 3),
        "MASK": torch.ones(1, 16, 16),
        "LATENT": {"samples": torch.zeros(1, 16, 1, 2, 2)},
        "MODEL": model,
        "CONDITIONING": text["positive"],
        "VAE": object(),
        "CLIP": SimpleNamespace(tokenize=None),
        "VIDEO": object(),
    }

    def arguments(schema: Any) -> dict[str, Any]:
        return {
            port.id: wires[port.io_type]
            if port.io_type in WIRES
            else port.default
            if port.default is not None
            else "a name"
            for port in schema.inputs
        }

    return arguments


def wrong_values(port: Any) -> Iterator[tuple[Any, str]]:
    """What an input must refuse, and a part of what it says."""
    name = port.id
    if port.io_type in NUMBERS:
        for value in (NAN, INFINITE, -INFINITE, port.max + 1, port.min - 1, "much", [1], torch.ones(2)):
            yield value, f"{name} must be a"
        if port.io_type == "INT":
            yield port.min + 0.5, f"{name} must be a whole number from {port.min} to {port.max}; got"
    elif port.io_type == "COMBO" and not name.endswith("_name"):
        for value in ("the best", "", 7):
            yield value, f"{name} must be one of {port.options[0]}"
    elif port.io_type in ("IMAGE", "MASK", "LATENT", "MODEL", "CONDITIONING", "CLIP"):
        for value in ("a word", 3, {"sample": 1}):
            yield value, f"{name} must be"
    if not port.optional and port.io_type not in ("VAE", "CLIP"):
        yield None, f"{name} is empty"


def test_every_wrong_value_gets_one_sentence_with_the_nodes_name(
    schemas: dict[str, tuple[Any, Any]], sound: Callable[[Any], dict[str, Any]]
) -> None:
    tried = 0
    for node, schema in schemas.values():
        for port in schema.inputs:
            for value, words in wrong_values(port):
                with pytest.raises(ValueError) as refused:
                    node.execute(**{**sound(schema), port.id: value})
                message = str(refused.value)
                assert message.startswith(f"{schema.display_name}: {words}"), (port.id, value, message)
                assert "\n" not in message
                tried += 1
    assert tried > 300


def test_choices_that_comfyui_doesnt_check_are_checked(comfy_nodes: dict[str, Any], model: Any) -> None:
    with pytest.raises(ValueError, match=r"^Load FlashVideo Model: weight_dtype must be one of default, fp8_e4m3fn, "):
        comfy_nodes["FlashVideoModelLoader"].execute("FlashVideo-Nano Stage I (built-in)", "fp4")
    with pytest.raises(ValueError, match=r"^Load FlashVideo VAE: memory_budget must be one of auto, 2 GB, "):
        comfy_nodes["FlashVideoVAELoader"].execute("FlashVideo-Nano (built-in)", "3 GB")
    with pytest.raises(ValueError, match=r"^FlashVideo Fast Attention: attention must be one of exact, wide view, "):
        comfy_nodes["FlashVideoFastAttention"].execute(model, "broad view")


def test_an_optional_input_that_gets_nothing_has_its_default(comfy_nodes: dict[str, Any]) -> None:
    load = comfy_nodes["FlashVideoVAELoader"].execute
    default, nothing = (load("FlashVideo-Nano (built-in)", *budget).result[0] for budget in ((), (None,)))
    assert nothing is default


def test_whole_numbers_may_come_as_floats(comfy_nodes: dict[str, Any]) -> None:
    (latent,) = comfy_nodes["EmptyFlashVideoLatent"].execute(64.0, 32.0, 5.0, 1.0).result
    assert latent["samples"].shape == (1, 16, 2, 4, 8)


def test_a_video_of_more_than_main_memory_is_refused(comfy_nodes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^Empty FlashVideo Latent: 64 videos of 4096x4096 and 1025 frames need "):
        comfy_nodes["EmptyFlashVideoLatent"].execute(4096, 4096, 1025, 64)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (torch.zeros(1, 16, 1, 2, 2).to(torch.float8_e4m3fn), "numbers of 16 or 32 bits; these are torch.float8"),
        (torch.zeros(1, 16, 1, 2, 2, dtype=torch.int64), "numbers of 16 or 32 bits; these are torch.int64"),
        (None, "must hold one kind of video"),
        (torch.full((1, 16, 1, 2, 2), INFINITE), "not finite"),
    ],
)
def test_latents_that_cannot_be_worked_on(comfy_nodes: dict[str, Any], samples: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^FlashVideo Latent Degradation: latent .*{words}"):
        comfy_nodes["FlashVideoLatentDegradation"].execute({"samples": samples}, 675, 0)


def test_nested_latents_are_refused(comfy_nodes: dict[str, Any]) -> None:
    from comfy.nested_tensor import NestedTensor

    mixed = NestedTensor((torch.zeros(1, 16, 1, 2, 2), torch.zeros(1, 8, 4)))
    with pytest.raises(ValueError, match="one kind of video; this one mixes several"):
        comfy_nodes["FlashVideoLatentDegradation"].execute({"samples": mixed}, 675, 0)


def test_text_with_nan_is_refused_before_the_run(comfy_nodes: dict[str, Any], model: Any, text: dict) -> None:
    latent = (
        comfy_nodes["FlashVideoLatentDegradation"].execute({"samples": torch.zeros(1, 16, 1, 2, 2)}, 60, 0).result[0]
    )
    broken = [[text["positive"][0][0] * NAN, {}]]
    refine = comfy_nodes["FlashVideoStage2Refiner"].execute
    with pytest.raises(ValueError, match=r"^FlashVideo Stage II Refiner: positive holds numbers that are not finite"):
        refine(model, broken, text["negative"], latent, 1, 13.0, 2.5, "euler")
