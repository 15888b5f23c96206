"""`python -m flashvideo plan`: memory and time of a video on this device, and the best settings within a budget."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import duration, positive, real, whole
from ..atomic_files import check_target, write_whole
from ..config import is_video_length
from ..devices import GIB, open_device
from ..errors import CommandError
from .terminal import BEYOND_BUDGET, say

if TYPE_CHECKING:
    from ..planner import Plan, Setting
    from ..planner.budget import Budget, RatesOf
    from ..planner.cards import Card
    from ..planner.farm import FarmRun
    from ..planner.speed import Rates

BUILT_IN = ("official", "nano")
NAME_A_CARD = "name a card with --card, or ask for --device cpu"
MAX_CLIPS, MAX_CARDS = 100_000, 10_000  # seconds of simulation
MAX_TOGETHER = 256  # cards on one video
NO_DRAFT_HELP = "steps of the draft (default 50); 0 plans the refining of an existing clip"


def add_plan(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "plan",
        description="Estimates memory and time of a video on this device, or on a card that you name, and finds the "
        "best settings within a budget. Exit code 4: the video is beyond the budget.",
    )
    parser.add_argument("--width", type=whole, default=1920, help="pixels of the final video (default 1920)")
    parser.add_argument("--height", type=whole, default=1080, help="pixels of the final video (default 1080)")
    parser.add_argument("--frames", type=whole, default=49, help="length of the video (default 49)")
    parser.add_argument("--stage1-steps", type=whole, default=50, metavar="N", help=NO_DRAFT_HELP)
    parser.add_argument("--steps", type=whole, default=4, metavar="N", help="steps of the refiner (default 4)")
    parser.add_argument(
        "--cfg", type=real, default=13.0, help="guidance of the refiner (default 13); 1 halves its work"
    )
    parser.add_argument(
        "--tile", type=whole, default=0, metavar="N", help="side in pixels of refine --tile; 0 (default): no tiles"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp8", "fp32"), default="bf16", help="precision (default bf16)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    parser.add_argument(
        "--model",
        nargs="+",
        default=["official"],
        metavar="MODEL",
        help="official (default), nano, or model files: parts without a file stay official",
    )
    parser.add_argument("--card", metavar="NAME", help="plan for this card, such as 4090: its memory, estimated times")
    parser.add_argument("--memory", type=real, metavar="GiB", help="a budget: memory of the card (default: this card)")
    parser.add_argument("--seconds", type=real, metavar="S", help="a budget: time for the video")
    group = parser.add_argument_group(
        "several cards",
        "One video on all of them, as torchrun spreads it; with --clips or --times many videos, as --ray spreads them.",
    )
    group.add_argument("--cards", type=positive, metavar="N", help="on so many cards, and on 1, 2, 4, ... of them")
    group.add_argument(
        "--link",
        type=real,
        metavar="GB",
        help="GB a second that reach a card from the others (default: half of what --card's link has, or 16)",
    )
    group.add_argument("--clips", type=positive, metavar="N", help="so many videos like this one")
    group.add_argument(
        "--times", type=Path, metavar="FILE", help="measured seconds of videos on one card, a number on each line"
    )
    group.add_argument(
        "--failure-hours", type=real, metavar="H", help="hours that a card works until it fails, on average"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw the plan as a picture")
    parser.add_argument("--json", action="store_true", help="write JSON instead of text")
    parser.set_defaults(run=_plan)


@dataclass(frozen=True)
class PlanOptions:
    """The command's options: `plot` is the picture to write, `as_json` asks for JSON instead of text.

    `rates` gives the speed; None where times would mean nothing. `cards` make one video together, and `link` bytes a
    second reach each of them.
    """

    setting: Setting
    budget: Budget
    rates: RatesOf | None
    plot: Path | None
    as_json: bool
    farm: FarmPlan | None = None
    cards: int | None = None
    link: float = 0.0


@dataclass(frozen=True)
class FarmPlan:
    """`clips` videos on `cards` cards; with `times`, measured ones, in turn. `failure_hours`: see `FarmSetting`."""

    clips: int
    cards: int
    times: tuple[float, ...]
    failure_hours: float


def _plan(options: argparse.Namespace) -> int:
    try:
        return 0 if _write_plan(plan_options(options)) else BEYOND_BUDGET
    except ValueError as error:
        raise CommandError(str(error)) from error


def plan_options(options: argparse.Namespace) -> PlanOptions:
    """The command's options. Raises CommandError and ValueError for invalid ones."""
    # Imported here, so that the other commands start at once.
    from ..planner import Setting
    from ..planner.budget import Budget, on_card
    from ..planner.cards import find_card, memory_of, rates_of
    from ..planner.speed import CalibratedRates

    if options.plot:
        if options.plot.suffix.lower() != ".png":
            raise CommandError(f"--plot writes a PNG picture; {options.plot} must end in .png.")
        check_target(options.plot, force=True)
    if options.stage1_steps and not is_video_length(options.frames):
        raise CommandError(
            f"--frames must be 1, 5, 9, ..., 49, ... (4n+1) for a draft; got {options.frames}. With --stage1-steps 0 "
            "a clip of any length is refined."
        )
    if options.card and options.device:
        raise CommandError("--card plans for another computer: leave --device out.")
    card = find_card(options.card) if options.card else None
    device = open_device(options.device)
    setting = Setting(
        width=options.width,
        height=options.height,
        frames=options.frames,
        stage1_steps=options.stage1_steps,
        stage2_steps=options.steps,
        cfg=options.cfg,
        tile=options.tile,
        precision=options.dtype,
        networks=_networks(options.model),
        device="cuda" if card else device.type,
    )
    memory = memory_of(card) if card else _card(device)
    budget = Budget(memory if options.memory is None else options.memory * GIB, options.seconds)
    rates: RatesOf | None = rates_of(card) if card else CalibratedRates(device)
    if card is None and device.type == "cpu" and _means_nothing(options):
        rates = None
    farm = _farm(options)
    if farm and not rates and not farm.times:
        raise CommandError(f"--clips needs times: {NAME_A_CARD}, or give --times.")
    together = None if farm else options.cards
    if together and not rates:
        raise CommandError(f"--cards needs times: {NAME_A_CARD}.")
    link = _link(options, card, together)
    return PlanOptions(on_card(setting, budget.memory), budget, rates, options.plot, options.json, farm, together, link)


