"""bfloat16 is used in training on a processor that has instructions for it, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flashvideo.training.config import LoopSettings
from flashvideo.training.loop import precision
from flashvideo.training.loop.trainer import Trainer
from flashvideo.training.rows import Batches, Rows


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    precision.cpu_has_bf16.cache_clear()
    yield
    precision.cpu_has_bf16.cache_clear()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, False),
    ],
)
def test_the_processor_tells(flags: dict, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    assert precision.cpu_has_bf16() == expected


@pytest.mark.parametrize(("seconds", "expected"), [(0.4, True), (0.95, False), (30.0, False)])
def test_without_flags_it_is_timed(seconds: float, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(precision, "_seconds", {torch.bfloat16: seconds, torch.float32: 1.0}.get)
    assert precision.cpu_has_bf16() == expected


def test_both_data_types_can_be_timed() -> None:
    assert min(precision._seconds(dtype) for dtype in (torch.bfloat16, torch.float32)) > 0


class Nothing(Batches):
    """Batches of one row, with nothing in it."""

    def count(self, _index: int) -> int:
        return 1

    def part(self, _rows: Rows) -> int:
        return 0


@pytest.mark.parametrize(
    ("setting", "processor", "used"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_training_uses_it_if_it_helps_and_is_not_forbidden(
    setting: bool, processor: bool, used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"avx512_bf16": processor}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    model = nn.Linear(2, 2)
    seen = []

    def loss(_batch: object, _rows: Rows) -> dict[str, torch.Tensor]:
        out = model(torch.ones(1, 2))
        seen.append(out.dtype)
        return {"loss": out.float().square().sum()}

    task = SimpleNamespace(model=model, data=Nothing(), description={}, loss=loss, prepare=lambda: None)
    settings = LoopSettings(steps=2, learning_rate=1e-3, bf16_cpu=setting, validate_every=9, checkpoint_every=9)
    trainer = Trainer(task, settings, tmp_path)
    trainer._optimise(trainer._batches(1))
    assert seen == [torch.bfloat16 if used else torch.float32]
