"""Which real clips are never trained on: a rule that depends only on a file's name.

So the same clips are held out on every computer and in every run, whatever is fetched later.
"""

from __future__ import annotations

import hashlib
import re

HELD_OUT_DIGITS = "01"  # first hexadecimal digits of a name's SHA-256: one clip of eight
# Clips that results are compared on; also bikes-2.mp4 or carphone_pristine.mp4.
_TEST_ONLY = re.compile(r"(bikes|carphone|bigbuckbunny)(?![a-z0-9])", re.IGNORECASE)
# Clips of the workflow templates with the same content as a held-out one: the same video before or after an
# enhancement, another person in the same scene, another rendering of the same model.
_TWINS = frozenset((
    "api_bfl_flux_video_upscale-2.webp",
    "api_tripo_p2_image_to_model-1.webp",
    "utility_seedvr2_3b_int8_upscale_video-2.webp",
    "video_wan21_scail2_character_replacement-1.webp",
))  # fmt: skip

TRAIN, VALIDATION, TEST, UNUSED = "train", "validation", "test", "unused"


def split_of(name: str) -> str:
    """Which split a file of this base name, such as "clip.mp4", belongs to.

    "validation": its SHA-256 (UTF-8) begins with 0 or 1. "test": bikes and carphone. "unused": it shows what a
    held-out clip shows. "train": all others.
    """
    if _TEST_ONLY.match(name):
        return TEST
    if hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[0] in HELD_OUT_DIGITS:
        return VALIDATION
    return UNUSED if name in _TWINS else TRAIN
