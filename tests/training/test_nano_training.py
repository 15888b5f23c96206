"""What builds FlashVideo-Nano: the optimiser, pieces of scenes, its judged prompts, and the chain of trainings."""

from __future__ import annotations

import copy
import filecmp
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small_libraries import counted, name_of, write_library
from small_recipes import VAE, head, write_nano_recipes
from torch import nn

from flashvideo.checkpoints import load_dit, load_vae
from flashvideo.commands.main import main
from flashvideo.nano import NANO_PARTS
from flashvideo.training import nano as nano_training
from flashvideo.training.config import LoopSettings
from flashvideo.training.data.latents import ClipSettings
from flashvideo.training.errors import TrainingError
from flashvideo.training.loop.optimise import (
    NEWTON_SCHULZ,
    NEWTON_SCHULZ_ROUNDS,
    Together,
    load_optimiser,
    make_optimiser,
    orthogonal,
)
from flashvideo.training.scenes.captions import caption, parse_prompt
from flashvideo.training.scenes.prompts import HELD_OUT_PROMPTS, judge_prompts
from flashvideo.training.scenes.stream import SceneStream
from flashvideo.training.scenes.vocabulary import HELD_OUT, contrasts
from flashvideo.training.tasks.latent_preview import fit_preview

# Muon


