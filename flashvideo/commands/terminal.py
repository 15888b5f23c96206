"""What commands say in a terminal: lines, bars, exit codes."""

from __future__ import annotations

import sys

from tqdm import tqdm

# Exit codes. 2 is argparse's.
REFUSED = 1  # nothing was done, or not all of it
DAMAGED = 3  # all was done that could be: the source is damaged
CANCELLED = 130  # by Ctrl+C
TERMINATED = 143


def say(line: str) -> None:
    """Print a line of a command's result."""
    sys.stdout.write(line + "\n")


class ProgressBars:
    """A bar for each phase of a command, in bytes, on standard error."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes of a phase are done."""
        if self._bar is None or self._bar.desc != phase:
            self.close()
            self._bar = tqdm(total=total, desc=phase, unit="B", unit_scale=True)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Finish the bar on display."""
        if self._bar is not None:
            self._bar.close()
