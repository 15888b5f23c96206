"""`python -m flashvideo refine IN OUT --try`: a tenth of the picture first, and how long all of it will take."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..arguments import real, shown
from ..errors import CommandError
from ..planner.report import duration
from ..planner.report import size as memory_size
from ..refiner.run import REFINE, Networks, RefineSettings
from .chosen import OutputOptions, file_options
from .terminal import DAMAGED, ProgressBars, say, warn


def trial_place(options: argparse.Namespace) -> tuple[float, float] | None:
    """The options --try and --try-at: the trial's place, None without a trial. Raises CommandError."""
    if options.try_at is None:
        return (50.0, 50.0) if options.trial else None
    try:
        across, down = map(real, options.try_at.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        across = down = -1.0
    if not (0 <= across <= 100 and 0 <= down <= 100):
        raise CommandError(f"--try-at takes two percentages, such as 50,50; got {shown(options.try_at)}.")
    return across, down


def run_trial(
    networks: Networks,
    source: Path,
    target: Path,
    settings: RefineSettings,
    output: OutputOptions,
    place: tuple[float, float],
) -> int:
    """Refine a part, and report what it took; returns the exit code. Raises CommandError for invalid input."""
    from ..planner.trial import whole_run
    from ..refiner.trial import trial_path, try_file

    options = file_options(output, note=warn, warn=warn)
    with ProgressBars("frame", {REFINE: "window"}) as bars:
        try:
            trial = try_file(networks, source, target, settings, options, place, on_progress=bars)
        except ValueError as error:
            raise CommandError(str(error)) from error
    whole, crop = whole_run(trial, networks), trial.crop
    part = f"{crop.size} of {trial.size} pixels ({trial.share:.0%}), from {crop.left},{crop.top} on"
    say(f"{trial_path(target)}: {part}; {trial.frames} of {trial.count} frames; strength {trial.settings.strength}")
    for text in trial.damage:
        say(f"  {text}")
    say(f"The test took {duration(trial.total)}. All of it will take about {duration(whole.seconds)} on this device.")
    if trial.peak is not None:
        say(
            f"Peak memory of the card: {memory_size(trial.peak)} in the test, about {memory_size(whole.memory)} for "
            "all of it."
        )
    return DAMAGED if trial.damage else 0
