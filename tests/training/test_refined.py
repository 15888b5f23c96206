"""A decoder that learns from what stage II makes of drafts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_recipes import VAE, head
from torch import Tensor

from flashvideo.checkpoints import load_dit, load_vae
from flashvideo.commands.main import main
from flashvideo.degradation import degrade_latent
from flashvideo.frames import TargetSize, resize, to_frames, to_video
from flashvideo.nano import NANO_FOLDER
from flashvideo.refiner.run import Networks, RefineSettings, refine_frames
from flashvideo.samplers import sample_stage2
from flashvideo.training.config import LoopSettings
from flashvideo.training.errors import TrainingError
from flashvideo.training.loop.metrics import psnr
from flashvideo.training.rows import Rows
from flashvideo.training.scenes.stream import SceneStream
from flashvideo.training.tasks import refined as refined_module
from flashvideo.training.tasks.refined import RefinedLatents, RefinedSettings
from flashvideo.training.tasks.vae import Crop, VAELossSettings, VAENumbers, VAESettings, VAETask, ValidationClip

NANO = RefinedSettings(
    share=0.25, stage2=str(NANO_FOLDER / "stage2.safetensors"), text=str(NANO_FOLDER / "text_encoder.safetensors")
)


@torch.no_grad()
def test_latents_are_those_of_a_refined_draft() -> None:
    """Their pictures differ from the refiner's by the noise that each has drawn, so as two seeds of the refiner do."""
    vae = load_vae(NANO_FOLDER / "vae.safetensors", dtype=torch.float32)
    dit = load_dit(NANO_FOLDER / "stage2.safetensors", dtype=torch.float32, stage=2)
    refined = RefinedLatents(NANO, 1, torch.device("cpu"))
    clips = torch.stack([SceneStream("train", 64, 96, 9, 5).sample(number)[0] for number in range(2)])
    latent = refined(vae.encode, clips, Rows.whole(0, 2))
    settings = RefineSettings(
        TargetSize("scale", scale=4.0), strength=60, steps=4, cfg=1.0, color_match="none", resample="bicubic"
    )
    networks = Networks(dit, vae, refined._context)
    for clip, made in zip(clips, latent, strict=True):
        draft = resize(to_frames(clip[None]), 16, 24, "area")
        seeds = [to_video(refine_frames(networks, draft, dataclasses.replace(settings, seed=seed))) for seed in (0, 1)]
        found = vae.decode(made[None])
        assert psnr(found, seeds[0]) == pytest.approx(psnr(seeds[1], seeds[0]), abs=1)
        assert psnr(found, seeds[0]) > psnr(found, clip[None]) + 3