@pytest.mark.parametrize("shape", [(24, 24), (16, 90), (90, 16)])
def test_muons_updates_are_nearly_orthogonal(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(1))))
    assert values.min() > 0.5  # the iteration aims at 0.7 to 1.2; the smallest values of a square lag behind
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(24, 24), (16, 900), (90, 16)])
def test_muons_rounds_on_the_short_side_are_newton_schulz(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    matrix[:3] *= 1e-3  # directions that count little
    x = matrix / matrix.norm()
    for _ in range(NEWTON_SCHULZ_ROUNDS):
        a, b, c = NEWTON_SCHULZ
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    torch.testing.assert_close(orthogonal(matrix), x, rtol=1e-3, atol=1e-4)


def test_muon_takes_kernels_and_matrices_and_leaves_the_rest_to_adamw() -> None:
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(50, 32),
            "hidden": nn.Conv3d(16, 32, 3),
            "norm": nn.GroupNorm(4, 32),
            "last": nn.Linear(32, 3),
        }
    )
    optimiser = make_optimiser(model, LoopSettings(steps=1, learning_rate=1e-3, optimiser="muon"))
    assert isinstance(optimiser, Together)
    muon, adamw = ([p for group in part.param_groups for p in group["params"]] for part in optimiser.parts)
    assert [id(p) for p in muon] == [id(model["hidden"].weight)]
    assert len(adamw) == len(list(model.parameters())) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_goes_on_where_it_was(dtype: torch.dtype) -> None:
    """Its momenta stay in float32 beside weights of any data type."""
    settings = LoopSettings(steps=1, learning_rate=1e-2, optimiser="muon")
    gradients = torch.randn(4, 20, 20, generator=torch.Generator().manual_seed(1)).to(dtype)

    def step(optimiser: Together, model: nn.Module, gradient: torch.Tensor) -> None:
        model.weight.grad = gradient
        optimiser.step()

    torch.manual_seed(2)
    straight = nn.Linear(20, 20, bias=False, dtype=dtype)
    optimiser = make_optimiser(straight, settings)
    for gradient in gradients[:2]:
        step(optimiser, straight, gradient)
    resumed, state = copy.deepcopy(straight), copy.deepcopy(optimiser.state_dict())
    after = make_optimiser(resumed, settings)
    after.load_state_dict(state)
    for gradient in gradients[2:]:
        step(optimiser, straight, gradient)
        step(after, resumed, gradient)
    assert torch.equal(straight.weight, resumed.weight)
    assert {each["momentum"].dtype for each in after.parts[0].state.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_changed_config_counts_when_training_goes_on(name: str) -> None:
    """The moments come from the checkpoint, the settings from the config."""
    model = nn.Linear(20, 20)
    before, after = (
        make_optimiser(model, LoopSettings(steps=1, learning_rate=1e-2, optimiser=name, weight_decay=decay, beta2=beta))
        for decay, beta in ((0.01, 0.99), (0.5, 0.9))
    )
    load_optimiser(after, copy.deepcopy(before.state_dict()))
    assert {group["weight_decay"] for group in after.param_groups} == {0.5, 0.0}
    assert {group["betas"][1] for group in after.param_groups if "betas" in group} == {0.9}


def test_both_optimisers_learn_a_linear_map() -> None:
    target, x = torch.eye(20) * 2, torch.randn(64, 20, generator=torch.Generator().manual_seed(2))
    for name in ("adamw", "muon"):
        torch.manual_seed(3)
        model = nn.Linear(20, 20)
        optimiser = make_optimiser(model, LoopSettings(steps=1, learning_rate=3e-2, optimiser=name))
        losses = []
        for _ in range(150):
            loss = (model(x) - x @ target).square().mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 20, name


# Data


def test_a_piece_of_a_scene_is_cut_from_it_and_keeps_its_caption() -> None:
    pieces = ClipSettings(height=16, width=32, frames=5, clips=4, scene=(32, 64)).open("train", seed=3)
    whole, text = SceneStream("train", 32, 64, 5, 3).sample(1)
    piece, told = pieces.sample(1)
    assert told == text
    assert piece.shape == (3, 5, 16, 32)
    assert (whole.unfold(2, 16, 1).unfold(3, 32, 1) == piece[:, :, None, None]).all(dim=(-1, -2)).all(dim=(0, 1)).any()
    assert torch.equal(pieces.sample(1)[0], piece)


def test_a_piece_larger_than_its_scene_is_refused() -> None:
    with pytest.raises(TrainingError, match="32x16 doesn't fit a scene of 24x64"):
        ClipSettings(height=16, width=32, frames=5, clips=4, scene=(64, 24)).open("train", seed=3)


# The judged prompts


def test_the_ten_prompts_are_about_combinations_that_training_never_sees() -> None:
    assert len(set(HELD_OUT_PROMPTS)) == 10
    for prompt in HELD_OUT_PROMPTS:
        wanted = parse_prompt(prompt)
        assert (wanted["colour"], wanted["shape"], wanted["direction"]) in HELD_OUT
        behind = prompt.split("plain ")[-1].split()[0] if wanted["background"] == "plain" else ""
        assert contrasts(wanted["colour"], wanted["background"], behind), prompt


def test_right_videos_follow_their_prompts_and_exchanged_ones_do_not() -> None:
    stream = SceneStream("test", 64, 112, 17, 5)
    alone = (index for index in range(60) if len(stream.scene(index).subjects) == 1)
    scenes = list({stream.scene(index).subjects[0].triple: index for index in alone}.values())[:6]
    prompts = [caption(stream.scene(index), index) for index in scenes]
    videos = [stream.sample(index)[0] for index in scenes]
    assert all(verdict.follows for verdict in judge_prompts(prompts, videos))
    wrong = judge_prompts(prompts, videos[1:] + videos[:1])
    assert not any(verdict.follows for verdict in wrong)
    assert "not " in str(wrong[0])


def test_a_prompt_in_other_words_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="names no colour, shape and direction"):
        judge_prompts(["a fox"], [torch.zeros(3, 5, 16, 16)])


# The chain


def test_each_training_begins_with_what_those_before_it_made() -> None:
    """A round's chains run at once, so none may need another's."""
    made: set[str] = set()
    for chains in (*nano_training.ROUNDS, *nano_training.FOOTAGE_ROUNDS):
        before, now = set(made), set()
        for chain in chains:
            own = set(before)
            for part in chain:
                text = (nano_training.CONFIGS / f"{part.name}.toml").read_text(encoding="utf-8")
                needed = set(re.findall(r'"(runs/nano/[^"]+\.safetensors)"', text))
                assert needed <= own, part.name
                assert f'out = "runs/nano/{part.name}"' in text
                own.add(f"runs/nano/{part.name}/{part.file}")
            now |= own
        made |= now
    files = {**nano_training.DRAWN_FILES, **nano_training.FOOTAGE_FILES}
    assert {f"runs/nano/{part.name}/{part.file}" for part in files.values()} <= made
    assert {Path(name).stem for name in files} == set(NANO_PARTS)


