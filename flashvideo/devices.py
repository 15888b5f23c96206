"""The device that a command works on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import CommandError

if TYPE_CHECKING:
    import torch


def open_device(name: str | None) -> torch.device:
    """The device of this name, or without one the best there is. Raises CommandError if it isn't there."""
    import torch  # commands that need no device start without it

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch says it in one way or the other
        raise CommandError(f"There is no device {name!r} here ({str(error).splitlines()[0]}).") from error
