"""The training loop: resumes to the bit, loses nothing when something breaks, and says what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import finished, wait_until
from small_recipes import CROPS, SMALL_VAE, VALIDATION
from torch import Tensor

from flashvideo.atomic_files import in_use
from flashvideo.commands.main import main
from flashvideo.training.config import build, load_toml
from flashvideo.training.loop.checkpointing import LAST, load_state
from flashvideo.training.rows import Rows
from flashvideo.training.tasks.stage1 import Stage1Settings
from flashvideo.training.tasks.stage2 import Stage2Settings
from flashvideo.training.tasks.text import TextSettings
from flashvideo.training.tasks.vae import VAESettings, VAETask

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "flashvideo" / "training" / "configs"
SETTINGS = {"vae": VAESettings, "text": TextSettings, "stage1": Stage1Settings, "stage2": Stage2Settings}

VAE = f"""
seed = 1
out = "{{out}}"
{SMALL_VAE}
[loop]
bf16_cpu = false
steps = {{steps}}
learning_rate = {{rate}}
optimiser = "{{optimiser}}"
warmup = 3
accumulate = 2
ema = 0.9
log_every = 1
validate_every = 5
checkpoint_every = {{checkpoint_every}}
[loss]
{CROPS.replace("clips = 2", "clips = 1")}
[[crops]]
render = [16, 24]
size = [8, 16]
frames = 1
clips = 1
crops = 2
{VALIDATION.replace("clips = 2", "clips = 1")}"""


@pytest.fixture
def vae_config(tmp_path: Path) -> Callable[..., Path]:
    """Writes a config of a tiny VAE whose run is tmp_path/run; returns its path."""

    def write(steps: int = 40, rate: float = 1e-3, checkpoint_every: int = 10, optimiser: str = "adamw") -> Path:
        path, out = tmp_path / "vae.toml", (tmp_path / "run").as_posix()
        path.write_text(
            VAE.format(out=out, steps=steps, rate=rate, checkpoint_every=checkpoint_every, optimiser=optimiser)
        )
        return path

    return write


def train(kind: str, config: Path, *options: str) -> int:
    """Run the command line."""
    return main(["train", kind, "--config", str(config), "--device", "cpu", *options])


def start(config: Path, *program: str) -> subprocess.Popen:
    """Run the command line, or a program that does, in a process of its own."""
    options = ["train", "vae", "--config", str(config), "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, *(program or ("-m", "flashvideo")), *options],
        cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let this process write no file larger than `size` bytes."""
    import resource  # not there on Windows

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def at_batch(number: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something when batch `number` is learnt from; two make a step."""
    loss = VAETask.loss

    def noted(task: VAETask, batch: Tensor, rows: Rows) -> dict[str, Tensor]:
        if rows.index == number:
            action()
        return loss(task, batch, rows)

    monkeypatch.setattr(VAETask, "loss", noted)


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Places where two states differ in any bit; the seconds of a run are its own."""
    if isinstance(one, dict):
        keys = [key for key in {*one, *other} if key != "seconds"]
        return [place for key in keys for place in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        pairs = enumerate(zip(one, other, strict=True))
        return [place for i, pair in pairs for place in differences(*pair, f"{where}.{i}")]
    same = torch.equal(one, other) if isinstance(one, Tensor) else one == other
    return [] if same else [where]


def optimised(state: dict[str, Any]) -> int:
    """How many weights an optimiser's state is about; Muon's comes beside AdamW's."""
    parts = [state] if "state" in state else state.values()
    return sum(len(part["state"]) for part in parts)


def metrics(folder: Path) -> list[dict[str, float]]:
    """Metrics of a run, but for the time they took."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# Resuming


@pytest.mark.slow
@pytest.mark.parametrize(("optimiser", "half"), [("adamw", 6), ("muon", 3)])
def test_six_steps_and_six_more_are_twelve_to_the_bit(
    vae_config: Callable, tmp_path: Path, optimiser: str, half: int
) -> None:
    """Stopped between two validations and two checkpoints. With Muon, that its momenta go on is all that differs."""
    config, straight = vae_config(steps=2 * half, checkpoint_every=4, optimiser=optimiser), tmp_path / "straight"
    assert train("vae", config, "--out", str(straight)) == 0
    assert train("vae", config, "--steps", str(half)) == 0
    assert train("vae", config, "--resume", "--steps", str(half)) == 0
    states = [load_state(folder / LAST) for folder in (tmp_path / "run", straight)]
    assert states[0]["step"] == 2 * half
    assert optimised(states[0]["optimiser"]) == len(states[0]["model"]) == len(states[0]["mean"])
    assert differences(*states) == []
    assert metrics(tmp_path / "run") == metrics(straight)


# Runs the command as `python -m flashvideo` does, and is killed in the middle of its fourth step, of two batches.
KILLED = """
import os, signal, sys
from flashvideo.commands.main import main
from flashvideo.training.tasks.vae import VAETask

loss = VAETask.loss
VAETask.loss = lambda *given: os.kill(os.getpid(), signal.SIGKILL) if given[-1].index == 7 else loss(*given)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_a_killed_run_goes_on_from_its_last_checkpoint_to_the_same_bits(vae_config: Callable, tmp_path: Path) -> None:
    config, straight, run = vae_config(steps=6, checkpoint_every=2), tmp_path / "straight", tmp_path / "run"
    process = start(config, "-c", KILLED)
    _, message = finished(process)
    assert process.returncode == -signal.SIGKILL, message
    assert load_state(run / LAST)["step"] == 2
    assert metrics(run)[-1]["step"] == 3  # has gone on since
    assert train("vae", config, "--resume") == 0
    assert train("vae", config, "--out", str(straight)) == 0
    assert differences(load_state(run / LAST), load_state(straight / LAST)) == []
    assert metrics(run) == metrics(straight)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_a_process_that_is_ended_saves_the_step_at_hand(vae_config: Callable, tmp_path: Path) -> None:
    last = tmp_path / "run" / LAST
    process = start(vae_config(steps=100_000, checkpoint_every=2))
    wait_until(last.is_file, process)
    process.send_signal(signal.SIGTERM)
    output, _ = finished(process)
    assert process.returncode == 128 + signal.SIGTERM
    step = load_state(last)["step"]
    assert f"step {step} of 100000; --resume continues" in output
    assert metrics(tmp_path / "run")[-1]["step"] == step  # the very last step, not the last multiple of two


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_the_step_at_hand(
    vae_config: Callable, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:  # fmt: skip
    at_batch(4, lambda: signal.raise_signal(number), monkeypatch)
    assert train("vae", vae_config(steps=100_000)) == 128 + number
    assert load_state(tmp_path / "run" / LAST)["step"] == 3
    assert "step 3 of 100000; --resume continues" in capsys.readouterr().out
    assert metrics(tmp_path / "run")[-1]["step"] == 3


def test_minutes_end_a_run_with_a_checkpoint(vae_config: Callable, tmp_path: Path) -> None:
    assert train("vae", vae_config(steps=100_000, checkpoint_every=100_000), "--minutes", "0.002") == 0
    assert load_state(tmp_path / "run" / LAST)["step"] >= 1


def test_a_finished_run_has_nothing_left_to_do(vae_config: Callable, tmp_path: Path) -> None:
    config = vae_config(steps=2)
    assert train("vae", config) == 0
    before = load_state(tmp_path / "run" / LAST)
    assert train("vae", config, "--resume") == 0
    assert differences(before, load_state(tmp_path / "run" / LAST)) == []


# What goes wrong


def test_a_broken_loss_stops_training_and_keeps_the_last_good_checkpoint(
    vae_config: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train("vae", vae_config(), "--steps", "2") == 0
    kept = load_state(tmp_path / "run" / LAST)
    assert train("vae", vae_config(rate=1e30), "--resume") == 1
    message = capsys.readouterr().err
    assert "training stopped. Lower the learning rate" in message
    assert "last.pt holds step 2: --resume continues from there." in message
    assert differences(kept, load_state(tmp_path / "run" / LAST)) == []
    assert all(tensor.isfinite().all() for tensor in kept["model"].values())
    assert train("vae", vae_config(), "--resume", "--steps", "1") == 0


@pytest.mark.skipif(sys.platform == "win32", reason="limits on files are POSIX's")
def test_a_full_disk_keeps_the_last_good_checkpoint(
    vae_config: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A limit on the size of files stands for the disk: writing fails in the same place, in the same way."""
    config, last = vae_config(checkpoint_every=4), tmp_path / "run" / LAST
    assert train("vae", config, "--steps", "2") == 0
    kept = last.read_bytes()
    with largest_file(len(kept) // 2):
        assert train("vae", config, "--resume") == 1
    message = capsys.readouterr().err
    assert "last.pt can't be written: the disk is full. The one written before is kept." in message
    assert f"{last} holds step 2: --resume continues from there." in message
    assert last.read_bytes() == kept
    assert not list(last.parent.glob("*.part"))


def test_a_run_is_never_overwritten(vae_config: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = vae_config()
    assert train("vae", config, "--steps", "1") == 0
    assert train("vae", config) == 1
    assert "holds a run already: add --resume" in capsys.readouterr().err
    assert load_state(tmp_path / "run" / LAST)["step"] == 1


def test_two_programs_never_train_in_one_folder(
    vae_config: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config, run = vae_config(), tmp_path / "run"
    assert train("vae", config, "--steps", "1") == 0
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 1.0}\n')  # the other one's, since its checkpoint
    before = {path: path.read_bytes() for path in run.rglob("*.*")}
    with in_use(run):
        assert train("vae", config, "--resume") == 1
        assert f"{run} is in use: another program is at work there." in capsys.readouterr().err
        assert train("vae", config) == 1
    assert {path: path.read_bytes() for path in before} == before
    assert train("vae", config, "--resume", "--steps", "1") == 0


def test_ctrl_c_before_the_first_step_says_what_is_kept(
    vae_config: Callable, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop's own answer to Ctrl+C begins with its first step; clips are made before."""
    monkeypatch.setattr(VAETask, "prepare", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert train("vae", vae_config()) == 128 + signal.SIGINT
    assert "Stored clips and checkpoints stay, and the same command resumes" in capsys.readouterr().err


def test_resuming_needs_a_whole_checkpoint_of_the_same_network(
    vae_config: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config, last = vae_config(), tmp_path / "run" / LAST
    assert train("vae", config, "--resume") == 1
    assert "no checkpoint to resume from; start without --resume" in capsys.readouterr().err
    assert train("vae", config, "--export", str(tmp_path)) == 1
    assert "best.pt doesn't exist yet" in capsys.readouterr().err
    assert train("vae", config, "--steps", "1") == 0
    config.write_text(config.read_text().replace("decoder_blocks = 1", "decoder_blocks = 2"))
    assert train("vae", config, "--resume") == 1
    assert "belongs to another network" in capsys.readouterr().err
    assert train("vae", vae_config(optimiser="muon"), "--resume") == 1
    assert "was trained by another optimiser than muon" in capsys.readouterr().err
    last.write_bytes(last.read_bytes()[:5000])
    assert train("vae", vae_config(), "--resume") == 1
    assert "last.pt is damaged" in capsys.readouterr().err
    torch.save([1, 2], last)
    assert train("vae", config, "--resume") == 1
    assert "no checkpoint of this version" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("warmup = 3", "warm_up = 3", "vae.toml loop: unknown setting 'warm_up'; there are steps, "),
        ("steps = 40", "", "vae.toml loop: the setting 'steps' is missing."),
        ("steps = 40", 'steps = "40"', "vae.toml loop steps must be of type int; got '40'."),
        ("steps = 40", "steps = 0", "[loop] steps must be above 0; got 0."),
        ("size = [16, 16]", "size = [16]", "vae.toml crops size must be a list of 2 values; got [16]."),
        ("steps = 40", "steps = = 40", "vae.toml is not a readable TOML file"),
    ],
)
def test_a_mistake_in_a_config_is_named(
    vae_config: Callable, capsys: pytest.CaptureFixture, before: str, after: str, message: str
) -> None:
    config = vae_config()
    config.write_text(config.read_text().replace(before, after))
    assert train("vae", config) == 1
    assert message in capsys.readouterr().err


def test_a_missing_config_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert train("vae", tmp_path / "none.toml") == 1
    assert "none.toml: there is no such config file." in capsys.readouterr().err


@pytest.mark.parametrize(
    "path",
    sorted([*CONFIGS.glob("nano/*.toml"), *CONFIGS.glob("full/*.toml")]),
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_the_shipped_configs_are_valid(path: Path) -> None:
    settings = build(SETTINGS[path.stem.split("_")[0]], load_toml(path), path.name)
    assert f"--config {path.relative_to(ROOT).as_posix()}" in path.read_text()
    assert settings.loop.steps > settings.loop.warmup
