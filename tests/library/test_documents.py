"""Numbers in the documents that follow from the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flashvideo.devices import GIB
from flashvideo.planner import Setting, make_plan
from flashvideo.planner.budget import RESERVED, on_card

README = Path(__file__).resolve().parents[2] / "README.md"
ROW = re.compile(r"^\| (text to video|refine a clip), (1080p|2K), (bf16|fp8) \| (.+) \|$", re.M)
SIZES = {"1080p": (1920, 1080), "2K": (2560, 1440)}
STEPS = {"text to video": 50, "refine a clip": 0}  # of the draft
TOLERANCE = 0.1  # GiB; the table has one decimal


def test_readme_has_the_memory_that_the_planner_tells() -> None:
    text = README.read_text(encoding="utf-8")
    cards = [int(card) for card in re.findall(r"(\d+) GiB", re.search(r"^\| card \| (.+) \|$", text, re.M).group(1))]
    rows = ROW.findall(text)
    assert len(rows) == len({row[:3] for row in rows}) == 8
    for task, size, precision, cells in rows:
        for card, cell in zip(cards, cells.split(" | "), strict=True):
            setting = Setting(*SIZES[size], stage1_steps=STEPS[task], precision=precision)
            plan, there = make_plan(on_card(setting, card * GIB)), card * GIB - RESERVED
            name = f"{task}, {size}, {precision} on {card} GiB: {plan.memory / GIB:.1f} GiB"
            if cell == "–":  # some weights in main memory
                assert plan.activations <= there < plan.memory, name
            else:
                assert float(cell.removesuffix(" GiB")) == pytest.approx(plan.memory / GIB, abs=TOLERANCE), name
                assert plan.memory <= there, name
