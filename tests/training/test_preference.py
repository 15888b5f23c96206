"""Preference tuning: the scorer's favourite of several samples becomes what stage II learns."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashvideo.config import STAGE2_LATENT_SCALE
from flashvideo.degradation import degrade_latent
from flashvideo.samplers import sample_stage2
from flashvideo.training.config import LoopSettings
from flashvideo.training.data.latents import ClipSettings
from flashvideo.training.errors import TrainingError
from flashvideo.training.loop.trainer import Limits, Trainer
from flashvideo.training.randomness import generator_for, normal_like
from flashvideo.training.tasks.networks import NetworkSettings
from flashvideo.training.tasks.pixels import PixelSettings
from flashvideo.training.tasks.preference import SCORERS, ChoiceSettings, PreferenceSettings, PreferenceTask
from flashvideo.training.tasks.stage2 import Phase

CPU = torch.device("cpu")
LOOP = LoopSettings(steps=2, learning_rate=1e-3, warmup=1, validate_every=2, checkpoint_every=1)


def clip(contrast: float) -> Tensor:
    """A checkerboard [3, 2, 16, 16] around 0."""
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2 - 1
    return (board * contrast).expand(3, 2, 16, 16)


def test_scorers_prefer_what_their_names_say() -> None:
    clean, weak, equal, strong = clip(0.4), clip(0.1), clip(0.4) + 0.2, clip(0.9)
    favourites = {
        name: max((weak, equal, strong), key=lambda video, score=score: score(video, clean))
        for name, score in SCORERS.items()
    }
    assert favourites["fidelity"] is equal
    assert favourites["detail"] is equal
    assert favourites["sharpness"] is strong
    assert SCORERS["detail"](equal, clean) == pytest.approx(0, abs=1e-5)
    assert SCORERS["detail"](clip(0.2), clean) == pytest.approx(-2, abs=1e-5)  # half the contrast: two octaves


def settings(folder: Path, **changes: object) -> PreferenceSettings:
    """Settings of a small tuning of the models in a folder."""
    values = {
        "seed": 1,
        "out": folder / "run",
        "cache": folder / "cache",
        "vae": folder / "models" / "vae.safetensors",
        "text": str(folder / "models" / "text_encoder.safetensors"),
        "tokenizer": str(folder / "models" / "tokenizer.json"),
        "loop": LOOP,
        "phases": (Phase(2, 1, ClipSettings(16, 32, 5, clips=3, validation_clips=1)),),
        "network": NetworkSettings(weights=str(folder / "models" / "stage2.safetensors")),
        "choice": ChoiceSettings(clips=2, candidates=3, steps=1),
    }
    return PreferenceSettings(**{**values, **changes})


def test_tuning_learns_the_best_of_n(tmp_path: Path) -> None:
    from small_models import write_models

    write_models(tmp_path / "models")
    given = settings(tmp_path)
    task = PreferenceTask(given, CPU)
    task.prepare()
    assert len(task.data.chosen) == 2
    for index in range(2):
        entry = task.data.chosen.batch([index])
        clean, _ = given.phases[0].clips.open("train", given.seed).sample(index)
        latents, scores = [], []
        for candidate in range(3):
            reference = entry["reference"] * STAGE2_LATENT_SCALE
            noise = normal_like(reference, generator_for(given.seed, "candidate", index, candidate))
            latent = sample_stage2(
                task.model, degrade_latent(reference, noise), entry["context"], torch.zeros_like(entry["context"]),
                steps=1, cfg=given.choice.cfg,
            )  # fmt: skip
            latents.append(latent / STAGE2_LATENT_SCALE)
            scores.append(SCORERS["fidelity"](task.vae.decode(latents[-1])[0], clean))
        best = latents[max(range(3), key=scores.__getitem__)]
        # The cache holds half precision, and the reference was read from one.
        assert torch.allclose(entry["clean"], best, atol=2e-2, rtol=2e-3)
        assert len(set(scores)) == 3
    trainer = Trainer(task, given.loop, given.out)
    trainer.train(Limits(steps=1), resume=False)

    # The samples are those of the network that tuning began with, also where they must be made again in the middle.
    chosen = task.data.chosen.batch([0, 1])["clean"]
    shutil.rmtree(task.data.chosen.folder)
    task = PreferenceTask(given, CPU)
    trainer = Trainer(task, given.loop, given.out)
    trainer.resume()
    assert torch.equal(task.data.chosen.batch([0, 1])["clean"], chosen)
    trainer.run(Limits())
    assert trainer.step == 2
    again = PreferenceTask(given, CPU)
    assert again.data.chosen.folder == task.data.chosen.folder
    other = PreferenceTask(settings(tmp_path, choice=ChoiceSettings(clips=1, candidates=1, steps=1)), CPU)
    assert other.data.chosen.folder != task.data.chosen.folder


def test_what_can_not_choose_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="scorers are fidelity, detail, sharpness; got 'taste'"):
        ChoiceSettings(scorer="taste")
    with pytest.raises(TrainingError, match="at least 1"):
        ChoiceSettings(candidates=0)
    with pytest.raises(TrainingError, match="learns whole clips, and latents alone"):
        settings(tmp_path, pixels=PixelSettings(weight=1.0, window=2, edge=0))
    with pytest.raises(TrainingError, match="learns whole clips, and latents alone"):
        settings(tmp_path, phases=(Phase(2, 1, ClipSettings(16, 32, 5, clips=3, validation_clips=1), lengths=(1,)),))
    with pytest.raises(TrainingError, match="set `weights`"):
        settings(tmp_path, network=NetworkSettings())
