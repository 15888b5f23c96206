"""`python -m flashvideo ablate`: pieces are kept, and the page has all of them."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from small_videos import animation, make_video

from flashvideo.checkpoints import load_dit
from flashvideo.config import NANO_STAGE2
from flashvideo.nano import NANO_FOLDER
from flashvideo.training.ablations.command import add_ablate
from flashvideo.training.ablations.lab import Lab
from flashvideo.training.errors import TrainingError

LOOP = "learning_rate = 1e-3\nwarmup = 1\nema = 0.5\nbf16_cpu = false\nvalidate_every = 2\ncheckpoint_every = 1"
CLIPS = "height = 32\nwidth = 48\nframes = 5\nclips = 2\nvalidation_clips = 1"
RECIPE = """
seed = 1
out = "{folder}/run"
cache = "{folder}/cache"
long_frames = 21
[shipped]
stage1 = "{models}/stage1.safetensors"
stage2 = "{models}/stage2.safetensors"
vae = "{models}/vae.safetensors"
text = "{models}/text_encoder.safetensors"
tokenizer = "{models}/tokenizer.json"
[held_out]
height = 32
width = 48
frames = 5
clips = 1
other_drafts = ["shrunk"]
[quality]
height = 32
width = 48
frames = 5
[refiner]
steps = 1
[generated]
prompts = 2
height = 32
width = 48
frames = 5
steps = 2
[variants]
batch = 1
cascade_steps = [2]
clips = {{ {clips} }}
loop = {{ steps = 2, {loop} }}
[preference]
batch = 1
strength = 400
clips = {{ {clips} }}
loop = {{ steps = 2, {loop} }}
[draft_tuning]
batch = 1
lora_learning_rate = 1e-2
clips = {{ {clips} }}
loop = {{ steps = 2, {loop} }}
"""


@pytest.fixture
def ablate(tmp_path: Path) -> Callable[..., int]:
    """The command on small untrained models and clips."""
    pytest.importorskip("skimage")
    from small_models import write_models

    models = tmp_path / "models"
    write_models(models)
    config = tmp_path / "tiny.toml"
    inline = {name: ", ".join(lines.splitlines()) for name, lines in (("clips", CLIPS), ("loop", LOOP))}
    config.write_text(RECIPE.format(folder=tmp_path, models=models, **inline))

    def run(*arguments: str) -> int:
        parser = argparse.ArgumentParser()
        add_ablate(parser.add_subparsers())
        fixed = ("--config", str(config), "--docs", str(tmp_path / "docs"), "--device", "cpu")
        options = parser.parse_args(["ablate", *arguments, *fixed])
        return options.run(options)

    return run


def test_the_command_measures_once_and_resumes_where_it_stopped(
    ablate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert ablate("acceptance", "table3", "--minutes", "0") == 0
    assert "Run the same command again to resume." in capsys.readouterr().out
    assert not (tmp_path / "docs").exists()
    assert ablate("acceptance", "table3") == 0
    first = capsys.readouterr().out
    assert "cascade, 2 evaluations, 48x32, 5 frames, scene 1: PSNR" in first
    assert "trained in" in first
    page = (tmp_path / "docs" / "ablations.md").read_text(encoding="utf-8")
    assert "## Table 3: refiner, enlargement, cascade" in page
    assert "![The refiner on held-out clips](ablations/acceptance.jpg)" in page
    assert "| FlashVideo, 1080p | 34.2 |" in page
    assert Image.open(tmp_path / "docs" / "ablations" / "table3.jpg").width > 0
    variants = sorted(path.name[:7] for path in (tmp_path / "run" / "variants").iterdir())
    assert variants == ["cascade", "refiner"]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "results").iterdir()}
    assert ablate("acceptance", "table3") == 0
    assert "scene 1: PSNR" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "results").iterdir()} == kept
    weights = next((tmp_path / "run" / "variants").glob("refiner-*/weights.safetensors"))
    assert load_dit(weights, stage=2).config == NANO_STAGE2


def test_real_clips_are_measured_and_shown_by_one_command(
    ablate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    real = tmp_path / "real"
    real.mkdir()
    make_video(real / "small.mp4", 6, Fraction(24), (16, 24))
    animation(real / "grey.webp", 6)
    make_video(real / "ramps.mp4", 6, Fraction(24), (40, 60))
    with pytest.raises(TrainingError, match="name their folder with --real"):
        ablate("quality")
    (real / "none").mkdir()
    make_video(real / "none" / "short.mp4", 3, Fraction(24), (40, 60))
    with pytest.raises(TrainingError, match="None of the 1 clips can be measured"):
        ablate("quality", "--real", str(real / "none"))
    assert "short.mp4: it has 3 of 5 frames." in capsys.readouterr().out
    assert ablate("quality", "--real", str(real), "--strength", "200", "--steps", "2") == 0
    said = capsys.readouterr().out
    assert "Left out: " in said
    assert "24x16 is smaller" in said
    assert "VAE's PSNR at least 27 dB" in said
    sheets = sorted((tmp_path / "run" / "sheets" / "quality").iterdir())
    assert [sheet.name for sheet in sheets] == ["grey.jpg", "ramps.jpg"]
    page = (tmp_path / "docs" / "ablations.md").read_text(encoding="utf-8")
    assert "clips: 2 real clips; size: 48x32, 5 frames; drafts: area; strength: 200; evaluations: 2;" in page
    assert "| refined, 1 evaluation |" in page
    assert not (tmp_path / "docs" / "ablations" / "quality.jpg").exists()  # real footage is not ours to show


def test_drafts_are_made_and_refined_and_long_clips_are_measured_in_windows(
    ablate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert ablate("table2", "time", "guidance") == 0
    page = (tmp_path / "docs" / "ablations.md").read_text(encoding="utf-8")
    assert "## Table 2: generated drafts, before and after stage II" in page
    assert "size: 192x128, 5 frames;" in page
    assert "size: 48x32, 21 frames;" in page
    assert "| guidance 13, 8 evaluations |" in page
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "results").iterdir()}
    capsys.readouterr()
    assert ablate("table2", "time", "guidance") == 0
    assert "PSNR" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "results").iterdir()} == kept


def test_a_real_clip_is_measured_beside_the_scenes_of_a_table(ablate: Callable[..., int], tmp_path: Path) -> None:
    clip = make_video(tmp_path / "ramps.mp4", 20, Fraction(24), (40, 60))
    assert ablate("acceptance", "--clip", str(clip)) == 0
    page = (tmp_path / "docs" / "ablations.md").read_text(encoding="utf-8")
    assert "The real clip, ramps:" in page
    assert "clips: 1 held-out scenes, and ramps.mp4;" in page


def test_a_table_names_the_stage_that_it_measured() -> None:
    parts = ("stage1", "stage2", "vae")
    shipped = SimpleNamespace(**{part: NANO_FOLDER / f"{part}.safetensors" for part in parts})
    lab = SimpleNamespace(settings=SimpleNamespace(shipped=shipped), device=torch.device("cpu"))
    digests = [hashlib.sha256(getattr(shipped, part).read_bytes()).hexdigest()[:8] for part in parts]
    drafts, refined = Lab.facts(lab, "stage I", size="small"), Lab.facts(lab, drafts="coded")
    assert [drafts["stage I"], refined["stage II"], drafts["VAE"]] == digests
    assert [*drafts] == ["size", "stage I", "VAE", "device", "date"]
    assert [*refined] == ["drafts", "stage II", "VAE", "device", "date"]


def test_an_unknown_table_and_a_missing_model_are_named(ablate: Callable[..., int], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no table 'table9'; there are quality, acceptance, table2"):
        ablate("table9")
    with pytest.raises(TrainingError, match="there is no such video"):
        ablate("acceptance", "--clip", str(tmp_path / "none.mp4"))
    (tmp_path / "models" / "stage1.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"stage1\.safetensors: there is no such model"):
        ablate("table4")
    (tmp_path / "models" / "stage2.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"stage2\.safetensors: there is no such model"):
        ablate("acceptance")
