"""Constant quality in time: whether what is made looks equally good from frame to frame.

The VAE works in chunks of frames and stage II in windows. Quality that comes and goes with their period is a beat that
a viewer sees, even where the mean is as good.
"""

from __future__ import annotations

import dataclasses

from .acceptance import BICUBIC, CODED_TRUTH, REFINED
from .assemble import TRUTH_ROW, table_of
from .clips import Suite, usable
from .evaluation import CODED, LONG, TRUTH, Method
from .lab import Lab
from .results import TableResult
from .swings import CHUNK_PERIOD, WINDOW_PERIOD


def constancy(lab: Lab) -> TableResult:
    """Clips that are longer than a window: the VAE alone, and the refiner as it runs long videos."""
    clips = lab.small_suite()
    source = dataclasses.replace(clips.source, frames=lab.settings.long_frames)
    real = [dataclasses.replace(clip, rate=None) for clip in clips.real]
    suite = Suite(source, clips.count, clips.draft, usable(real, source))
    refined = dataclasses.replace(lab.refiner(), kind=LONG)
    ways = [(TRUTH_ROW, Method(TRUTH)), (BICUBIC, Method("bicubic")), (CODED_TRUTH, Method(CODED)), (REFINED, refined)]
    about = (
        "Each frame's PSNR above the enlarged draft's, so that what the clip shows counts for little, and how far it "
        f"swings, as a root mean square, with the period of the VAE's chunks, {CHUNK_PERIOD} frames, and of stage II's "
        f"windows, {WINDOW_PERIOD}. A viewer loses by quality that varies: the loss is how far the PSNR of the whole "
        "clip is below the mean of its frames'."
    )
    return table_of(lab, "time", "Constant quality in time", about, ways, suite)
