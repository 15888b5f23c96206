"""The best settings within a budget of memory and time: one setting changed, or several where one is not enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ..config import latent_frames, video_frames
from ..devices import GIB
from ..frames import MAX_SIDE
from .plan import NANO, Plan, Setting, make_plan
from .speed import Rates

RESERVED = GIB  # of a card, for the driver, the desktop and fragmentation
LADDER = {"540p": 540, "720p": 720, "1080p": 1080, "2K": 1440}  # pixels of the shorter side
LONGEST = video_frames(121)  # frames; a minute at the official 8 a second
OFFERED = ("bf16", "fp8")  # precisions to choose from; fp32 gives no visibly better video

RatesOf = Callable[[Setting], Rates]


@dataclass(frozen=True)
class Budget:
    """The limits: `memory` of the card in bytes, `seconds` for the whole run; None is no limit."""

    memory: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("memory", self.memory), ("seconds", self.seconds)):
            if value is not None and not value > 0:
                raise ValueError(f"the budget's {name} must be more than 0; got {value:g}.")


@dataclass(frozen=True)
class Advice:
    """The best plans within a budget.

    `precision`, `length` and `resolution` are the best plans with only that setting changed, None where no value of it
    is within the budget. `nearest` is the request, or the plan closest to it with several settings changed; None if
    even `least`, the cheapest plan, exceeds the budget.
    """

    fits: bool
    precision: Plan | None
    length: Plan | None
    resolution: Plan | None
    nearest: Plan | None
    least: Plan


def on_card(setting: Setting, memory: float | None) -> Setting:
    """The setting on a card with `memory` bytes; None for no limit."""
    return replace(setting, memory=None if memory is None else max(memory - RESERVED, 0.0))


def advise(setting: Setting, budget: Budget, rates: RatesOf) -> Advice:
    """Find the best settings within a budget. `rates` gives the device's speed with a setting's networks."""
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
        """The setting's plan if it is within the budget, else None."""
        plan = make_plan(setting)
        if self.budget.memory is not None and plan.memory > self.budget.memory - RESERVED:
            return None
        # Only measured where time is limited: it takes a second.
        if self.budget.seconds is not None and self.rates(setting).seconds(plan.flops) > self.budget.seconds:
            return None
        return plan

    def first(self, settings: Iterable[Setting]) -> Plan | None:
        """The plan of the first setting that is within the budget."""
        return next((plan for setting in settings if (plan := self.affordable(setting))), None)

    def longest(self, setting: Setting, limit: int) -> Plan | None:
        """The most frames up to `limit` by bisection: more frames never cost less."""
        best, low, high = None, 1, latent_frames(limit)
        while low <= high:
            middle = (low + high) // 2
            plan = self.affordable(replace(setting, frames=video_frames(middle)))
            best, low, high = (plan, middle + 1, high) if plan else (best, low, middle - 1)
        return best

    def nearest(self, setting: Setting) -> Plan | None:
        """Reduce precision first, then resolution, then length; Nano comes last."""
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
    """The setting in every offered precision, the best first."""
    names = OFFERED if setting.precision in OFFERED else (setting.precision, *OFFERED)
    return [replace(setting, precision=name) for name in names]


def _miniature(setting: Setting) -> Setting:
    return replace(setting, networks=NANO)


def _sizes(setting: Setting) -> list[Setting]:
    """The setting at its own size and at every size of LADDER in its aspect ratio, the largest first."""
    sizes = {(setting.width, setting.height), *(rung_size(setting, rung) for rung in LADDER)}
    settings = (replace(setting, width=width, height=height) for width, height in sizes)
    return sorted((size for size in settings), key=_pixels, reverse=True)


def _pixels(setting: Setting) -> int:
    return setting.width * setting.height


def rung_size(setting: Setting, rung: str) -> tuple[int, int]:
    """Width and height of a size of LADDER in the setting's aspect ratio; even, as video files need it."""
    scale = LADDER[rung] / min(setting.width, setting.height)
    width, height = (min(MAX_SIDE, 2 * round(side * scale / 2)) for side in (setting.width, setting.height))
    return width, height


def size_name(setting: Setting) -> str:
    """A size in words: "1080p (1920x1080)", or the numbers alone."""
    size = f"{setting.width}x{setting.height}"
    short = min(setting.width, setting.height)
    return next((f"{rung} ({size})" for rung, side in LADDER.items() if side == short), size)
