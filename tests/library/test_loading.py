"""The text encoder of a command: loaded once for many prompts where main memory has room for it."""

from __future__ import annotations

import pytest
import torch

from flashvideo.commands import loading
from flashvideo.commands.chosen import ModelOptions
from flashvideo.config import NANO_TEXT_ENCODER
from flashvideo.errors import CommandError

pytest.importorskip("tokenizers")
PROMPTS = ("a red circle", "a blue square", "a red circle")
WIDTH = NANO_TEXT_ENCODER.d_model


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The encoders that were loaded."""
    found: list[object] = []
    load = loading.load_encoder
    monkeypatch.setattr(loading, "load_encoder", lambda *given: found.append(load(*given)) or found[-1])
    return found


@pytest.fixture
def models() -> ModelOptions:
    """FlashVideo-Nano's."""
    return ModelOptions(None, None, None, "", None, "cpu", None)


def test_a_kept_encoder_is_loaded_once_and_gives_the_same(models: ModelOptions, loads: list[object]) -> None:
    cpu = torch.device("cpu")
    fresh = [loading.TextEncoder(models, cpu)(prompt, WIDTH) for prompt in PROMPTS]
    assert len(loads) == len(PROMPTS)
    kept = loading.TextEncoder(models, cpu, keep=True)
    assert all(torch.equal(kept(prompt, WIDTH), before) for prompt, before in zip(PROMPTS, fresh, strict=True))
    assert len(loads) == len(PROMPTS) + 1
    assert not torch.equal(fresh[0], fresh[1])


def test_too_little_memory_keeps_nothing(
    models: ModelOptions, loads: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "main_memory", lambda: 1e6)
    text = loading.TextEncoder(models, torch.device("cpu"), keep=True)
    for prompt in PROMPTS:
        text(prompt, WIDTH)
    assert len(loads) == len(PROMPTS)


def test_another_models_encoder_is_refused(models: ModelOptions) -> None:
    with pytest.raises(CommandError, match="they don't belong together"):
        loading.TextEncoder(models, torch.device("cpu"))("a hill", WIDTH + 1)
