"""Tables of the ablations: verdicts follow from numbers, and orderings are asked as they were written down."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from flashvideo.training.ablations.acceptance import BICUBIC, REFINED, checks
from flashvideo.training.ablations.clips import Suite
from flashvideo.training.ablations.command import CONFIGS, NAMES
from flashvideo.training.ablations.document import asked, section, write_document
from flashvideo.training.ablations.drafts import BEFORE, FULL
from flashvideo.training.ablations.evaluation import Method, enlarge
from flashvideo.training.ablations.lab import Lab
from flashvideo.training.ablations.measures import METRICS
from flashvideo.training.ablations.orderings import all_orderings, claims, date
from flashvideo.training.ablations.pages import busiest
from flashvideo.training.ablations.results import Claim, Row, TableResult, holds
from flashvideo.training.ablations.settings import AblationSettings, Note
from flashvideo.training.ablations.swings import CHUNK_PERIOD, WINDOW_PERIOD, swing, time_measures
from flashvideo.training.ablations.tables import TABLES
from flashvideo.training.ablations.variants import Deadline, Paused
from flashvideo.training.config import build, load_toml
from flashvideo.training.errors import TrainingError
from flashvideo.training.tasks.stage2 import Stage2Settings

CPU = torch.device("cpu")


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


# Orderings


class LabelsOnly(Lab):
    """A lab that measures and trains nothing: tables of it have their rows' names and what is asked of them."""

    def rows(self, ways: list[tuple[str, Method]], suite: Suite) -> list[Row]:
        return [Row(label, {name: {"psnr": math.nan} for name in suite.names}) for label, _ in ways]

    def _train(self, name: str, *_: object) -> Path:
        return Path(name)


def test_every_ordering_that_was_written_down_is_asked_of_its_table() -> None:
    settings = build(AblationSettings, load_toml(CONFIGS / "small.toml"), "small.toml")
    lab = LabelsOnly(settings, CPU, None, Deadline())
    written = all_orderings()
    made_elsewhere = {
        "table2": ["draft, enlarged", "refined"],
        "table4": [BEFORE, FULL, f"LoRA, rank {settings.draft_tuning.lora_rank}"],
    }
    assert set(written) == set(TABLES)
    for key, orderings in written.items():
        asked_of_it = claims(key, made_elsewhere[key]) if key in made_elsewhere else TABLES[key](lab).claims
        assert len(asked_of_it) == sum(len(each.worse) * len(each.metrics) for each in orderings), key
        assert {claim.metric for claim in asked_of_it} <= {name for name, each in METRICS.items() if each.better}
    assert date() == "2026-11-28"


def test_an_ordering_of_rows_that_a_config_does_not_make_is_not_asked(tmp_path: Path) -> None:
    rows = ["refiner, 4 evaluations", "bilinear", "cascade, 2 evaluations"]
    assert {claim.worse for claim in claims("table3", rows)} == {"bilinear"}
    limits = {claim.metric: claim.within for claim in claims("table8", ["4 evaluations", "8 evaluations"])}
    assert limits == {"psnr_high": 0.3, "ssim": 0.01, "niqe": 0.5}
    broken = tmp_path / "orderings.toml"
    broken.write_text('date = "2026-11-28"\n[[table3]]\nbeter = "refiner"\n')
    with pytest.raises(TrainingError, match="unknown setting 'beter'"):
        all_orderings(broken)


def test_table_10_maps_the_official_strengths_to_the_size_and_others_use_the_mapped_one() -> None:
    settings = build(AblationSettings, load_toml(CONFIGS / "small.toml"), "small.toml")
    lab = LabelsOnly(settings, CPU, None, Deadline())
    assert "700 is 333;" in TABLES["table10"](lab).facts["strength"]
    assert lab.refiner().strength_at(256, 448) == 298  # 675 of 1920x1072
    assert lab.refiner(strength=60).strength_at(256, 448) == 60
    assert TABLES["table8"](lab).facts["strength"] == "auto, 298"


# Quality in time


def test_a_beat_is_seen_at_its_period_and_steady_quality_has_none() -> None:
    truth = torch.rand(117, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(117, 8, 8, 3, generator=torch.Generator().manual_seed(1))
    steady = truth + 0.02 * noise
    strong = torch.where(torch.arange(-1, 116) % CHUNK_PERIOD < 4, 0.04, 0.02)[:, None, None, None]
    beating = time_measures(truth + strong * noise, truth, truth + 0.02 * noise)
    assert beating["swing_chunk"] == pytest.approx(2.78, rel=0.02)  # a square wave of 3 dB up and down
    assert beating["swing_window"] < 0.5
    assert beating["varying_loss"] > 0.9
    even = time_measures(steady, truth, steady)
    assert even == {"swing_chunk": 0, "swing_window": 0, "varying_loss": pytest.approx(0, abs=0.05)}
    assert math.isnan(swing(torch.zeros(60), WINDOW_PERIOD))


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
    assert set(NAMES) == {*TABLES, "acceptance", "quality", "figure1"}


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
