"""Versions of a video beside each other, to judge what the refiner did: in one picture, or on a page (`page`)."""

from .pictures import LAYOUTS, compare

__all__ = ["LAYOUTS", "compare"]
