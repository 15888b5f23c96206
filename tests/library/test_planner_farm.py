"""The planner's farm: times that can be worked out by hand, and failures that cost what they must."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from flashvideo.commands.main import main
from flashvideo.planner.farm import FarmSetting, scaling, simulate

EXACT = {"load": 0.0, "call": 0.0}


def test_without_failures_the_longest_goes_first() -> None:
    run = simulate(FarmSetting((1, 5, 2, 4, 3), 2, **EXACT))  # 5 + 2 + 1 and 4 + 3
    assert run.seconds == 8
    assert run.efficiency == 15 / 16
    assert (run.failures, run.repeated) == (0, 0)


@pytest.mark.parametrize("cards", [1, 3, 8, 1000])
def test_no_plan_beats_the_longest_video_or_the_work_by_the_cards(cards: int) -> None:
    seconds = [1.0 + index % 7 for index in range(100)]
    run = simulate(FarmSetting(seconds, cards, **EXACT))
    best = max(max(seconds), sum(seconds) / cards)
    assert best <= run.seconds <= best * 4 / 3  # Graham's bound for the longest first


def test_what_it_stops_at_is_named() -> None:
    assert simulate(FarmSetting((10.0,) * 100, 4, load=1)).limit == "work"
    assert simulate(FarmSetting((10.0,) * 100, 400, load=1)).limit == "longest"
    assert simulate(FarmSetting((10.0,) * 100, 100, load=60)).limit == "start"
    assert simulate(FarmSetting((10.0,) * 10000, 5000, load=1, call=0.1)).limit == "calls"


def test_calls_go_one_after_another() -> None:
    assert simulate(FarmSetting((10.0,) * 100, 100, load=0, call=1)).seconds == 110


def test_failures_repeat_at_most_what_was_not_saved() -> None:
    quiet = FarmSetting((600.0,) * 200, 10, load=30, save=20)
    run = simulate(FarmSetting((600.0,) * 200, 10, load=30, save=20, failure_hours=1))
    # 200 videos of ten minutes are 33 hours of work, about as many failures, and 80 to 10 % more for each.
    assert 15 < run.failures < 70
    assert 0 < run.repeated < 20 * run.failures
    assert simulate(quiet).seconds < run.seconds < 1.5 * simulate(quiet).seconds
    assert simulate(run.setting) == run
    assert simulate(run.setting, seed=1) != run


def test_a_thousand_cards_that_fail_every_ten_hours_do_all_videos() -> None:
    setting = FarmSetting([60.0 + index % 240 for index in range(20_000)], 1000, failure_hours=10)
    runs = list(scaling(setting))
    assert [run.setting.cards for run in runs] == [*(2**power for power in range(10)), 1000]
    assert all(later.seconds < run.seconds for run, later in zip(runs, runs[1:], strict=False))
    assert runs[-1].efficiency > 0.85
    total = sum(setting.seconds) / 36000  # failures that the work alone meets
    assert 0.8 * total < runs[-1].failures < 1.5 * total


@pytest.mark.parametrize(
    "wrong", [{"cards": 0}, {"seconds": ()}, {"failure_hours": 0}, {"load": -1}, {"seconds": (-1.0,)}]
)
def test_what_is_no_farm_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="a farm needs|times must"):
        FarmSetting(**{"seconds": (1.0,), "cards": 1, **wrong})


def test_a_card_that_never_fails_has_no_failures() -> None:
    assert simulate(FarmSetting((1e6,), 1, failure_hours=math.inf)).failures == 0


def test_the_command_plans_a_farm_from_measured_times(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "times.txt").write_text("30\n10.5\n20\n")
    words = ["plan", "--card", "4090", "--times", str(tmp_path / "times.txt"), "--clips", "6", "--cards", "4"]
    assert main([*words, "--json"]) == 0
    farm = json.loads(capsys.readouterr().out)["farm"]
    assert [run["cards"] for run in farm] == [1, 2, 4]
    load = farm[0]["seconds"] - 2 * 60.5
    assert 20 < load < 120  # the networks of the official models, and the calls
    assert farm[1]["seconds"] == pytest.approx(load + 30 + 20 + 10.5, abs=0.1)
    assert farm[2]["limit"] == "start"
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "6 videos, 2 min 1 s on one card without a break:" in told
    assert "cards don't pay: the cards load networks for longer than they work." in told


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cards", "4"], "--cards needs times: name a card with --card, or ask for --device cpu."),
        (["--clips", "4"], "--clips needs times: name a card with --card, or ask for --device cpu, or give --times."),
        (["--clips", "4", "--failure-hours", "0"], "--failure-hours must be above 0; got 0."),
        (["--clips", "4", "--cards", "20000"], "--cards must be at most 10000; got 20000."),
        (["--times", "nowhere.txt"], "There is no file nowhere.txt."),
    ],
)
def test_what_cannot_be_planned_is_told(options: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *options]) == 1
    assert capsys.readouterr().err == f"{words}\n"


def test_times_that_are_none_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for text, words in (("", "holds no times"), ("12\nsoon\n", "takes a number; got 'soon'")):
        (tmp_path / "times.txt").write_text(text)
        assert main(["plan", "--times", str(tmp_path / "times.txt")]) == 1
        assert words in capsys.readouterr().err
