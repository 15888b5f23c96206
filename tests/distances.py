"""How far one tensor is from another."""

from __future__ import annotations

from torch import Tensor


def distance(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to the expected."""
    return float((found - expected).norm() / expected.norm())
