"""Estimates of a video's memory and time before it is made, and the best settings within a budget."""

from .plan import (
    MAX_STEPS,
    NANO,
    OFFICIAL,
    PRECISIONS,
    NetworkConfigs,
    Phase,
    Plan,
    Precision,
    Setting,
    make_plan,
)

__all__ = [
    "MAX_STEPS",
    "NANO",
    "OFFICIAL",
    "PRECISIONS",
    "NetworkConfigs",
    "Phase",
    "Plan",
    "Precision",
    "Setting",
    "make_plan",
]
