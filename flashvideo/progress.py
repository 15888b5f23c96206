"""What long work is reported with."""

from __future__ import annotations

from collections.abc import Callable

# Called with what is done and all there is to do: frames, bytes or steps. May raise, to stop the work.
Progress = Callable[[float, int], None]
# The same for work in phases, whose name comes first ("encode", "checksum", ...).
PhaseProgress = Callable[[str, float, int], None]


def no_progress(_done: float, _total: int) -> None:
    """Nothing is reported."""


def no_phase_progress(_phase: str, _done: float, _total: int) -> None:
    """Nothing is reported."""
