"""Random node calls: each gives what the node promises, or one plain sentence.

Call number n is the same on every machine. A failing call is run alone with `--first n --calls 1`.
"""

from __future__ import annotations

import math
import random
import re
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

# Inputs whose range holds values that take too long: what is tried instead. Beyond the range nothing takes long.
SMALL: dict[str, list[Any]] = {
    "width": [16, 33, 48, 64],
    "height": [16, 31, 32, 64],
    "length": [1, 4, 5, 9],
    "batch_size": [1, 2],
    "short_side": [16, 47, 64],
    "scale": [0.1, 0.5, 1.0, 2.0],
    "steps": [1, 2, 3],
    "draft_steps": [0, 2],
    "window": [0, 1, 5, 8, 9],
    "overlap": [0, 3, 4, 8],
    "tile": [128, 144, 256],
    "memory_budget": [0.0, 8.0],
    "time_budget": [0.0, 60.0],
}
ODD_NUMBERS = [math.nan, math.inf, -math.inf, -1, 0, 0.5, 2**31, 2**64, 2**70, 1e300, "7", "much", None, [1], True]
ODD = {
    "INT": ODD_NUMBERS,
    "FLOAT": ODD_NUMBERS,
    "COMBO": ["", "the best", "auto", 7, None, ["none"], "∅"],
    "STRING": [None, 5, "(", "(a:1e40)", "x" * 5000],
    "BOOLEAN": [None, "yes"],
}
SOUND: dict[str, list[Any]] = {"STRING": ["", "a red kite", "(wide:1.2) sea"], "BOOLEAN": [True, False]}
COSTLY = {"FlashVideoPlanner": 0.05, "FlashVideoRefineLongVideo": 0.05}  # how often, against 1 of the others
PYTHON_WORDS = re.compile(r"NoneType|has no attribute|keyword argument|Traceback|<class|torch\.Size|tensor\(|KeyError")
LONGEST_SENTENCE = 600  # characters


def floats(pick: random.Random, *shape: int) -> Tensor:
    """Numbers around 0 to 1, now and then broken or in another precision."""
    numbers = torch.rand(shape, generator=torch.Generator().manual_seed(pick.randrange(2**32)))
    kind = pick.random()
    if kind < 0.06 and numbers.numel():
        numbers.view(-1)[pick.randrange(numbers.numel())] = pick.choice([math.nan, math.inf, -math.inf])
    elif kind < 0.1:
        numbers = numbers * pick.choice([-3.0, 1e4, 1e30])
    elif kind < 0.16:
        numbers = numbers.to(pick.choice([torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]))
    elif kind < 0.2:
        numbers = (numbers * 255).to(pick.choice([torch.uint8, torch.int64, torch.bool]))
    return numbers


class Inputs:
    """Values for the inputs of nodes: most of them sound, so that calls get somewhere."""

    def __init__(self, loaded: dict[str, list[Any]]) -> None:
        """`loaded`: objects that can't be made from numbers, such as models, by ComfyUI's name of their type."""
        self.loaded = loaded

    def value(self, port: Any, pick: random.Random) -> Any:
        """A value for an input of a schema."""
        kind, odd = port.io_type, pick.random() < 0.12
        if kind == "IMAGE":
            return self.frames(pick, odd)
        if kind == "MASK":
            return self.mask(pick, odd)
        if kind == "LATENT":
            return self.latent(pick, odd)
        if not odd and kind in ("INT", "FLOAT"):
            return self.number(port, pick)
        sound = {"COMBO": getattr(port, "options", None) or [""], **SOUND, **self.loaded}
        return pick.choice(ODD.get(kind, [None, "a word", object()]) if odd else sound[kind])

    def number(self, port: Any, pick: random.Random) -> Any:
        """A number within the range that takes no time."""
        if port.id in SMALL:
            return pick.choice(SMALL[port.id])
        between = pick.uniform(port.min, port.max)
        number = pick.choice([port.min, port.max, port.default, between])
        return int(number) if port.io_type == "INT" else float(number)

    def frames(self, pick: random.Random, odd: bool) -> Any:
        """An IMAGE."""
        if odd:
            shape = pick.choice([(16, 16, 3), (0, 16, 16, 3), (1, 16, 16, 1), (2, 0, 16, 3), (1, 3, 16, 16), ()])
            return pick.choice([None, "a word", {}, floats(pick, *shape)])
        shape = pick.randrange(1, 7), pick.randrange(1, 40), pick.randrange(1, 40), pick.choice([3, 3, 3, 4])
        return floats(pick, *shape)

    def mask(self, pick: random.Random, odd: bool) -> Any:
        """A MASK."""
        if odd:
            shape = pick.choice([(1, 16, 16, 3), (0, 16, 16), (2, 0, 16), (16,), ()])
            return pick.choice([None, "a word", {}, floats(pick, *shape)])
        count = pick.choice([(), (1,), (pick.randrange(1, 7),), (1, 1)])
        shape = (*count, pick.randrange(1, 40), pick.randrange(1, 40))
        return floats(pick, *shape) if pick.random() < 0.7 else torch.full(shape, pick.choice([0.0, 1.0]))

    def latent(self, pick: random.Random, odd: bool) -> Any:
        """A LATENT."""
        if odd:
            shape = pick.choice([(1, 4, 8, 8), (1, 16, 0, 2, 2), (1, 16, 2, 3, 2), (16, 2, 2), (1, 12, 1, 2, 2)])
            return pick.choice([None, [], {}, {"samples": None}, {"samples": floats(pick, *shape)}])
        shape = pick.choice([1, 1, 2]), 16, pick.randrange(1, 4), 2 * pick.randrange(1, 4), 2 * pick.randrange(1, 4)
        latent: dict[str, Any] = {"samples": floats(pick, *shape)}
        if pick.random() < 0.1:
            latent["batch_index"] = pick.choice([[0] * shape[0], [3], list(range(shape[0])), [-1] * shape[0]])
        if pick.random() < 0.1:
            latent["noise_mask"] = torch.full((1, 1, 16, 16), pick.choice([0.0, 0.5, 1.0]))
        return latent


