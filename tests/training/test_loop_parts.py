"""What the training loop is made of: rates, running means, metrics, checkpoints and exported weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from flashvideo.training.config import LoopSettings
from flashvideo.training.errors import TrainingError
from flashvideo.training.loop.checkpointing import export_weights, load_state, save_state
from flashvideo.training.loop.metrics import MetricsFile, psnr, save_plot
from flashvideo.training.loop.optimise import RunningMean, learning_rate


def test_learning_rate_warms_up_and_follows_a_cosine() -> None:
    settings = LoopSettings(steps=110, learning_rate=2.0, warmup=10, final_rate=0.1)
    rates = [learning_rate(step, settings) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[60] == pytest.approx(2 * 0.55)  # half way between all and a tenth
    assert rates[110] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_running_mean_is_applied_and_taken_back() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    mean = RunningMean(layer, decay=0.5)
    nn.init.ones_(layer.weight)
    mean.update(step=1000)
    with mean.applied():
        assert layer.weight.item() == 0.5
    assert layer.weight.item() == 1.0


def test_metrics_are_cut_where_a_run_goes_on_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        file.add(step, {"loss": 1 / step})
    with file.path.open("a") as tail:
        tail.write('{"step": 4, "lo')
    assert [row["step"] for row in file.rows()] == [1, 2, 3]
    file.truncate(2)
    assert file.rows() == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    save_plot(tmp_path / "plot.png", file.rows())
    assert Image.open(tmp_path / "plot.png").size == (360, 150)


def test_psnr_of_a_known_error() -> None:
    target = torch.zeros(3, 1, 4, 4)
    assert psnr(target + 0.2, target) == pytest.approx(20)  # the range is 2
    assert psnr(target, target) == math.inf


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(path, {"step": 1})
    with pytest.raises(AttributeError):
        save_state(path, {"step": (lambda: None)})  # can't be pickled
    assert load_state(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_large_weights_may_be_written_in_8_bits(tmp_path: Path) -> None:
    """To the nearest number of float8; what it can't hold is refused, and the file before stays."""
    large = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    state, path = {"large": large, "small": torch.ones(8)}, tmp_path / "vae.safetensors"
    export_weights(path, state, {"flashvideo.stage": "vae"}, eight_bits=True)
    written = load_file(path)
    assert {name: tensor.dtype for name, tensor in written.items()} == {
        "large": torch.float8_e4m3fn,
        "small": torch.float16,
    }
    assert ((written["large"].float() - large).abs() <= large.abs() / 16 + 2**-10).all()
    with pytest.raises(TrainingError, match="large doesn't fit"):
        export_weights(path, {**state, "large": 1000 * large}, {}, eight_bits=True)
    assert torch.equal(load_file(path)["large"].float(), written["large"].float())
    export_weights(path, state, {})
    assert load_file(path)["large"].dtype == torch.float16