def _link(options: argparse.Namespace, card: Card | None, together: int | None) -> float:
    """Bytes a second that reach a card from the others."""
    from ..planner.cards import link_of
    from ..planner.together import PCIE

    if options.link is None:
        return link_of(card) if card else PCIE
    if together is None:
        raise CommandError("--link is for one video on several cards: give --cards, without --clips.")
    if options.link <= 0:
        raise CommandError(f"--link must be above 0; got {options.link:g}.")
    return options.link * 1e9


def _farm(options: argparse.Namespace) -> FarmPlan | None:
    times = _measured(options.times) if options.times else ()
    if options.clips is None and not times:
        if options.failure_hours is not None:
            raise CommandError("--failure-hours is for many videos: give --clips or --times.")
        if options.cards and options.cards > MAX_TOGETHER:
            raise CommandError(f"--cards must be at most {MAX_TOGETHER} for one video; got {options.cards}.")
        return None
    hours = math.inf if options.failure_hours is None else options.failure_hours
    if hours <= 0:
        raise CommandError(f"--failure-hours must be above 0; got {hours:g}.")
    clips, cards = options.clips or len(times), options.cards or 1
    for name, value, most in (("clips", clips, MAX_CLIPS), ("cards", cards, MAX_CARDS)):
        if value > most:
            raise CommandError(f"--{name} must be at most {most}; got {value}.")
    return FarmPlan(clips, cards, times, hours)


def _measured(path: Path) -> tuple[float, ...]:
    """Seconds, a number on each line of a file. Raises CommandError."""
    from .chosen import existing_file  # brings PyTorch

    try:
        lines = existing_file(path).read_text(encoding="utf-8-sig").split()
        times = tuple(map(duration, lines))
    except (argparse.ArgumentTypeError, UnicodeDecodeError) as error:
        raise CommandError(f"{path} should hold a time in seconds on each line: {error}.") from error
    if not times:
        raise CommandError(f"{path} holds no times.")
    return times


def _means_nothing(options: argparse.Namespace) -> bool:
    """Whether times on the processor would: nobody asked for it, and the official models take weeks there."""
    return options.device is None and options.seconds is None and "nano" not in options.model


