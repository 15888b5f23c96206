"""Errors of training that the user can fix."""

from __future__ import annotations

from ..errors import CommandError


class TrainingError(CommandError):
    """Training can't start or continue; the message gives the reason, and what is kept."""
