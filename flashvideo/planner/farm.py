"""Many videos on many cards, as `--ray` spreads them: a simulation, with cards that fail, and where it stops to scale.

Each card takes the longest video that is left. A card that fails loses what it did since the last save, is replaced,
loads the networks and resumes its video. One process hands the videos out, one after another.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .plan import Plan

DISK = 1e9  # bytes a second, assumed
START_SECONDS = 20.0  # of a worker's program, assumed; on a busy CPU it was measured so
HALF = 0.5  # of what the cards would do together: fewer, and more cards are said not to pay
LIMITS = {
    "work": "the cards are busy",
    "longest": "the longest video takes as long as one card needs for it",
    "start": "the cards load networks for longer than they work",
    "calls": "one process hands out the videos, and can't do it faster",
}


@dataclass(frozen=True)
class FarmSetting:
    """`seconds`: of each video on one card. `load`: seconds until a card has its networks.

    `failure_hours`: how long a card works until it fails, on average; infinite for never. `replace`: seconds until
    another process takes its place. `save`: seconds of work between two saves, at most. `call`: seconds that the
    process that hands out videos needs for one. Raises ValueError for invalid values.
    """

    seconds: Sequence[float]
    cards: int
    load: float = 60.0
    failure_hours: float = math.inf
    replace: float = 30.0
    save: float = 60.0
    call: float = 0.005

    def __post_init__(self) -> None:
        if self.cards < 1 or not self.seconds:
            raise ValueError("a farm needs a card and a video.")
        if self.failure_hours <= 0 or min(self.load, self.replace, self.save, self.call, *self.seconds) < 0:
            raise ValueError("times must not be negative, and cards must work for a while until they fail.")


@dataclass(frozen=True)
class FarmRun:
    """What a simulation gave. `seconds`: until the last video is done. `repeated`: seconds of work done twice."""

    setting: FarmSetting
    seconds: float
    failures: int
    repeated: float

    @property
    def efficiency(self) -> float:
        """The videos' own time, divided by the time of all cards until the end."""
        return sum(self.setting.seconds) / (self.seconds * self.setting.cards)

    @property
    def limit(self) -> str:
        """What the time follows from, one of LIMITS."""
        setting = self.setting
        if self.efficiency > HALF:
            return "work"
        bounds = {
            "longest": max(setting.seconds),
            "start": setting.load,
            "calls": setting.call * len(setting.seconds),
        }
        return max(bounds, key=bounds.get)


def simulate(setting: FarmSetting, seed: int = 0) -> FarmRun:
    """Run the farm once; the same seed gives the same failures."""
    draw = random.Random(seed)
    waiting = sorted(setting.seconds)  # the longest last
    free = [(setting.load, card) for card in range(min(setting.cards, len(waiting)))]
    fails = [_next_failure(setting, draw) for _ in free]
    handed_out, end, failures, repeated = 0.0, 0.0, 0, 0.0
    while waiting:
        now, card = heapq.heappop(free)
        handed_out = max(now, handed_out) + setting.call
        now, left = handed_out, waiting.pop()
        while now + left > fails[card]:
            worked = max(0.0, fails[card] - now)
            lost = min(worked, draw.uniform(0, setting.save))
            left, repeated, failures = left - worked + lost, repeated + lost, failures + 1
            now = max(now, fails[card]) + setting.replace + setting.load
            fails[card] = now + _next_failure(setting, draw)
        end = max(end, now + left)
        heapq.heappush(free, (now + left, card))
    return FarmRun(setting, end, failures, repeated)


def _next_failure(setting: FarmSetting, draw: random.Random) -> float:
    return math.inf if math.isinf(setting.failure_hours) else draw.expovariate(1 / (3600 * setting.failure_hours))


def load_seconds(plan: Plan) -> float:
    """Until a card has the networks of a plan: from a disk of DISK, after Python has started."""
    return START_SECONDS + sum(phase.weights for phase in plan.phases) / DISK


def scaling(setting: FarmSetting) -> Iterator[FarmRun]:
    """The farm with 1, 2, 4, ... cards up to its own number."""
    return (simulate(replace(setting, cards=cards)) for cards in card_counts(setting.cards))


def card_counts(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return [*(2**power for power in range((most - 1).bit_length())), most]
