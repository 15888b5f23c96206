"""How command lines are read: numbers that are numbers, and one sentence for what isn't."""

from __future__ import annotations

import argparse
import math
import re
from typing import NoReturn

_SHOWN = 40  # characters of what was typed
_LARGEST = 2**64  # whole numbers of a command line stay below: seeds go furthest
_WHOLE = re.compile(r"[+-]?[0-9]+")
_REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
_SIZE = re.compile(r"([0-9]{1,9})x([0-9]{1,9})", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one sentence, instead of after a list of all options."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}. See {self.prog} --help.\n")


def whole(text: str) -> int:
    """A whole number, as an option's type."""
    if not _WHOLE.fullmatch(text.strip()) or len(text) > _SHOWN or abs(int(text)) >= _LARGEST:
        raise argparse.ArgumentTypeError(f"takes a whole number; got {shown(text)}")
    return int(text)


def positive(text: str) -> int:
    """A whole number from 1 on, as an option's type."""
    if whole(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {shown(text)}")
    return int(text)


def real(text: str) -> float:
    """A finite number, as an option's type."""
    if len(text) > _SHOWN or not _REAL.fullmatch(text.strip()) or not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"takes a number; got {shown(text)}")
    return float(text)


def duration(text: str) -> float:
    """A number from 0 on, as an option's type."""
    if real(text) < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more; got {shown(text)}")
    return float(text)


def width_and_height(text: str) -> tuple[int, int] | None:
    """Two sides such as 1920x1080; None if that isn't what the text says."""
    found = _SIZE.fullmatch(text.strip())
    return None if found is None else (int(found[1]), int(found[2]))


def shown(text: str) -> str:
    """What was typed, shortened, as a message shows it."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
