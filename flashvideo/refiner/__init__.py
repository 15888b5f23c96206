"""Stage II from frames to frames: in temporal windows and spatial tiles, resumable."""

from .run import Networks, RefineRun, RefineSettings, refine_frames

__all__ = [
    "Networks",
    "RefineRun",
    "RefineSettings",
    "refine_frames",
]
