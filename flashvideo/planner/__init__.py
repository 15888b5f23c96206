"""What a video costs before it is made, and the best that a budget allows."""

from .plan import (
    GB,
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
    "GB",
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