@torch.no_grad()
def test_strengths_are_drawn_from_their_whole_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start and stage II are told the same one."""
    started, told = [], []

    def degrade(latent: Tensor, noise: Tensor, step: int) -> Tensor:
        started.append(step)
        return degrade_latent(latent, noise, step)

    def sample(*inputs: Any, degradation_step: int, **options: Any) -> Tensor:
        told.append(degradation_step)
        return sample_stage2(*inputs, degradation_step=degradation_step, **options)

    monkeypatch.setattr(refined_module, "degrade_latent", degrade)
    monkeypatch.setattr(refined_module, "sample_stage2", sample)
    vae = load_vae(NANO_FOLDER / "vae.safetensors", dtype=torch.float32)
    refined = RefinedLatents(dataclasses.replace(NANO, strengths=(100, 104), steps=1), 1, torch.device("cpu"))
    for number in range(40):
        refined(vae.encode, torch.zeros(1, 3, 1, 16, 16), Rows.whole(number, 1))
    assert started == told
    assert set(told) == set(range(100, 105))


def test_a_decoder_learns_from_drafts_alone_or_from_both_kinds(tmp_path: Path) -> None:
    """The encoder stays as it is, and so do the latents that stage II knows."""
    first = tmp_path / "first.toml"
    first.write_text(head(tmp_path / "first") + VAE)
    command = ["train", "vae", "--device", "cpu", "--config"]
    assert main([*command, str(first)]) == 0
    assert main([*command, str(first), "--export", str(tmp_path)]) == 0
    before = load_file(tmp_path / "vae.safetensors")
    files = "".join(f'{name} = "{Path(getattr(NANO, name)).as_posix()}"\n' for name in ("stage2", "text"))
    for share, kinds in ((1.0, {"drafts"}), (0.5, {"drafts", "whole"})):
        out = tmp_path / str(share)
        config, start = tmp_path / f"{share}.toml", tmp_path / "vae.safetensors"
        table = f"[refined]\nshare = {share}\ndetail_size = 9\nfactor = 2\nsteps = 1\n{files}"
        recipe = VAE.replace("steps = 3", "steps = 6").replace("size = [16, 24]", "size = [16, 32]")
        config.write_text(head(out, start=start) + f"decoder_only = true\n{table}{recipe}")
        assert main([*command, str(config)]) == 0
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found = {"drafts" if "drafts_reconstruction" in row else "whole" for row in rows if "loss" in row}
        assert found == kinds
        assert all(("kl" in row) != ("drafts_gradient" in row) for row in rows if "loss" in row)
        assert all("psnr_small_drafts" in row for row in rows if "score" in row)
        assert main([*command, str(config), "--export", str(out)]) == 0
        after = load_file(out / "vae.safetensors")
        changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"decoder"}
        config.write_text(config.read_text().replace("factor = 2", "factor = 2\nblend = 0.25"))
        assert main([*command, str(config), "--export", str(out)]) == 0
        blended = load_file(out / "vae.safetensors")
        for name in before:
            quarter = before[name].float().lerp(after[name].float(), 0.25)
            torch.testing.assert_close(blended[name].float(), quarter, rtol=2e-3, atol=1e-6)


def test_drafts_are_chosen_and_weighed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    crop = Crop((32, 32), (32, 32), 5, 2)
    settings = VAESettings(
        seed=1, out=tmp_path, model=VAENumbers.of(load_vae(NANO_FOLDER / "vae.safetensors").config),
        loop=LoopSettings(1, 1e-3), loss=VAELossSettings(), crops=(crop,),
        validation=(ValidationClip("real", (32, 32), 5, 1),), start=str(NANO_FOLDER / "vae.safetensors"),
        decoder_only=True, refined=NANO,
    )  # fmt: skip
    task = VAETask(settings, torch.device("cpu"))
    chosen = [task._refined.chosen(index) for index in range(1000)]
    assert sum(chosen) == pytest.approx(250, abs=45)  # three standard deviations
    index = chosen.index(True)
    rows = Rows.whole(index, 2)

    def losses(**changes: float) -> float:
        task.settings = dataclasses.replace(settings, refined=dataclasses.replace(NANO, **changes))
        return task.loss(task.data[index], rows)["loss"].item()

    with torch.no_grad():
        assert losses(weight=4.0) == pytest.approx(4 * losses(), rel=1e-5)
        assert losses(detail_size=9.0) < losses()


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: RefinedSettings(share=1.5), r"\[refined\] share must be 0 to 1; got 1.5"),
        (lambda: RefinedSettings(weight=0), r"\[refined\] weight must be above 0; got 0"),
        (lambda: RefinedSettings(blend=0), r"\[refined\] blend must be above 0, and at most 1; got 0"),
        (lambda: RefinedSettings(factor=0.5), r"\[refined\] factor must be 1 or more; got 0.5"),
        (
            lambda: RefinedSettings(strengths=(60, 1000)),
            r"\[refined\] strengths must be two of 0 to 999, the smaller first; got 60 and 1000",
        ),
        (lambda: RefinedSettings(strengths=(150, 60)), r"the smaller first; got 150 and 60"),
        (lambda: RefinedSettings(steps=0), r"\[refined\] steps must be 1 or more; got 0"),
        (lambda: RefinedSettings(detail_size=2), r"\[refined\] detail_size must be 5 to 1000 pixels; got 2"),
        (lambda: RefinedLatents(RefinedSettings(), 1, torch.device("cpu")), "there is no such stage II"),
        (
            lambda: RefinedLatents(dataclasses.replace(NANO, text="nowhere"), 1, torch.device("cpu")),
            "nowhere: there is no such text encoder",
        ),
    ],
)
def test_what_cannot_be_refined_is_told(make: Callable[[], object], problem: str) -> None:
    with pytest.raises(TrainingError, match=problem):
        make()


@pytest.mark.parametrize(
    ("first_lines", "problem"),
    [
        ("", "[refined] is for a decoder that learns alone: add decoder_only = true."),
        ("decoder_only = true\n", "[refined] needs `start` to be a VAE's file, whose latents stage II knows."),
    ],
)
def test_refined_drafts_are_for_a_decoder_alone_in_latents_that_are_known(
    first_lines: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A run's latents aren't scaled yet as those of its file are."""
    config = tmp_path / "vae.toml"
    config.write_text(head(tmp_path / "run") + first_lines + "[refined]\nshare = 0.5\n" + VAE)
    assert main(["train", "vae", "--config", str(config), "--device", "cpu"]) == 1
    assert problem in capsys.readouterr().err
