"""`python -m flashvideo refine IN OUT`: refine a video, a picture or a folder of videos without ComfyUI."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import (
    add_farm_options,
    add_file_options,
    add_model_options,
    add_refiner_options,
    add_size_options,
    add_source_options,
)


def add_refine(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "refine",
        description="Give a video real detail: same frames, same times, same sound. Interrupted runs resume when the "
        "same command is run again.",
    )
    parser.add_argument(
        "source", metavar="IN", type=Path, help="a video, a picture, pictures like shot/%%04d.png, a folder of videos"
    )
    parser.add_argument(
        "target", metavar="OUT", type=Path, help="the file to write (.mp4, .mov, .mkv), out/%%04d.png, or a folder"
    )
    add_size_options(parser.add_argument_group("size of the result (default: --short-side 1080)"))
    group = parser.add_argument_group("refiner")
    group.add_argument(
        "--prompt",
        help="what the video shows. Without a prompt there is no guidance: the refiner gets an empty text, and --cfg "
        "is 1",
    )
    add_refiner_options(group)
    add_model_options(parser.add_argument_group("models"))
    files = parser.add_argument_group("files")
    add_source_options(files)
    add_file_options(files)
    add_farm_options(parser.add_argument_group("several cards"))
    _add_trial_options(parser.add_argument_group("a test before"))
    # `ranks`: the processes that torchrun has started, if any. `footage`: see `ModelOptions`.
    parser.set_defaults(run=_refine, ranks=None, footage=True)


def _add_trial_options(group: argparse._ArgumentGroup) -> None:
    """The trial, and its place."""
    group.add_argument(
        "--try",
        dest="trial",
        action="store_true",
        help="refine only a tenth of the picture, of the first --window frames and without sound, as it would come out "
        "within the whole; write it beside OUT (out.mp4: out.try.mp4, replaced each time), and say how long all of it "
        "will take",
    )
    group.add_argument(
        "--try-at",
        metavar="X,Y",
        help="--try elsewhere: the tenth's middle, in percent from the left and from the top (default: 50,50)",
    )


def _refine(options: argparse.Namespace) -> int:
    from .run_refine import run  # brings PyTorch, which help and mistakes don't wait for

    return run(options)
