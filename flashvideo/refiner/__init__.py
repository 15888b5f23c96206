"""Stage II from frames to frames: in windows of time and tiles of the picture, resumable."""

from .run import Networks, RefineRun, RefineSettings, refine_frames

__all__ = [
    "Networks",
    "RefineRun",
    "RefineSettings",
    "refine_frames",
]