def _write_plan(options: PlanOptions) -> bool:
    """Show the plan; returns whether it is within the budget, if there is one."""
    from ..planner import make_plan
    from ..planner.budget import advise
    from ..planner.report import advice_report, farm_report, report, together_report
    from ..planner.together import together

    setting, budget, rates = options.setting, options.budget, options.rates
    plan = make_plan(setting)
    now = rates(setting) if rates else None
    limited = (budget.memory, budget.seconds) != (None, None)
    advice = advise(setting, budget, rates) if limited else None
    runs = _farm_runs(options.farm, plan, now) if options.farm else []
    shared = list(together(plan, now, options.link, options.cards)) if options.cards else []
    if options.as_json:
        shown = _as_json(plan, rates, advice)
        if shared:
            shown["together"] = [asdict(run) | {"efficiency": run.efficiency} for run in shared]
        if runs:
            shown["farm"] = [_run_as_json(run) for run in runs]
        text = json.dumps(shown, indent=2)
    else:
        text = report(plan, now)
        if advice:
            text += "\n\n" + advice_report(plan, advice, budget, rates)
        if runs:
            text += "\n\n" + farm_report(runs)
        if shared:
            text += "\n\n" + together_report(shared, options.link)
    say(text)
    if options.plot:
        from ..planner.plot import plot

        if now is None:
            raise CommandError(f"--plot shows times: {NAME_A_CARD}.")
        picture = plot(plan, now, budget)
        write_whole(options.plot, lambda part: picture.save(part, format="PNG"))
    return advice is None or advice.fits


def _farm_runs(farm: FarmPlan, plan: Plan, rates: Rates | None) -> list[FarmRun]:
    from ..planner.farm import FarmSetting, load_seconds, scaling

    times = farm.times or (rates.seconds(plan.flops),)
    seconds = tuple(times[index % len(times)] for index in range(farm.clips))
    return list(scaling(FarmSetting(seconds, farm.cards, load_seconds(plan), farm.failure_hours)))


def _run_as_json(run: FarmRun) -> dict[str, Any]:
    facts = {"cards": run.setting.cards, "seconds": run.seconds, "efficiency": run.efficiency, "limit": run.limit}
    return facts | {"failures": run.failures, "repeated_seconds": run.repeated}


def _networks(models: list[str]) -> Any:
    from ..checkpoints import open_checkpoint
    from ..planner import NANO, OFFICIAL

    networks = NANO if "nano" in models else OFFICIAL
    files = [model for model in models if model not in BUILT_IN]
    for file in files:
        checkpoint = open_checkpoint(Path(file))
        part = {"1": "stage1", "2": "stage2", "vae": "vae"}[checkpoint.stage]
        networks = replace(networks, **{part: checkpoint.config})
    return replace(networks, name="these") if files else networks


def _card(device: Any) -> float | None:
    """A CUDA card's memory in bytes, None for other devices."""
    import torch

    return float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def _as_json(plan: Any, rates: Any, advice: Any) -> dict[str, Any]:
    def costs(plan: Any) -> dict[str, Any]:
        setting = plan.setting
        chosen = ("width", "height", "frames", "stage1_steps", "stage2_steps", "cfg", "tile", "precision")
        return {
            **{name: getattr(setting, name) for name in chosen},
            "models": setting.networks.name,
            "memory_bytes": round(plan.memory),
            "flops": plan.flops.total,
            "seconds": rates(setting).seconds(plan.flops) if rates else None,
        }

    phases = [
        {
            "name": phase.name,
            "tokens": phase.tokens,
            "flops": asdict(phase.flops),
            "weight_bytes": round(phase.weights),
            "activation_bytes": round(phase.activations),
            "tile_pixels": phase.tile,
            "seconds": rates(plan.setting).seconds(phase.flops) if rates else None,
        }
        for phase in plan.phases
    ]
    result = {**costs(plan), "phases": phases, "rates": rates and asdict(rates(plan.setting))}
    if advice is not None:
        found = {name: getattr(advice, name) for name in ("precision", "length", "resolution", "nearest", "least")}
        result["budget"] = {"fits": advice.fits, **{name: each and costs(each) for name, each in found.items()}}
    return result
