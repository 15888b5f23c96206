"""Figure 1 of the paper by the planner's formula: what a video costs in one stage, in a cascade, and in two stages.

Seconds are operations divided by one sustained rate, which is fitted to the paper's four numbers: the only free
constant. Every evaluation counts two contexts, with and without the prompt, as guidance takes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...config import latent_shape
from ...planner.flops import Flops, decode_flops, dit_flops
from ...planner.plan import Setting, make_plan

DRAFT_STEPS, REFINER_STEPS, CASCADE_STEPS = 50, 4, 30
CONTEXTS = 2
FRAMES = 49
TOLERANCE = 12.0  # percent
TITLE = "Figure 1: seconds of a video of 6 s"
WAYS = ("single stage, 1080p", "cascade with 30 evaluations, 1080p", "FlashVideo, 1080p", "FlashVideo, 2K")
PAPER = dict(zip(WAYS, (2150.0, 571.5, 102.3, 239.9), strict=True))  # seconds


@dataclass(frozen=True)
class Bar:
    """One way to a video: its operations, its seconds by the formula, and by the paper."""

    way: str
    operations: float
    seconds: float
    paper: float

    @property
    def difference(self) -> float:
        """Percent by which the formula is above the paper."""
        return 100 * (self.seconds / self.paper - 1)


def operations() -> dict[str, float]:
    """Operations of each of WAYS, with text encoder and VAE."""
    full_hd, two_k = Setting(1920, 1080, FRAMES, DRAFT_STEPS, REFINER_STEPS), Setting(2560, 1440, FRAMES, DRAFT_STEPS)
    cascade = Setting(1920, 1080, FRAMES, DRAFT_STEPS, CASCADE_STEPS)
    counted = (_single_stage(full_hd), *(make_plan(each).flops for each in (cascade, full_hd, two_k)))
    return {way: flops.total for way, flops in zip(WAYS, counted, strict=True)}


def _single_stage(setting: Setting) -> Flops:
    """Stage I's network at full size, and the decoder."""
    networks, video = setting.networks, setting.padded
    text = make_plan(setting).phases[0].flops
    evaluations = dit_flops(networks.stage1, latent_shape(video)) * (CONTEXTS * DRAFT_STEPS)
    return text + evaluations + decode_flops(networks.vae, *video)


def figure1() -> tuple[list[Bar], float]:
    """The bars, and the rate in operations a second: the geometric mean of the rates that each bar would need."""
    counted = operations()
    rate = math.exp(sum(math.log(counted[way] / PAPER[way]) for way in WAYS) / len(WAYS))
    return [Bar(way, counted[way], counted[way] / rate, PAPER[way]) for way in WAYS], rate


def text() -> str:
    """The section of the page, in Markdown."""
    bars, rate = figure1()
    flash = next(bar for bar in bars if bar.way == WAYS[2])
    lines = [
        f"## {TITLE}\n",
        "The planner counts the operations of the official networks (5B and 2B) for 49 frames; seconds are these "
        f"divided by {rate / 1e12:.0f} TFLOP/s, the one constant that is fitted to the paper's four numbers. Nothing "
        "here was run.\n",
        "| | PFLOP | seconds by the formula | seconds in the paper | difference | times FlashVideo |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {bar.way} | {bar.operations / 1e15:.1f} | {bar.seconds:.1f} | {bar.paper:.1f} | {bar.difference:+.1f} % "
        f"| {bar.seconds / flash.seconds:.1f} |"
        for bar in bars
    ]
    return "\n".join(lines) + "\n"


def agreement() -> tuple[int, int]:
    """How many bars are within TOLERANCE of the paper's, and of how many."""
    bars, _ = figure1()
    return sum(abs(bar.difference) <= TOLERANCE for bar in bars), len(bars)
