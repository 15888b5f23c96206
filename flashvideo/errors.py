"""How a command of `python -m flashvideo` ends early: refused with a message, or stopped by a signal.

Nothing here needs PyTorch, which takes seconds to import.
"""

from __future__ import annotations

import signal
import sys

_SIGNAL_EXIT = 128  # plus the signal's number is the exit code of a program that a signal ended


class CommandError(Exception):
    """A command can't be carried out; the message gives the reason in the user's words.

    `hint` names the option of the command line that helps; a node, which has no such options, shows the message alone.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def with_hint(self) -> str:
        """The message, and the hint after it."""
        return f"{self} {self.hint}".rstrip()


class CheckpointError(ValueError):
    """A file that can't be used as asked; the message says which file, why, and what it seems to be instead."""


def exit_code(signal_number: int | None) -> int:
    """The exit code of a program that the signal of this number ended; 0 if none did."""
    return 0 if signal_number is None else _SIGNAL_EXIT + signal_number


def cancelled(message: str) -> int:
    """Report a Ctrl+C on standard error, below the line with its ^C; returns the exit code."""
    sys.stderr.write(f"\n{message}\n")
    return exit_code(signal.SIGINT)
