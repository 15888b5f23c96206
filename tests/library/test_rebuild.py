"""What builds FlashVideo-Nano: the optimiser, pieces of scenes, its judged prompts, and the chain of trainings."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flashvideo.__main__ import main
from flashvideo.training import rebuild
from flashvideo.training.captions import caption, parse_prompt
from flashvideo.training.config import LoopSettings, build, load_toml
from flashvideo.training.errors import TrainingError
from flashvideo.training.latents import ClipSettings
from flashvideo.training.optimise import Together, make_optimiser, orthogonal
from flashvideo.training.prompts import HELD_OUT_PROMPTS, judge_prompts
from flashvideo.training.scenes import HELD_OUT, SceneStream
from flashvideo.training.vae import VAESettings, VAETask, fit_preview
from flashvideo.training.vocabulary import contrasts

# Muon


@pytest.mark.parametrize("shape", [(24, 24), (16, 90), (90, 16)])
def test_muons_updates_are_nearly_orthogonal(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(1))))
    assert values.min() > 0.5  # the iteration aims at 0.7 to 1.2; the smallest values of a square lag behind
    assert values.max() < 1.3


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

VAE = """
seed = 1
out = "{out}"
[model]
base_channels = 8
channel_multipliers = [1, 1, 1, 1]
encoder_blocks = 1
decoder_blocks = 1
[loop]
steps = 4
learning_rate = 1e-3
validate_every = 2
checkpoint_every = 1
[loss]
[[crops]]
render = [16, 24]
size = [16, 16]
frames = 1
clips = 2
[[validation]]
name = "small"
size = [16, 24]
frames = 1
clips = 2
"""


@pytest.fixture
def two_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], tuple[Any, Any]]:
    """The chain with two tiny VAEs instead of the four networks; they differ in nothing but their folder."""
    parts = (rebuild.Part("first", "first", "", "one"), rebuild.Part("second", "second", "vae.safetensors", "two"))
    monkeypatch.setattr(rebuild, "PARTS", parts)
    opened = []

    def open_task(kind: str, _config: Path) -> tuple[Any, Any]:
        opened.append(kind)
        config = tmp_path / f"{kind}.toml"
        config.write_text(VAE.format(out=(tmp_path / kind).as_posix()))
        settings = build(VAESettings, load_toml(config), config.name)
        return settings, VAETask(settings, torch.device("cpu"))

    open_task.opened = opened
    return open_task


def test_the_chain_trains_exports_and_then_has_nothing_left_to_do(
    two_parts: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "models"
    assert rebuild.rebuild(two_parts, folder, None) is None
    assert (tmp_path / "second" / "last.pt").is_file()
    written = (folder / "vae.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert rebuild.rebuild(two_parts, folder, None) is None
    assert (folder / "vae.safetensors").stat().st_mtime_ns == written
    assert "complete" in capsys.readouterr().out


def test_a_stopped_chain_goes_on_where_it_was(two_parts: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    assert rebuild.rebuild(two_parts, folder, 0.0) is None
    assert two_parts.opened == ["first"]
    assert not folder.exists()
    assert rebuild.rebuild(two_parts, folder, None) is None
    assert (folder / "vae.safetensors").is_file()
    shutil.rmtree(folder)
    assert rebuild.rebuild(two_parts, folder, None) is None  # exports again without training again
    assert (folder / "vae.safetensors").is_file()


@pytest.mark.parametrize("start", ["first", "first-export/vae.safetensors"])
def test_a_decoder_that_learns_alone_leaves_the_latents_as_they_are(tmp_path: Path, start: str) -> None:
    """It may start from a run or from weights that were exported."""
    alone = f'start = "{(tmp_path / start).as_posix()}"\ndecoder_only = true\nlatent_noise = 0.1\n'
    files = []
    for name, first_lines in (("first", ""), ("second", alone)):
        config, folder = tmp_path / f"{name}.toml", tmp_path / f"{name}-export"
        config.write_text(first_lines + VAE.format(out=(tmp_path / name).as_posix()))
        assert main(["train", "vae", "--config", str(config), "--device", "cpu"]) == 0
        assert main(["train", "vae", "--config", str(config), "--device", "cpu", "--export", str(folder)]) == 0
        files.append(load_file(folder / "vae.safetensors"))
    encoder = [name for name in files[0] if name.startswith("encoder.")]
    assert encoder
    assert all(torch.equal(files[0][name], files[1][name]) for name in encoder)
    assert not all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_noise_on_latents_is_for_a_decoder_that_learns_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = tmp_path / "vae.toml"
    config.write_text("latent_noise = 0.1\n" + VAE.format(out=(tmp_path / "run").as_posix()))
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
