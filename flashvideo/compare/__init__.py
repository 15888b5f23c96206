"""Versions of a video beside each other, to judge what the refiner did.

In one picture (`pictures`), on a page of their own (`page`), or as a file that ComfyUI's page shows with a slider
(`preview`).
"""

from .pictures import LAYOUTS, compare

__all__ = ["LAYOUTS", "compare"]
