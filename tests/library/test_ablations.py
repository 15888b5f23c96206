"""`python -m flashvideo ablate`: verdicts follow from numbers, pieces are kept, variants differ in one thing."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from flashvideo.checkpoints import load_dit
from flashvideo.config import NANO_STAGE2
from flashvideo.nano import NANO_FOLDER
from flashvideo.training.ablations.acceptance import BICUBIC, REFINED, checks
from flashvideo.training.ablations.clips import RealClip, Suite
from flashvideo.training.ablations.command import CONFIGS, NAMES, add_ablate
from flashvideo.training.ablations.document import asked, section, write_document
from flashvideo.training.ablations.evaluation import enlarge
from flashvideo.training.ablations.lab import Lab
from flashvideo.training.ablations.pages import busiest
from flashvideo.training.ablations.results import Claim, Row, TableResult, holds
from flashvideo.training.ablations.settings import AblationSettings, Note
from flashvideo.training.ablations.tables import TABLES
from flashvideo.training.ablations.variants import Deadline, Paused, beside, load_variant, variant_network
from flashvideo.training.config import build, load_toml
from flashvideo.training.data.latents import ClipSettings
from flashvideo.training.errors import TrainingError
from flashvideo.training.loop.checkpointing import export_weights
from flashvideo.training.tasks.networks import NetworkSettings, make_network
from flashvideo.training.tasks.positions import AbsolutePositionsDiT, sinusoidal_positions
from flashvideo.training.tasks.stage2 import Stage2Settings

CPU = torch.device("cpu")
LOOP = "learning_rate = 1e-3\nwarmup = 1\nema = 0.5\nvalidate_every = 2\ncheckpoint_every = 1"
CLIPS = "height = 32\nwidth = 48\nframes = 5\nclips = 2\nvalidation_clips = 1"
RECIPE = """
seed = 1
out = "{folder}/run"
cache = "{folder}/cache"
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
[refiner]
steps = 1
[variants]
batch = 1
cascade_steps = [2]
clips = {{ {clips} }}
loop = {{ steps = 2, {loop} }}
[preference]
batch = 1
clips = {{ {clips} }}
loop = {{ steps = 2, {loop} }}
[draft_tuning]
batch = 1
lora_learning_rate = 1e-2
clips = {{ {clips} }}
loop = {{ steps = 2, {loop} }}
"""


def table(**rows: dict[str, float]) -> TableResult:
    """A measured table of one clip; underscores in labels stand for spaces."""
    made = [Row(label.replace("_", " "), {"scene 1": values}) for label, values in rows.items()]
    metrics = [*made[0].clips["scene 1"]]
    return TableResult("table8", "Table 8: evaluations", "About.", ["scene 1"], [], metrics, made, [])


# Verdicts


@pytest.mark.parametrize(
    ("claim", "better", "worse", "expected"),
    [
        (Claim("psnr", "a", "b"), 30.0, 29.0, True),
        (Claim("psnr", "a", "b"), 29.0, 29.0, False),
        (Claim("psnr", "a", "b"), math.inf, 29.0, True),
        (Claim("flicker", "a", "b"), 30.0, 29.0, False),
        (Claim("flicker", "a", "b"), 28.0, 29.0, True),
        (Claim("psnr", "a", "b", 0.5), 28.6, 29.0, True),
        (Claim("psnr", "a", "b", 0.5), 28.4, 29.0, False),
        (Claim("psnr", "a", "b", 0.0), math.inf, math.inf, True),
        (Claim("warp_error", "a", "b"), math.nan, 1.0, False),
    ],
)
def test_a_claim_holds_or_not(claim: Claim, better: float, worse: float, expected: bool) -> None:
    assert holds(claim, better, worse) == expected


def test_the_document_tells_which_tables_are_of_other_weights(tmp_path: Path) -> None:
    measured = table(one_step={"psnr": 25.0})
    before, now = (dataclasses.replace(measured, facts={"stage II": weights}) for weights in ("0123abcd", "4567cdef"))
    said = "Measured with another stage II (0123abcd) than the one that is shipped now (4567cdef)."
    weights = {"stage I": "89ab0123", "stage II": "4567cdef"}
    for one, told in ((before, 1), (now, 0)):
        text = write_document(tmp_path, [one], [], weights).read_text(encoding="utf-8")
        assert text.count(said) == text.count("Measured with another") == told


def test_tables_that_are_not_at_hand_stay_on_the_page(tmp_path: Path) -> None:
    old = dataclasses.replace(
        table(four_steps={"psnr": 24.0}, one_step={"psnr": 25.0}),
        claims=[Claim("psnr", "one step", "four steps")],
        facts={"training": "long; strengths 1 to 2", "stage II": "0123abcd"},
    )
    page = write_document(tmp_path, [old], [Note("table8", "\nA note;\n\nand another.")], {"stage II": "0123abcd"})
    first = page.read_text(encoding="utf-8")
    write_document(tmp_path, [], [], {"stage II": "0123abcd"})
    assert page.read_text(encoding="utf-8") == first
    titles = {"table10": "Table 10: b", "other": "Held out"}
    others = [dataclasses.replace(old, key=key, title=title) for key, title in titles.items()]
    write_document(tmp_path, others, [], {"stage II": "4567cdef"})
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Held out", "Table 8: evaluations", "Table 10: b"]
    assert "| [Table 8: evaluations](#table-8-evaluations) | 1 | 1 |" in text
    assert text.count("Measured with another stage II (0123abcd)") == 3
    assert "\n\nA note;\n\nand another.\n" in text
    page.write_text(text + "\n## Somebody's words\n\nof no table.\n", encoding="utf-8")
    write_document(tmp_path, [], [], {"stage II": "0123abcd"})
    text = page.read_text(encoding="utf-8")
    assert "Measured with another" not in text
    assert "## Somebody's words\n\nof no table.\n" in text


def test_the_document_says_what_came_out_and_what_did_not(tmp_path: Path) -> None:
    measured = table(four_steps={"psnr": 24.0, "ssim": 0.7}, one_step={"psnr": 25.0, "ssim": 0.6})
    claims = [Claim("psnr", "four steps", "one step"), Claim("ssim", "four steps", "one step")]
    measured = TableResult(**{**measured.__dict__, "claims": claims})
    text = section(measured, ["A note."])
    assert "| *four steps* has a higher PSNR than *one step* | 24.00 against 25.00 | **no** | 0 of 1 |" in text
    assert "| *four steps* has a higher SSIM than *one step* | 0.7000 against 0.6000 | yes | 1 of 1 |" in text
    assert "| one step | **25.00** | 0.6000 |" in text
    assert "A note." in text
    measured.save(tmp_path)
    assert TableResult.load(tmp_path / "table8.json") == measured
    page = write_document(tmp_path, [measured], [Note("table8", "A note.")])
    assert "| [Table 8: evaluations](#table-8-evaluations) | 1 | 2 |" in page.read_text(encoding="utf-8")
    assert asked(Claim("psnr", "a", "b", 0.3)) == "*a* is at most 0.3 worse in PSNR than *b*"


def test_acceptance_asks_for_detail_and_for_nothing_else_to_change() -> None:
    bicubic = {
        "psnr_high": 22.0,
        "gradient_error": 80.0,
        "psnr_low": 40.0,
        "colour_shift": 0.2,
        "flicker": 3.0,
        "colour_error": 1.5,
    }
    good = {
        "psnr_high": 23.6,
        "gradient_error": 79.0,
        "psnr_low": 40.0,
        "colour_shift": 0.9,
        "flicker": 2.9,
        "colour_error": 1.4,
    }

    def passed(**changes: float) -> list[bool]:
        measured = table(**{BICUBIC: bicubic, REFINED: {**good, **changes}})
        return [check.passed for check in checks(measured, measured.procedural)]

    assert passed() == [True] * 4
    assert passed(psnr_high=22.1, gradient_error=55.0) == [True] * 4  # one of the two is enough
    assert passed(psnr_high=22.1) == [False, True, True, True]
    assert passed(psnr_low=39.5) == [True, False, True, True]
    assert passed(psnr_low=48.5) == [True] * 4
    assert passed(colour_shift=1.1, flicker=3.1) == [True, True, False, False]


# Pieces


def test_both_configs_can_be_read_and_learn_from_clips_like_those_of_the_miniatures_training() -> None:
    """The large one from the same ones; the small one from fewer."""
    nano = build(Stage2Settings, load_toml(CONFIGS.parent / "nano" / "stage2.toml"), "stage2.toml")
    for name in ("small.toml", "full.toml"):
        settings = build(AblationSettings, load_toml(CONFIGS / name), name)
        assert settings.variants.clips == settings.preference.clips
        few = dataclasses.replace(nano.phases[0].clips, clips=512)
        assert settings.variants.clips == (few if name == "small.toml" else nano.phases[0].clips)
        assert (settings.seed, settings.cache) == (nano.seed, nano.cache)
    assert set(NAMES) == {*TABLES, "acceptance"}


def test_a_suite_names_its_clips_and_a_real_one_must_be_a_video(tmp_path: Path) -> None:
    broken = tmp_path / "bikes.mp4"
    broken.write_bytes(b"no video")
    real = RealClip(broken, 0.5, "")
    assert Suite(ClipSettings(32, 48, 5, 1), 2, "coded", real).names == ["scene 1", "scene 2", "bikes"]
    with pytest.raises(TrainingError, match=r"bikes\.mp4"):
        real.frames(5, 32, 48)


def test_every_enlargement_keeps_a_flat_picture_flat() -> None:
    flat = torch.full((2, 8, 12, 3), 0.4)
    for resampler in ("bilinear", "bicubic", "lanczos"):
        large = enlarge(flat, 32, 48, resampler)
        assert large.shape == (2, 32, 48, 3)
        assert torch.allclose(large, torch.tensor(0.4), atol=1 / 510)


def test_pictures_show_the_piece_with_the_most_detail() -> None:
    picture = Image.new("RGB", (448, 256), (90, 90, 90))
    for x in range(300, 400, 2):
        picture.paste((255, 255, 255), (x, 150, x + 1, 200))
    left, top, right, bottom = busiest(picture)
    assert left * 448 <= 300
    assert right * 448 >= 399
    assert top * 256 <= 150
    assert bottom * 256 >= 200


def test_a_deadline_stops_between_pieces() -> None:
    Deadline.after(None).check()
    Deadline.after(5).check()
    with pytest.raises(Paused):
        Deadline.after(0).check()


# Networks


def test_absolute_positions_are_distinct_and_the_same_in_a_larger_picture() -> None:
    small = sinusoidal_positions(2, 3, 4, 32, CPU).view(2, 3, 4, 32)
    large = sinusoidal_positions(3, 5, 6, 32, CPU).view(3, 5, 6, 32)
    assert torch.equal(large[:2, :3, :4], small)
    flat = small.flatten(0, 2)
    assert torch.cdist(flat, flat).fill_diagonal_(1).min() > 1e-3


@torch.no_grad()
def test_absolute_positions_replace_rotary_ones_and_nothing_else() -> None:
    rotary = make_network(NetworkSettings(), 2, 1, CPU)
    torch.nn.init.normal_(rotary.proj_out.weight, generator=torch.Generator().manual_seed(0))
    absolute = variant_network(rotary, "absolute", 1)
    assert isinstance(absolute, AbsolutePositionsDiT)
    assert {name: p.shape for name, p in absolute.named_parameters()} == {
        name: p.shape for name, p in rotary.named_parameters()
    }
    cosines, sines = absolute.rope(2, 2, 2, CPU)
    assert bool((cosines == 1).all())
    assert bool((sines == 0).all())
    same = torch.randn(1, 16, 1, 1, 1, generator=torch.Generator().manual_seed(1)).expand(1, 16, 1, 4, 4)
    text = torch.zeros(1, 3, NANO_STAGE2.text_dim)
    out = absolute(same.contiguous(), torch.tensor([500.0]), text, degradation_step=675)
    assert (out[..., :2, :2] - out[..., 2:, 2:]).abs().max() > 1e-3  # equal patches at other places differ


@torch.no_grad()
@pytest.mark.parametrize("kind", ["rotary", "absolute", "cascade"])
def test_a_variant_is_read_as_it_was_written(kind: str, tmp_path: Path) -> None:
    made = variant_network(make_network(NetworkSettings(), 2, 1, CPU), kind, 1)
    torch.nn.init.normal_(made.proj_out.weight, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "weights.safetensors"
    export_weights(path, made.state_dict(), {"flashvideo.stage": "2"}, torch.float32)
    again = load_variant(path, kind, CPU)
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(2, made.config.in_channels, 1, 4, 4, generator=generator)
    arguments = latent, torch.tensor([500.0, 500.0]), torch.zeros(2, 3, NANO_STAGE2.text_dim)
    assert torch.equal(made(*arguments, degradation_step=675), again(*arguments, degradation_step=675))
    assert type(again) is type(made)


@torch.no_grad()
def test_a_cascade_sees_the_draft_beside_the_noise() -> None:
    cascade = variant_network(make_network(NetworkSettings(), 2, 1, CPU), "cascade", 1)
    torch.nn.init.normal_(cascade.proj_out.weight, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(3)
    noise, *references = torch.randn(3, 1, 16, 1, 4, 4, generator=generator)
    arguments = torch.cat((noise, noise)), torch.tensor([999.0, 999.0]), torch.zeros(2, 3, NANO_STAGE2.text_dim)
    first, second = (beside(cascade, each)(*arguments, degradation_step=999) for each in references)
    assert torch.allclose(first[0], first[1], atol=1e-5)  # a batch of two contexts has the one reference
    assert (first - second).abs().max() > 1e-3


# The command


@pytest.fixture
def ablate(tmp_path: Path) -> Callable[..., int]:
    """The command on small untrained models and clips."""
    pytest.importorskip("skimage")
    pytest.importorskip("transformers")
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


def test_the_command_measures_once_and_goes_on_where_it_stopped(
    ablate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert ablate("acceptance", "table3", "--minutes", "0") == 0
    assert "goes on from here" in capsys.readouterr().out
    assert not (tmp_path / "docs").exists()
    assert ablate("acceptance", "table3") == 0
    first = capsys.readouterr().out
    assert "cascade, 2 evaluations, 48x32, 5 frames, scene 1: PSNR" in first
    assert "trained in" in first
    page = (tmp_path / "docs" / "ablations.md").read_text(encoding="utf-8")
    assert "## Table 3: refiner, enlargement, cascade" in page
    assert "![The refiner on held-out clips](ablations/acceptance.jpg)" in page
    assert Image.open(tmp_path / "docs" / "ablations" / "table3.jpg").width > 0
    variants = sorted(path.name[:7] for path in (tmp_path / "run" / "variants").iterdir())
    assert variants == ["cascade", "refiner"]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "results").iterdir()}
    assert ablate("acceptance", "table3") == 0
    assert "scene 1: PSNR" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "results").iterdir()} == kept
    weights = next((tmp_path / "run" / "variants").glob("refiner-*/weights.safetensors"))
    assert load_dit(weights, stage=2).config == NANO_STAGE2


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
    with pytest.raises(TrainingError, match="no table 'table9'; there are acceptance, table3"):
        ablate("table9")
    with pytest.raises(TrainingError, match="there is no such video"):
        ablate("acceptance", "--clip", str(tmp_path / "none.mp4"))
    (tmp_path / "models" / "stage1.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"stage1\.safetensors: there is no such model"):
        ablate("table4")
    (tmp_path / "models" / "stage2.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"stage2\.safetensors: there is no such model"):
        ablate("acceptance")
