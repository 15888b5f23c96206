"""How a run reads and writes files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..video_files import AUTO, CRF, SOUNDS
from .run import SEGMENT_CHUNKS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileOptions:
    """How a video file is written.

    `crf`, `sound`, `codec`, `bits`: see `VideoFormat`. `deinterlace`: see `open_clip`. `fps`: frames a second of
    numbered pictures as the source, `start_number` of those as the result. `force`: replace what is there. `work`: the
    folder for unfinished work (default: the result's name + .unfinished), `anew`: start over. `about`
    (JSON): what else the result depends on, such as the networks' files; runs with a different value aren't resumed.
    `segment_chunks`: see `RefineRun`. `warn` gets warnings before the work starts, `note` what was chosen
    automatically (the strength).
    """

    crf: int = CRF
    sound: str = SOUNDS[0]
    codec: str = AUTO
    bits: int | None = None
    deinterlace: bool = False
    fps: float | None = None
    start_number: int | None = None
    force: bool = False
    work: Path | None = None
    anew: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)
    segment_chunks: int = SEGMENT_CHUNKS
    warn: Callable[[str], None] = log.warning
    note: Callable[[str], None] = log.info
