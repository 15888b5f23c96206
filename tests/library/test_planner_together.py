"""One video on several cards: what can be worked out by hand, and what a run's own counters say of its transformers."""

from __future__ import annotations

import json

import pytest

from flashvideo.commands.main import main
from flashvideo.config import STAGE2, latent_shape
from flashvideo.planner import NANO, Setting, make_plan
from flashvideo.planner.ranks import guided_on_ranks
from flashvideo.planner.report import together_report
from flashvideo.planner.speed import Rates
from flashvideo.planner.together import together

RATES = Rates("a card", 100e12, 50e12, 25e12)
REFINE = make_plan(Setting(stage1_steps=0))
ENDLESS = 1e30  # bytes a second


def test_one_card_is_the_plan() -> None:
    (run,) = together(REFINE, RATES, 1e9, 1)
    assert (run.cards, run.received, run.efficiency) == (1, 0, 1)
    assert run.seconds == pytest.approx(RATES.seconds(REFINE.flops))


@pytest.mark.parametrize(("most", "counts"), [(2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])])
def test_numbers_of_cards_double(most: int, counts: list[int]) -> None:
    assert [run.cards for run in together(REFINE, RATES, 1e9, most)] == counts


@pytest.mark.parametrize("cards", [2, 3, 4, 6])
def test_stage_two_is_what_its_ranks_count(cards: int) -> None:
    """Four guided evaluations; the VAE adds no bytes."""
    run = list(together(REFINE, RATES, ENDLESS, cards))[-1]
    one = guided_on_ranks(STAGE2, latent_shape(REFINE.setting.padded), cards, 2)
    assert run.received == pytest.approx(4 * one.received)
    slower = list(together(REFINE, RATES, 1e9, cards))[-1]
    assert slower.seconds - run.seconds == pytest.approx(4 * one.received / 1e9)


def test_without_guidance_only_one_branch_is_spread() -> None:
    guided, plain = (
        list(together(make_plan(Setting(stage1_steps=0, cfg=cfg)), RATES, ENDLESS, 3))[-1] for cfg in (13.0, 1.0)
    )
    assert plain.received == pytest.approx(guided.received / 2)


@pytest.mark.parametrize("setting", [
    Setting(), Setting(frames=97, stage1_steps=0), Setting(width=640, height=360, precision="fp8"),
    Setting(width=1280, height=720, memory=12 * 2**30), Setting(width=448, height=256, frames=17, networks=NANO),
])  # fmt: skip
def test_more_cards_are_faster_with_an_endless_link_and_never_more_than_their_number(setting: Setting) -> None:
    runs = list(together(make_plan(setting), RATES, ENDLESS, 8))
    assert all(0 < run.efficiency <= 1.02 for run in runs)  # smaller tiles may repeat a little less
    assert [run.seconds for run in runs] == sorted((run.seconds for run in runs), reverse=True)


def test_a_slow_link_is_said_not_to_pay() -> None:
    runs = list(together(REFINE, RATES, 1e8, 4))
    assert "4 cards hardly pay beside 2" in together_report(runs, 1e8)
    fast = list(together(REFINE, RATES, 1e12, 4))
    assert "hardly pay" not in together_report(fast, 1e12)


def test_tiles_of_stage_two_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--card", "4090", "--cards", "2", "--tile", "512"]) == 1
    assert "leave the tiles of stage II out" in capsys.readouterr().err


def test_the_command_takes_the_cards_link_unless_one_is_given(capsys: pytest.CaptureFixture) -> None:
    words = ["plan", "--card", "4090", "--cards", "4", "--stage1-steps", "0"]
    assert main([*words, "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["together"]
    assert [run["cards"] for run in runs] == [1, 2, 4]
    assert runs[2]["received"] > runs[1]["received"] > runs[0]["received"] == 0
    assert main(words) == 0
    assert "16 GB a second" in capsys.readouterr().out
    assert main([*words, "--link", "50"]) == 0
    assert "50 GB a second" in capsys.readouterr().out


@pytest.mark.parametrize(("wrong", "message"), [
    (["--cards", "257"], "--cards must be at most 256 for one video"),
    (["--link", "10"], "--link is for one video on several cards"),
    (["--cards", "2", "--link", "0"], "--link must be above 0"),
    (["--cards", "2", "--link", "nan"], "a number"),
    (["--failure-hours", "5"], "--failure-hours is for many videos"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(wrong: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    try:
        code = main(["plan", "--card", "4090", *wrong])
    except SystemExit as ended:
        code = ended.code
    assert code in (1, 2)
    assert message in capsys.readouterr().err
