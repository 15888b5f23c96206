"""What commands show in a terminal: lines, progress bars, exit codes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from types import TracebackType

from tqdm import tqdm

from ..errors import exit_code

# Exit codes. 2 is argparse's.
REFUSED = 1  # nothing was done, or not all of it
DAMAGED = 3  # all was done that could be: the source is damaged
BEYOND_BUDGET = 4  # a plan
CANCELLED = exit_code(signal.SIGINT)  # by Ctrl+C
TERMINATED = exit_code(signal.SIGTERM)

BYTES = "B"
REPOSITORY = "https://github.com/flashvideo/ComfyUI-FlashVideo"


def say(line: str) -> None:
    """Print a line of a command's result."""
    sys.stdout.write(line + "\n")


def warn(line: str) -> None:
    """Print a line beside a command's result, on standard error."""
    sys.stderr.write(line + "\n")


class ProgressBars:
    """A bar for each phase of a command on standard error; a `PhaseProgress`, and a context that closes the last bar.

    `unit` is what is counted, `units` are those of phases that count something else. `leave` keeps finished bars.
    """

    def __init__(self, unit: str = BYTES, units: Mapping[str, str] | None = None, *, leave: bool = True) -> None:
        self._unit, self._units, self._leave = unit, units or {}, leave
        self._bar: tqdm | None = None

    def __call__(self, phase: str, done: float, total: int) -> None:
        """Show that `done` of `total` units of a phase are done. A new phase finishes the bar of the one before."""
        if self._bar is None or self._bar.desc != phase:
            self.close()
            unit = self._units.get(phase, self._unit)
            # What an earlier run has done doesn't count for the speed.
            self._bar = tqdm(
                total=total, desc=phase, unit=unit, unit_scale=unit == BYTES, initial=round(done, 2), leave=self._leave
            )
        self._bar.total = total
        self._bar.update(round(done - self._bar.n, 2))

    def __enter__(self) -> ProgressBars:
        """Nothing is shown before the first report."""
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Finish the bar on display."""
        self.close()

    def close(self) -> None:
        """Finish the bar on display, if any."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None
