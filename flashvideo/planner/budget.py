"""The best settings within a budget of memory and time: one thing changed at a time, or several where one won't do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ..config import latent_frames, video_frames
from ..frames import MAX_SIDE
from .plan import GB, NANO, Plan, Setting, make_plan
from .speed import Rates

RESERVED = GB  # of a card, for the driver, the desktop and memory lost between tensors
LADDER = {"540p": 540, "720p": 720, "1080p": 1080, "2K": 1440}  # pixels of the shorter side
LONGEST = video_frames(121)  # frames; a minute at the official 8 a second
OFFERED = ("bf16", "fp8")  # precisions to choose from; fp32 only looks better on paper

RatesOf = Callable[[Setting], Rates]


@dataclass(frozen=True)
class Budget:
    """What there is: `memory` of the card in bytes, `seconds` for the whole run; None doesn't count."""

    memory: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("memory", self.memory), ("seconds", self.seconds)):
            if value is not None and not value > 0:
                raise ValueError(f"the budget's {name} must be more than 0; got {value:g}.")


@dataclass(frozen=True)
class Advice:
    """What a budget allows.

    `precision`, `length` and `resolution` are the best plans with that one thing changed and the others as asked for,
    None where no value of it is within the budget. `nearest` is the request, or what comes closest with as much
    changed as it takes; None if `least`, the cheapest there is, goes beyond the budget too.
    """

    fits: bool
    precision: Plan | None
    length: Plan | None
    resolution: Plan | None
    nearest: Plan | None
    least: Plan


def on_card(setting: Setting, memory: float | None) -> Setting:
    """The setting as it runs on a card with so many bytes; None for no limit."""
    return replace(setting, memory=None if memory is None else max(memory - RESERVED, 0.0))


def advise(setting: Setting, budget: Budget, rates: RatesOf) -> Advice:
    """Look for the best settings within a budget. `rates` gives a device's speed with a setting's networks."""
    setting = on_card(setting, budget.memory)
    search = _Search(budget, rates)
    requested = search.affordable(setting)
    return Advice(
        fits=requested is not None,
        precision=search.first((*_precisions(setting), _miniature(setting))),
        length=search.longest(setting, LONGEST),
        resolution=search.first(_sizes(setting)),
        nearest=requested or search.nearest(setting),
        least=make_plan(replace(_sizes(_miniature(setting))[-1], frames=1, precision=OFFERED[-1])),
    )


@dataclass(frozen=True)
class _Search:
    budget: Budget
    rates: RatesOf

    def affordable(self, setting: Setting) -> Plan | None:
        """The setting's plan if it is within the budget."""
        plan = make_plan(setting)
        if self.budget.memory is not None and plan.memory > self.budget.memory - RESERVED:
            return None
        # Speed is asked for only where time counts: measuring it takes some.
        if self.budget.seconds is not None and self.rates(setting).seconds(plan.flops) > self.budget.seconds:
            return None
        return plan

    def first(self, settings: Iterable[Setting]) -> Plan | None:
        """The first that is within the budget."""
        return next((plan for setting in settings if (plan := self.affordable(setting))), None)

    def longest(self, setting: Setting, limit: int) -> Plan | None:
        """The most frames up to `limit`; bisected, since more frames never cost less."""
        best, low, high = None, 1, latent_frames(limit)
        while low <= high:
            middle = (low + high) // 2
            plan = self.affordable(replace(setting, frames=video_frames(middle)))
            best, low, high = (plan, middle + 1, high) if plan else (best, low, middle - 1)
        return best

    def nearest(self, setting: Setting) -> Plan | None:
        """Less precise before softer, softer before shorter, and the miniature last."""
        for start in (setting, _miniature(setting)):
            smaller = [size for size in _sizes(start) if _pixels(size) <= _pixels(setting)]
            plan = self.first(choice for size in smaller for choice in _precisions(size))
            if plan is None:
                shorter = (self.longest(choice, setting.frames) for choice in _precisions(smaller[-1]))
                plan = max(filter(None, shorter), key=lambda each: each.setting.frames, default=None)
            if plan is not None:
                return plan
        return None


def _precisions(setting: Setting) -> list[Setting]:
    """The setting in every precision worth offering, the best first."""
    names = OFFERED if setting.precision in OFFERED else (setting.precision, *OFFERED)
    return [replace(setting, precision=name) for name in names]


def _miniature(setting: Setting) -> Setting:
    return replace(setting, networks=NANO)


def _sizes(setting: Setting) -> list[Setting]:
    """The setting at every rung of the ladder in its own aspect ratio, and at its own size; the largest first."""
    sizes = {(setting.width, setting.height), *(rung_size(setting, rung) for rung in LADDER)}
    settings = (replace(setting, width=width, height=height) for width, height in sizes)
    return sorted((size for size in settings), key=_pixels, reverse=True)


def _pixels(setting: Setting) -> int:
    return setting.width * setting.height


def rung_size(setting: Setting, rung: str) -> tuple[int, int]:
    """Width and height of a rung of LADDER in the setting's aspect ratio; even, as video files want it."""
    scale = LADDER[rung] / min(setting.width, setting.height)
    width, height = (min(MAX_SIDE, 2 * round(side * scale / 2)) for side in (setting.width, setting.height))
    return width, height


def size_name(setting: Setting) -> str:
    """A size in words: "1080p (1920x1080)", or the numbers alone."""
    size = f"{setting.width}x{setting.height}"
    short = min(setting.width, setting.height)
    return next((f"{rung} ({size})" for rung, side in LADDER.items() if side == short), size)
