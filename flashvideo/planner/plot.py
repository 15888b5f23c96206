"""A plan as a picture: memory and time of each phase as bars."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from .budget import RESERVED, Budget
from .plan import Plan
from .report import describe, duration, size
from .speed import Rates

BAR, GAP, MARGIN, LABELS, VALUES, PANEL, TITLE = 26, 14, 24, 130, 120, 340, 64
FONT_SIZE = 17
TEXT_DROP = 3  # of a label beside its bar
BACKGROUND, TEXT, FAINT = (24, 26, 31), (226, 228, 233), (110, 114, 124)
WEIGHTS, WORK, TIME, LIMIT = (86, 126, 196), (120, 190, 160), (222, 164, 92), (226, 92, 92)
Color = tuple[int, int, int]


@dataclass(frozen=True)
class _Bar:
    """Lengths and colours of its parts, and the text behind it."""

    parts: tuple[tuple[float, Color], ...]
    value: str


def plot(plan: Plan, rates: Rates, budget: Budget | None = None) -> Image.Image:
    """Draw memory (weights and work space) beside time; a red line marks the budget."""
    memory = [_Bar(((phase.weights, WEIGHTS), (phase.activations, WORK)), size(phase.memory)) for phase in plan.phases]
    seconds = [rates.seconds(phase.flops) for phase in plan.phases]
    time = [_Bar(((each, TIME),), duration(each)) for each in seconds]
    limit = budget.memory - RESERVED if budget and budget.memory else None

    top = MARGIN + 2 * TITLE
    width = 2 * MARGIN + LABELS + 2 * (PANEL + VALUES) + MARGIN
    height = top + len(plan.phases) * (BAR + GAP) + 2 * MARGIN
    image = Image.new("RGB", (width, height), BACKGROUND)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=FONT_SIZE)
    draw.text((MARGIN, MARGIN), describe(plan.setting), TEXT, font)
    for row, phase in enumerate(plan.phases):
        draw.text((MARGIN, top + row * (BAR + GAP) + TEXT_DROP), phase.name, TEXT, font)
    left = MARGIN + LABELS
    draw.text((left, MARGIN + TITLE), f"memory, at most {size(plan.memory)}", TEXT, font)
    _legend(draw, font, left, MARGIN + TITLE + FONT_SIZE + GAP)
    _bars(draw, font, memory, (left, top), limit)
    left += PANEL + VALUES + MARGIN
    draw.text((left, MARGIN + TITLE), f"time, {duration(sum(seconds))} in all on {rates.device}", TEXT, font)
    _bars(draw, font, time, (left, top), None)
    return image


def _legend(draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, left: int, top: int) -> None:
    for word, color in (("weights", WEIGHTS), ("work space", WORK), ("budget", LIMIT)):
        draw.text((left, top), word, color, font)
        left += round(draw.textlength(word, font)) + GAP


def _bars(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    bars: list[_Bar],
    corner: tuple[int, int],
    limit: float | None,
) -> None:
    left, top = corner
    longest = max(sum(length for length, _ in bar.parts) for bar in bars)
    scale = PANEL / longest
    bottom = top + len(bars) * (BAR + GAP)
    draw.line((left, bottom, left + PANEL, bottom), FAINT)
    for row, bar in enumerate(bars):
        y, x = top + row * (BAR + GAP), float(left)
        for length, color in bar.parts:
            draw.rectangle((x, y, max(x + 1, x + length * scale), y + BAR), fill=color)
            x += length * scale
        if limit is not None and x < left + limit * scale < x + VALUES:
            x = left + limit * scale  # the number would cover the line
        draw.text((x + GAP / 2, y + TEXT_DROP), bar.value, TEXT, font)
    if limit is not None and 0 < limit <= longest:
        draw.line((left + limit * scale, top - GAP / 2, left + limit * scale, bottom), LIMIT, width=2)
