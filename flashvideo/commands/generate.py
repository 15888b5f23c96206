"""`python -m flashvideo generate WORDS OUT`: a video from words without ComfyUI, draft and refined."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..arguments import real, whole
from ..config import STAGE1_SCALE
from .options import (
    NO_SOURCE_OPTIONS,
    add_farm_options,
    add_file_options,
    add_model_options,
    add_refiner_options,
    add_size_options,
)


def add_generate(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "generate",
        description="Make a video from words: a draft (stage I), stored without loss beside OUT, which is then refined "
        "(stage II). If the draft exists already, it is only refined; an interrupted run resumes.",
    )
    parser.add_argument("prompt", metavar="WORDS", help="what the video shows; with --prompts a file")
    parser.add_argument(
        "target", metavar="OUT", type=Path, help="the file to write (.mp4, .mov, .mkv); with --prompts a folder"
    )
    parser.add_argument(
        "--prompts",
        action="store_true",
        help="WORDS is a text file with a prompt on each line, or a JSON object such as "
        '{"prompt": "a red kite", "seed": 3, "size": "1920x1080"} (also: draft_size, frames); OUT is a folder, where '
        "the video of line 12 is 0012.mp4",
    )
    group = parser.add_argument_group("draft")
    group.add_argument("--draft-size", metavar="WxH", help="multiples of 16 (default: 480x256; Nano: 112x64)")
    group.add_argument("--frames", type=whole, metavar="N", help="4n+1 (default: 49; Nano: 17)")
    group.add_argument("--draft-steps", type=whole, default=50, metavar="N", help="useful: 30 to 50 (default: 50)")
    group.add_argument("--draft-cfg", type=real, default=STAGE1_SCALE, metavar="F", help="useful: 6 to 8 (default: 8)")
    group.add_argument("--draft-only", action="store_true", help="make the draft only")
    add_size_options(parser.add_argument_group("size of the result (default: --short-side 1080; Nano: --scale 4)"))
    add_refiner_options(parser.add_argument_group("refiner"))
    models = parser.add_argument_group("models")
    models.add_argument("--draft-model", metavar="FILE", type=Path, help="stage I (default: the built-in Nano)")
    add_model_options(models)
    add_file_options(parser.add_argument_group("files"))
    parser.set_defaults(**NO_SOURCE_OPTIONS)
    add_farm_options(parser.add_argument_group("several cards, with --prompts"))
    parser.set_defaults(run=_generate, ranks=None, footage=False)  # see `refine`


def _generate(options: argparse.Namespace) -> int:
    from .run_generate import run  # brings PyTorch, which help and mistakes don't wait for

    return run(options)
