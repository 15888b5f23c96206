"""A plan as text: a table of the phases, which one dominates, which card it fits, and settings within a budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..config import TEMPORAL_FACTOR
from ..devices import GIB
from .budget import LONGEST, RESERVED, Advice, Budget, RatesOf, on_card, size_name
from .farm import LIMITS, FarmRun
from .flops import Flops
from .plan import Phase, Plan, Setting, make_plan
from .speed import Rates
from .together import Together

CARDS = (4, 6, 8, 10, 12, 16, 24, 32, 40, 48, 80, 96, 141)  # GiB of graphics cards
TERA = 1e12
KINDS = {"matmul": "matrix products", "attention": "attention", "convolution": "convolution"}
FRAMES_A_SECOND = 8  # of FlashVideo's own drafts
TOGETHER_ROW = "{:<8}{:>14}{:>14}{:>12}"
PAYS = 0.9  # of the time with fewer cards
FARM_ROW = "{:<8}{:>14}{:>14}{:>10}"
ROW = "{:<14}{:>9}{:>12}{:>12}{:>14}"


def report(plan: Plan, rates: Rates | None) -> str:
    """The table of the phases and its summary; without rates no times."""
    lines = [f"FlashVideo plan: {describe(plan.setting)}", ""]
    lines.append(ROW.format("phase", "tokens", "TFLOP", "memory", "time"))
    for phase in plan.phases:
        time = _time(rates, phase.flops)
        lines.append(ROW.format(phase.name, phase.tokens or "-", _tera(phase.flops.total), size(phase.memory), time))
    time = _time(rates, plan.flops)
    lines.append(ROW.format("all", "", _tera(plan.flops.total), size(plan.memory), time))
    return "\n".join([*lines, "", *_summary(plan, rates)])


def _time(rates: Rates | None, flops: Flops) -> str:
    return duration(rates.seconds(flops)) if rates else "-"


def _summary(plan: Plan, rates: Rates | None) -> Iterator[str]:
    cards = [make_plan(on_card(plan.setting, card * GIB)) for card in CARDS]
    card = next((card for card, there in zip(CARDS, cards, strict=True) if _fits(there.memory, card)), None)
    fits = f"Fits a card with {card} GiB" if card else "Fits no single card"
    peak = plan.peak
    parts = f"{size(peak.weights)} of weights and {size(peak.activations)} of work space"
    left = f"{_gibibytes(RESERVED)} GiB of a card is left free"
    if card and not _fits(plan.memory, card):
        here = "Without a limit" if plan.setting.memory is None else "With the memory that is planned for here"
        yield f"{fits}, where the VAE works in smaller tiles; {left}."
        yield f"{here} {peak.name} takes the most: {parts}."
    else:
        yield f"{fits}. Here {peak.name} needs the most memory, {parts}; {left}."
    tiled = [phase for phase in plan.phases if phase.tile and not phase.tokens]
    if tiled:
        names = " and ".join(f"{phase.name} (tiles of {phase.tile} pixels)" for phase in tiled)
        yield f"To fit, {names} work in tiles, which takes longer; the picture stays the same."
    seen = next((phase for phase in plan.phases if phase.tile and phase.tokens), None)
    if seen:
        yield f"{seen.name} sees tiles of {seen.tile} pixels, as you chose: an approximation."
    streamed = next((card for card, there in zip(CARDS, cards, strict=True) if _fits(there.activations, card)), None)
    if streamed and (card is None or streamed < card):
        yield f"With {streamed} GiB it runs more slowly: ComfyUI keeps some weights in main memory."
    if rates is None:
        yield "No times: this computer has no graphics card. Name one with --card, or ask for --device cpu."
        return
    slowest = max(plan.phases, key=lambda phase: rates.seconds(phase.flops))
    share = rates.seconds(slowest.flops) / rates.seconds(plan.flops)
    yield f"Most of the time goes into {slowest.name} ({share:.0%}), mostly {_kind(slowest, rates)}."
    speeds = ", ".join(f"{getattr(rates, kind) / TERA:.3g} {name}" for kind, name in KINDS.items())
    if rates.measured:
        yield f"Times are for this device ({rates.device}), from a short test of its speed: TFLOP a second {speeds}."
    else:
        yield (
            f"Times are estimates for {rates.device} from its data sheet, right within a factor of two: "
            f"TFLOP a second {speeds}."
        )


def _fits(memory: float, card: int) -> bool:
    return memory <= card * GIB - RESERVED


def _kind(phase: Phase, rates: Rates) -> str:
    slowest = max(KINDS, key=lambda kind: getattr(phase.flops, kind) / getattr(rates, kind))
    return KINDS[slowest]


def advice_report(plan: Plan, advice: Advice, budget: Budget, rates: RatesOf) -> str:
    """The settings that the budget allows."""
    limits = []
    if budget.memory is not None:
        limits.append(f"{_gibibytes(budget.memory)} GiB")
    if budget.seconds is not None:
        limits.append(duration(budget.seconds))
    limit = f"a budget of {' and '.join(limits)}"

    def cost(found: Plan) -> str:
        time = f", {duration(rates(found.setting).seconds(found.flops))}" if budget.seconds is not None else ""
        return f"{size(found.memory)}{time}"

    lines = [f"This is within {limit}." if advice.fits else f"This is beyond {limit}."]
    if not advice.fits and advice.nearest is not None:
        lines.append(f"Nearest that is within it: {describe(advice.nearest.setting)} ({cost(advice.nearest)}).")
    if advice.nearest is None:
        least = advice.least
        own = f", plus {_gibibytes(RESERVED)} GiB that are left free" if budget.memory is not None else ""
        lines.append(f"No setting is: even {describe(least.setting)} needs {cost(least)}{own}.")
        return "\n".join(lines)
    lines.append("The best within it with only one setting changed:")
    for name, found, word in (
        ("model", advice.precision, _model),
        ("length", advice.length, _length),
        ("resolution", advice.resolution, lambda setting: size_name(setting)),
    ):
        best = "not enough on its own" if found is None else f"{word(found.setting)} ({cost(found)})"
        lines.append(f"  {name:<12}{best}")
    return "\n".join(lines)


def together_report(runs: Sequence[Together], link: float) -> str:
    """One video on 1, 2, 4, ... cards."""
    lines = ["This video on several cards together (torchrun):", ""]
    lines.append(TOGETHER_ROW.format("cards", "time", "efficiency", "received"))
    for run in runs:
        facts = duration(run.seconds), f"{run.efficiency:.0%}", size(run.received)
        lines.append(TOGETHER_ROW.format(run.cards, *facts))
    before, last = runs[-2:] if len(runs) > 1 else (runs[0], runs[0])
    if last.seconds > PAYS * before.seconds and len(runs) > 1:
        lines += ["", f"{last.cards} cards hardly pay beside {before.cards}."]
    assumed = f"{link / 1e9:.3g} GB a second reach a card, after its work and not beside it"
    alone = "Text and the draft's decoding aren't spread"
    weights = "Each card needs the memory above; --shard-weights shares the transformers' weights"
    return "\n".join([*lines, "", f"Assumed: {assumed}. {alone}. {weights}."])


def farm_report(runs: Sequence[FarmRun]) -> str:
    """A farm with 1, 2, 4, ... cards, and what its time follows from."""
    last = runs[-1]
    setting = last.setting
    lines = [f"{len(setting.seconds)} videos, {duration(sum(setting.seconds))} on one card without a break:", ""]
    lines.append(FARM_ROW.format("cards", "time", "efficiency", "failures"))
    for run in runs:
        share = f"{run.efficiency:.0%}"
        lines.append(FARM_ROW.format(run.setting.cards, duration(run.seconds), share, run.failures))
    best = max((run.setting.cards for run in runs if run.limit == "work"), default=1)
    lines.append("")
    if last.limit == "work":
        lines.append("More cards still pay.")
    else:
        lines.append(f"More than {best} cards don't pay: {LIMITS[last.limit]}.")
    lines.append(
        f"Assumed: {duration(setting.load)} until a card has its networks, {duration(setting.replace)} until one that "
        f"failed is replaced, up to {duration(setting.save)} of its work are repeated."
    )
    return "\n".join(lines)


def describe(setting: Setting) -> str:
    """A setting in a line."""
    steps = f"{setting.stage2_steps} steps"
    if setting.stage1_steps:
        steps = f"{setting.stage1_steps} + {steps}"
    return f"{size_name(setting)}, {_frames(setting.frames)}, {steps}, {_model(setting)}"


def _frames(count: int) -> str:
    return f"{count} frame{'s' if count > 1 else ''}"


def _model(setting: Setting) -> str:
    return f"{setting.networks.name} models in {setting.precision}"


def _length(setting: Setting) -> str:
    longer = " or more" if setting.frames > LONGEST - TEMPORAL_FACTOR else ""
    return f"{_frames(setting.frames)}{longer}, {setting.frames / FRAMES_A_SECOND:.3g} s at {FRAMES_A_SECOND} a second"


def size(count: float) -> str:
    """Bytes of memory for people: "512 MiB", "9.3 GiB"."""
    return f"{count / GIB:.1f} GiB" if count >= 0.95 * GIB else f"{count / GIB * 1024:.3g} MiB"


def _gibibytes(count: float) -> str:
    return f"{count / GIB:.3g}"


def duration(seconds: float) -> str:
    """A time for people: "0.4 s", "12 s", "2 min 5 s", "3 h 20 min", "3 days"."""
    if seconds < 10:
        return f"{max(seconds, 0.1):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.0f} days"


def _tera(operations: float) -> str:
    tera = operations / TERA
    return f"{tera:,.0f}" if tera >= 100 else f"{tera:.3g}"
