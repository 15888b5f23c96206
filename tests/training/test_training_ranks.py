"""Training on several processes learns what one process learns, in the same files."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from on_ranks import Run, on_ranks
from small_models import write_models
from small_recipes import CROPS, LOOP, SMALL_VAE, VALIDATION, head
from torch import Tensor
from training_checks import RECIPES, STEPS, trained, write_config

from flashvideo.config import STAGE2
from flashvideo.dit import FlashVideoDiT
from flashvideo.training.loop.checkpointing import LAST, load_state
from flashvideo.training.loop.metrics import MetricsFile
from flashvideo.training.loop.optimise import trainable
from flashvideo.training.rows import Rows, rows_of_step
from flashvideo.training.tasks.lora import add_lora

TOLERANCE = 1e-6  # float32, of the largest weight and one: sums in another order round differently
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
KINDS = tuple(RECIPES)

Trained = dict[str, dict[str, Any]]


# Which rows


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize(("accumulate", "counts"), [(1, [5]), (1, [1]), (3, [4]), (8, [1]), (4, [2, 5, 1, 7])])
def test_every_row_of_a_step_is_learnt_once_and_each_process_has_as_many(
    accumulate: int, counts: list[int], size: int
) -> None:
    def count(index: int) -> int:
        return counts[index % len(counts)]

    shares = [rows_of_step(2, accumulate, count, rank, size) for rank in range(size)]
    learnt = Counter((rows.index, row) for share in shares for rows in share for row in range(rows.first, rows.end))
    batches = range(2 * accumulate, 3 * accumulate)
    assert learnt == Counter({(index, row): 1 for index in batches for row in range(count(index))})
    assert all(rows.count == count(rows.index) and len(rows) for share in shares for rows in share)
    if len(counts) == 1:
        sizes = [sum(map(len, share)) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_rows_take_their_part_of_what_is_drawn_for_the_batch() -> None:
    whole, rows = Rows.whole(4, 5), Rows(4, 1, 3, 5)
    drawn = whole.normal_like(torch.zeros(5, 3), torch.Generator().manual_seed(1))
    own = rows.normal_like(torch.zeros(2, 3), torch.Generator().manual_seed(1))
    assert torch.equal(own, drawn[1:3])
    assert (rows.of([0, 1, 2, 3, 4]), len(rows), rows.share) == ([1, 2], 2, 0.4)


# What is learnt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, and configs for three runs."""
    folder = tmp_path_factory.mktemp("trained")
    write_models(folder / "models")
    for run in ("one", "two", "three"):
        for kind in KINDS:
            write_config(kind, folder / "models", folder / run)
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> Trained:
    """What one process learns."""
    return trained(None, folder / "one", KINDS)


@pytest.fixture(scope="module")
def two(folder: Path) -> list[Trained]:
    """What two processes learn."""
    return on_ranks(2, folder, "training_checks:trained", folder / "two", KINDS)


