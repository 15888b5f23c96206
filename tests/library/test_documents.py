"""The documents: numbers that follow from the code, links that lead somewhere, and a README of one screen."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from urllib.parse import unquote

import pytest

from flashvideo.devices import GIB
from flashvideo.planner import Setting, make_plan
from flashvideo.planner.budget import RESERVED, on_card
from flashvideo.training.config import LoopSettings, build, load_toml
from flashvideo.training.tasks.losses import PixelWeights
from flashvideo.training.tasks.networks import NetworkSettings, ShortText
from flashvideo.training.tasks.pixels import PixelSettings
from flashvideo.training.tasks.refined import RefinedSettings
from flashvideo.training.tasks.stage2 import DegradationSettings, Phase, SheetSettings, Stage2Settings
from flashvideo.training.tasks.vae import VAESettings

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
SETTINGS = ROOT / "docs" / "settings.md"
DOCUMENTS = (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("models/*/*.md"), *ROOT.glob("web/docs/*.md"))
LONGEST_README = 900  # words
LINK = re.compile(r"\]\(([^)\s]+)\)")
ROW = re.compile(r"^\| (text to video|refine a clip), (1080p|2K), (bf16|fp8) \| (.+) \|$", re.M)
SIZES = {"1080p": (1920, 1080), "2K": (2560, 1440)}
STEPS = {"text to video": 50, "refine a clip": 0}  # of the draft
TABLES = {
    "loop",
    "phases",
    "short_text",
    "degradation",
    "pixels",
    "terms",
    "network",
    "sheet",
}  # of a config of stage II
VAE_TABLES = {"model", "loop", "loss", "crops", "validation", "clips", "refined"}
TOLERANCE = 0.1  # GiB; the table has one decimal


@pytest.mark.parametrize(("document", "count"), [(README, 4), (SETTINGS, 8)], ids=["README", "settings"])
def test_tables_have_the_memory_that_the_planner_tells(document: Path, count: int) -> None:
    text = document.read_text(encoding="utf-8")
    cards = [int(card) for card in re.findall(r"(\d+) GiB", re.search(r"^\| card \| (.+) \|$", text, re.M).group(1))]
    rows = ROW.findall(text)
    assert len(rows) == len({row[:3] for row in rows}) == count
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


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= LONGEST_README


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        place, _, heading = unquote(link).partition("#")
        if place.startswith(("http:", "https:", "mailto:")):
            continue
        target = (document.parent / place).resolve() if place else document
        assert target.exists(), link
        if heading:
            assert heading in anchors(target), link


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_shows_every_workflow_in_its_order() -> None:
    shown = re.findall(r"\(workflows/([^)]+)\.jpg\)", README.read_text(encoding="utf-8"))
    assert shown == sorted(shown)
    text = README.read_text(encoding="utf-8")
    for path in (ROOT / "workflows").glob("*.json"):
        assert re.search(rf"\b{path.stem.split()[1]}\b", text), path.stem


def test_training_page_explains_the_keys_and_its_small_config_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`(\w+)`", text[text.index("## The keys of a config") :]))
    parts = (
        NetworkSettings,
        ShortText,
        Phase,
        DegradationSettings,
        PixelSettings,
        PixelWeights,
        LoopSettings,
        SheetSettings,
    )
    for settings in (Stage2Settings, *parts):
        assert {each.name for each in fields(settings)} - TABLES <= explained, settings
    assert {each.name for each in fields(VAESettings)} - VAE_TABLES <= explained
    assert {each.name for each in fields(RefinedSettings)} <= explained
    (tmp_path / "mine.toml").write_text(re.search(r"```toml\n(.+?)```", text, re.S).group(1), encoding="utf-8")
    settings = build(Stage2Settings, load_toml(tmp_path / "mine.toml"), "mine.toml")
    assert (settings.network.lora_rank, settings.phases[-1].until) == (16, settings.loop.steps)
