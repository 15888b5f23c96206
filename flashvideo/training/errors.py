"""What can go wrong in training, said so that it can be put right."""

from __future__ import annotations

from ..errors import CommandError


class TrainingError(CommandError):
    """Training can't start or go on; the message says why, and what is kept."""