@pytest.fixture(scope="module")
def loaded(
    comfy_nodes: dict[str, Any], submodule: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Any]]:
    """Nano's models and what goes with them, and some that don't fit."""
    from comfy_api.latest import InputImpl, Types

    load, nano = submodule("nodes.native.model").load_model, submodule("flashvideo.nano").nano_state
    stages = [load(nano(f"stage{stage}")) for stage in (1, 2)]
    width = stages[0].model.diffusion_model.config.text_dim
    texts = [torch.randn((1, 4, size), generator=torch.Generator().manual_seed(size)) for size in (width, width, 768)]
    texts.append(texts[0] * math.nan)
    clip = Types.VideoComponents(images=torch.rand(5, 16, 32, 3), audio=None, frame_rate=8)
    return {
        "MODEL": [*stages, comfy_nodes["FlashVideoRefinerSettings"].execute(stages[1], -1, 2.5).result[0]],
        "VAE": [submodule("nodes.native.vae").load_vae_native("vae"), object()],
        "CLIP": [submodule("nodes.native.clip").load_clip_native(None)],
        "CONDITIONING": [[[text, {}]] for text in texts] + [[], [[texts[0]]]],
        "VIDEO": [InputImpl.VideoFromComponents(clip)],
    }


def trouble_of_outputs(schema: Any, results: tuple[Any, ...]) -> str:
    """What is wrong with what a node gave; empty if nothing is."""
    for port, result in zip(schema.outputs, results, strict=True):
        kind = port.io_type
        if kind == "IMAGE" and not (result.ndim == 4 and result.shape[-1] == 3 and torch.isfinite(result).all()):
            return f"{port.id}: an IMAGE {list(result.shape)} that is none or not finite"
        if kind == "IMAGE" and not (result.min() >= 0 and result.max() <= 1):
            return f"{port.id}: an IMAGE from {result.min()} to {result.max()}"
        least = 0 if port.display_name == "alpha" else 1e-9  # an opaque clip's alpha is empty
        if kind == "MASK" and not (result.ndim == 3 and result.min() >= 0 and least <= result.max() <= 1):
            return f"{port.id}: a MASK {list(result.shape)} that marks nothing or leaves 0 to 1"
        if kind == "LATENT" and not torch.isfinite(result["samples"]).all():
            return f"{port.id}: a LATENT that is not finite"
        if kind == "SIGMAS" and not (torch.isfinite(result).all() and (result.diff() <= 0).all()):
            return f"{port.id}: SIGMAS {result} that don't fall"
    return ""


def trouble_of_words(message: str) -> str:
    """What is wrong with a refusal; empty if nothing is."""
    named = message.startswith(("FlashVideo ", "Load FlashVideo ", "Empty FlashVideo "))
    if not named or PYTHON_WORDS.search(message) or len(message) > LONGEST_SENTENCE or message.count("\n") > 1:
        return f"no plain sentence: {message!r}"
    return ""


def trouble_of_call(node: Any, values: dict[str, Any]) -> str:
    """Call a node; what is wrong with what comes of it."""
    try:
        with torch.inference_mode():
            output = node.execute(**values)
    except ValueError as error:
        return trouble_of_words(str(error))
    except Exception as error:
        return f"{type(error).__name__}: {error} {traceback.format_exc().splitlines()[-3:]}"
    return trouble_of_outputs(node.define_schema(), output.result)


def test_random_calls_give_what_is_promised_or_one_plain_sentence(
    our_nodes: dict[str, Any], loaded: dict[str, list[Any]], pytestconfig: pytest.Config
) -> None:
    names, inputs, troubles = sorted(our_nodes), Inputs(loaded), []
    first, calls = pytestconfig.getoption("--first"), pytestconfig.getoption("--calls")
    for number in range(first, first + calls):
        pick = random.Random(number)
        (name,) = pick.choices(names, [COSTLY.get(each, 1) for each in names])
        ports = our_nodes[name].define_schema().inputs
        values = {port.id: inputs.value(port, pick) for port in ports if not port.optional or pick.random() < 0.5}
        if trouble := trouble_of_call(our_nodes[name], values):
            troubles.append(f"call {number}, {name}: {trouble}")
    assert not troubles, f"{len(troubles)} of {calls} calls:\n" + "\n".join(troubles[:20])
