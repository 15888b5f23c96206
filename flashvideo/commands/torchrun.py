"""What torchrun tells a process: how many there are, and which of them it is. Needs no PyTorch."""

from __future__ import annotations

import os


def processes() -> int:
    """How many processes torchrun has started for this run; 1 without torchrun."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() and "RANK" in os.environ else 1


def own_rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", "0")) if processes() > 1 else 0