@pytest.fixture
def train_nano(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`train nano` on ten recipes that end in seconds; returns its exit code."""
    monkeypatch.setattr(nano_training, "POLL_SECONDS", 0.05)
    configs = tmp_path / "configs"
    write_nano_recipes(configs, tmp_path / "runs", tmp_path / "fetched")
    fixed = ("--config", configs, "--export", tmp_path / "weights", "--tokenizer", tokenizer, "--device", "cpu")

    def run(*options: str) -> int:
        return main(["train", "nano", *map(str, fixed), *options])

    return run


@pytest.mark.slow
def test_all_of_nano_is_trained_in_pieces_and_then_there_is_nothing_left_to_do(
    train_nano: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    runs, weights = tmp_path / "runs", tmp_path / "weights"
    assert train_nano("--minutes", "0") == 0
    assert "the same command resumes the training" in capsys.readouterr().out
    assert [path.name for path in runs.iterdir()] == ["text"]
    assert train_nano() == 0
    assert f"{weights}: FlashVideo-Nano is complete" in capsys.readouterr().out
    assert sorted(path.name for path in weights.iterdir()) == sorted(nano_training.DRAWN_FILES)
    assert filecmp.cmp(weights / "vae.safetensors", runs / "vae_decoder" / "vae.safetensors", shallow=False)
    assert not filecmp.cmp(weights / "vae.safetensors", runs / "vae" / "vae.safetensors", shallow=False)
    assert load_dit(weights / "stage2.safetensors", stage=2).config.stage == 2
    assert "stage1.safetensors: step 3" in (runs / "stage1" / nano_training.LOG).read_text()
    ends = {path: path.stat().st_mtime_ns for path in runs.rglob("*.*")}
    assert train_nano() == 0
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.*")} == ends

    refiner = runs / "stage2_calm" / "stage2.safetensors"
    assert filecmp.cmp(weights / "stage2.safetensors", refiner, shallow=False)
    assert not filecmp.cmp(refiner, runs / "stage2" / "stage2.safetensors", shallow=False)
    refiner.unlink()  # an export that a crash left out
    assert train_nano() == 0
    assert load_dit(refiner, stage=2).config.stage == 2

    assert train_nano("--footage") == 1
    assert "fetched holds no clips yet. Fetch some: python -m flashvideo train fetch" in capsys.readouterr().err
    names = {name_of(split, "clip", ".mp4"): counted(40) for split in ("train", "validation")}
    write_library(tmp_path / "fetched", names)
    ends = {path: path.stat().st_mtime_ns for path in runs.rglob("*.*")}
    assert train_nano("--footage") == 0
    assert sorted(path.name for path in weights.iterdir()) == sorted(
        [*nano_training.DRAWN_FILES, *nano_training.FOOTAGE_FILES]
    )
    for name, made in (("vae", "vae_footage_decoder/vae"), ("stage2", "stage2_footage_refined/stage2")):
        assert filecmp.cmp(weights / f"footage_{name}.safetensors", runs / f"{made}.safetensors", shallow=False)
    assert load_vae(weights / "footage_vae.safetensors").config.base_channels == 16
    assert {path: path.stat().st_mtime_ns for path in ends} == ends  # the drawn ones stay
    first, second = (load_file(runs / name / "vae.safetensors") for name in ("vae_footage", "vae_footage_decoder"))
    assert {name.split(".")[0] for name in first if not torch.equal(first[name], second[name])} == {"decoder"}


@pytest.mark.slow
def test_a_training_that_fails_is_named_and_ends_the_whole(
    train_nano: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = tmp_path / "configs" / "vae_decoder.toml"
    config.write_text(config.read_text().replace("render = [16, 24]", "render = [8, 24]"))
    assert train_nano() == 1
    told = capsys.readouterr().err
    chain = (nano_training.DECODER, nano_training.STAGE2, nano_training.CALM)
    assert f"The training of {', then '.join(part.what for part in chain)}, ended:" in told
    assert not (tmp_path / "weights").exists()
    assert (tmp_path / "runs" / "vae" / "vae.safetensors").is_file()  # what was done stays


def test_only_some_of_nanos_trainings(
    train_nano: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train_nano("--only", "text,refiner") == 1
    named = "text, vae, vae_decoder, stage1, stage2, stage2_calm, vae_footage, stage2_footage, vae_footage_decoder"
    assert f"--only takes {named}, stage2_footage_refined; got refiner." in capsys.readouterr().err
    assert train_nano("--only", "text", "--footage") == 1
    assert "--only names the trainings already, such as vae_footage" in capsys.readouterr().err
    assert train_nano("--only", "vae") == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["vae"]
    for option in (["--only", "vae"], ["--footage"]):
        assert main(["train", "vae", "--config", str(tmp_path / "configs" / "vae.toml"), *option]) == 1
        assert f"{option[0]} is for train nano" in capsys.readouterr().err
    for option in ("--steps=5", f"--out={tmp_path / 'elsewhere'}"):
        assert train_nano("--only", "vae", option) == 1
        assert option.split("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()


WAITS = """
import pathlib, signal, sys, time
def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    time.sleep(0.5)  # the step at hand
    pathlib.Path(sys.argv[1]).write_text("stopped")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
pathlib.Path(sys.argv[1]).write_text("runs")
time.sleep(3600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without asking it")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_ends_the_whole_ends_both_trainings_and_each_saves(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is told once: the second time it would end at once."""
    monkeypatch.setattr(nano_training, "POLL_SECONDS", 0.05)

    class Opener:
        def settings(self, part: nano_training.Part) -> SimpleNamespace:
            return SimpleNamespace(out=tmp_path / part.name, loop=SimpleNamespace(steps=5))

    def command(parts: Sequence[nano_training.Part], minutes: float | None) -> list[str]:
        marks = [tmp_path / name for name in ("one", "two")]
        mark = marks[parts[0] is nano_training.DECODER]
        return [sys.executable, "-c", WAITS, str(mark)]

    def end_when_both_run() -> None:
        while not all((tmp_path / name).is_file() for name in ("one", "two")):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=end_when_both_run, daemon=True).start()
    assert nano_training._side_by_side(nano_training.ROUNDS[-1], Opener(), None, command) == number
    assert [(tmp_path / name).read_text() for name in ("one", "two")] == ["stopped", "stopped"]


def train_and_export(folder: Path, first_lines: str = "") -> dict[str, torch.Tensor]:
    """Train a VAE in folder/run, and export it to folder/export; returns its weights."""
    config = folder / "vae.toml"
    config.write_text(head(folder / "run") + first_lines + VAE)
    command = ["train", "vae", "--config", str(config), "--device", "cpu"]
    assert main(command) == 0
    assert main([*command, "--export", str(folder / "export")]) == 0
    return load_file(folder / "export" / "vae.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of a whole VAE that has learnt, and its weights."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, train_and_export(folder)


@pytest.mark.parametrize("start", ["run", "export/vae.safetensors"])
def test_a_decoder_that_learns_alone_leaves_the_latents_as_they_are(
    trained: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, start: str
) -> None:
    """It may start from a run or from weights that were exported."""
    folder, weights = trained
    alone = f'start = "{(folder / start).as_posix()}"\ndecoder_only = true\nlatent_noise = 0.1\n'
    files = [weights, train_and_export(tmp_path, alone)]
    encoder = [name for name in files[0] if name.startswith("encoder.")]
    assert encoder
    assert all(torch.equal(files[0][name], files[1][name]) for name in encoder)
    assert not all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_noise_on_latents_is_for_a_decoder_that_learns_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = tmp_path / "vae.toml"
    config.write_text(head(tmp_path / "run") + "latent_noise = 0.1\n" + VAE)
    assert main(["train", "vae", "--config", str(config), "--device", "cpu"]) == 1
    assert "add decoder_only = true" in capsys.readouterr().err


def test_the_preview_finds_the_map_from_latents_to_colours() -> None:
    generator = torch.Generator().manual_seed(4)
    factors = torch.randn(17, 3, generator=generator) * 0.1
    latents = [torch.randn(16, 3, 4, 5, generator=generator) for _ in range(2)]
    videos = []
    for latent in latents:
        colours = torch.einsum("cthw,ck->kthw", latent, factors[:-1]) + factors[-1, :, None, None, None]
        frames = torch.cat((colours[:, :1], colours[:, 1:].repeat_interleave(4, dim=1)), dim=1)
        videos.append(frames.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3))
    torch.testing.assert_close(fit_preview(latents, videos), factors, atol=1e-5, rtol=0)


def test_a_single_network_needs_a_config(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "vae"]) == 1
    assert "train vae needs a config: add --config FILE." in capsys.readouterr().err
