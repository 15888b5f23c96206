"""Figure 1: the planner's operations give the paper's seconds with one constant."""

from __future__ import annotations

import pytest

from flashvideo.training.ablations.figure1 import PAPER, TOLERANCE, agreement, figure1, operations, text


def test_every_bar_is_within_the_tolerance_of_the_papers() -> None:
    bars, rate = figure1()
    assert [bar.paper for bar in bars] == [2150.0, 571.5, 102.3, 239.9]
    for bar in bars:
        assert abs(bar.difference) < TOLERANCE
        assert bar.seconds == pytest.approx(bar.operations / rate)
    assert agreement() == (4, 4)
    assert 1e14 < rate < 1e15  # what such a card can do


def test_the_ratios_are_the_papers_without_any_constant() -> None:
    counted = [*operations().values()]
    wanted = [*PAPER.values()]
    for place in (0, 1, 3):
        assert counted[place] / counted[2] == pytest.approx(wanted[place] / wanted[2], rel=TOLERANCE / 100)


def test_operations_are_counted_by_hand() -> None:
    """Attention alone, 4 n^2 width layers, of the single stage: 100 evaluations over 104,520 + 226 tokens."""
    attention = 100 * 4 * (104_520 + 226) ** 2 * 3072 * 42
    assert 0.8 < attention / operations()["single stage, 1080p"] < 0.9


def test_the_section_has_all_bars() -> None:
    lines = [line for line in text().splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(PAPER)
    assert "| 102.3 |" in text()