def check(learnt: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Compare weights."""
    assert learnt.keys() == expected.keys()
    for name, weight in expected.items():
        off = float((learnt[name] - weight).abs().max() / (1 + weight.abs().max()))
        assert off <= tolerance, (name, off)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_learn_what_one_learns(kind: str, folder: Path, one: Trained, two: list[Trained]) -> None:
    check(two[0][kind]["weights"], one[kind]["weights"])
    check(two[1][kind]["weights"], two[0][kind]["weights"], 0)
    alone, together = (MetricsFile(folder / run / kind / "metrics.jsonl").rows() for run in ("one", "two"))
    assert [row.keys() for row in together] == [row.keys() for row in alone]
    for mine, theirs in zip(together, alone, strict=True):
        for name in mine.keys() - {"seconds"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


@pytest.mark.slow
def test_three_processes_learn_what_one_learns_and_take_turns_with_one(folder: Path, one: Trained) -> None:
    run = folder / "three"
    trained(None, run, ("text",), 1)
    learnt = on_ranks(3, folder / "models", "training_checks:take_turns", run, ("stage1", "stage2"), "text", "vae")
    learnt[0] |= trained(None, run, ("vae",), STEPS - 1, resume=True)
    for kind, expected in one.items():
        check(learnt[0][kind]["weights"], expected["weights"])
        assert load_state(run / kind / LAST)["step"] == STEPS
    for kind in ("stage1", "stage2", "text"):
        check(learnt[2][kind]["weights"], learnt[0][kind]["weights"], 0)


@pytest.mark.slow
def test_the_files_are_those_of_one_process(folder: Path, one: Trained, two: list[Trained]) -> None:
    """Latents to the bit, whichever process has made them, and checkpoints of the same tensors."""
    alone, together = (
        {path.relative_to(folder / run) for path in (folder / run).rglob("*.*")} for run in ("one", "two")
    )
    assert alone == together
    latents = [path for path in alone if path.suffix == ".safetensors"]
    assert len(latents) == 5  # drafts in two files, pairs, and what is held out of both
    for path in latents:
        assert (folder / "one" / path).read_bytes() == (folder / "two" / path).read_bytes(), path
    for kind in KINDS:
        states = [load_state(folder / run / kind / LAST) for run in ("one", "two")]
        assert outline(states[0]) == outline(states[1])


def outline(state: Any) -> Any:
    """A checkpoint with shapes for tensors, and without the run's own numbers."""
    if isinstance(state, dict):
        return {name: outline(value) for name, value in state.items() if name not in ("seconds", "best")}
    if isinstance(state, list | tuple):
        return [outline(value) for value in state]
    return (state.shape, state.dtype) if isinstance(state, Tensor) else state


# What it costs


def received(numbers: int, size: int) -> float:
    """Bytes of gradients that a process receives in a step: the other processes' shares of a sum, and their sums."""
    return 2 * (size - 1) / size * numbers * torch.float32.itemsize


@pytest.mark.slow
def test_a_step_receives_the_bytes_of_the_formula(two: list[Trained]) -> None:
    for learnt in two:
        for kind, found in learnt.items():
            numbers = sum(weight.numel() for weight in found["weights"].values())
            assert found["received"] == received(numbers, 2), kind


@pytest.fixture(scope="module")
def learning() -> list[int]:
    """How many numbers learn in stage II: with LoRA of the shipped configs' ranks, and all of them."""
    dits = [FlashVideoDiT(STAGE2, device="meta") for _ in range(3)]
    for dit, rank in zip(dits, (64, 128), strict=False):
        add_lora(dit, rank, 1)
    return [sum(weight.numel() for weight in trainable(dit).values()) for dit in dits]


def test_the_documented_costs_follow_from_the_formula(learning: list[int]) -> None:
    text, batches = DOCUMENT.read_text(encoding="utf-8"), 8  # of one row, as in the shipped configs
    rows = []
    for size in range(2, 17):
        shares = [rows_of_step(0, batches, lambda _: 1, rank, size) for rank in range(size)]
        most = max(map(len, shares))
        moved = " | ".join(f"{received(numbers, size) / 1e9:.2f}" for numbers in learning)
        rows.append(f"| {size} | {most} | {batches / (size * most):.0%} | {moved} |".replace("%", " %"))
    missing = [row for row in rows if row not in text]
    assert not missing, "\n".join(missing)


# What ends it

ENDLESS = LOOP.replace("steps = 3", "steps = 100000").replace("validate_every = 3", "validate_every = 100")
CONFIG = f"{SMALL_VAE}{ENDLESS}[loss]{CROPS}{VALIDATION}".replace("clips = 2", "clips = 3")


@pytest.mark.slow
def test_a_killed_process_ends_all_with_one_sentence_and_others_resume_and_stop(tmp_path: Path) -> None:
    config, run = tmp_path / "vae.toml", tmp_path / "run"
    config.write_text(head(run) + CONFIG)
    words = ("train", "vae", "--config", config, "--device", "cpu")
    three = Run(tmp_path, 3, *words)
    three.wait_for(lambda _: (run / LAST).is_file())
    three.processes[2].kill()
    assert three.wait() == [1, 1, -signal.SIGKILL]
    [sentence] = [line for line in three.sentences() if "has ended" in line]  # PyTorch adds warnings of its own
    step = load_state(run / LAST)["step"]
    kept = f"{run / LAST} holds step {step}: --resume continues from there."
    assert sentence == f"The run has ended because one of its processes did. {kept}"
    assert "Traceback" not in three.error.read_text()
    assert not list(tmp_path.rglob("*.part"))

    two = Run(tmp_path, 2, *words, "--resume")
    two.wait_for(lambda _: load_state(run / LAST)["step"] > step)
    for process in two.processes:
        os.kill(process.pid, signal.SIGINT)
    assert two.wait() == [128 + signal.SIGINT] * 2
    stopped = load_state(run / LAST)["step"]
    assert two.output.read_text() == f"{run}: step {stopped} of 100000; --resume continues\n"
    assert "ended" not in two.error.read_text() and "Traceback" not in two.error.read_text()
    rows = [row["step"] for row in MetricsFile(run / "metrics.jsonl").rows()]
    assert rows[-1] == stopped and len(set(rows)) >= stopped


@pytest.mark.slow
def test_only_single_networks_train_on_several_processes(tmp_path: Path) -> None:
    run = Run(tmp_path, 2, "train", "nano", "--device", "cpu")
    assert 1 in run.wait()
    assert run.sentences() == ["train nano runs in one process: start it without torchrun."]
