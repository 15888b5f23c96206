"""`python -m flashvideo generate WORDS OUT`: a video from words without ComfyUI, draft and refined."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from ..arguments import real, whole
from ..atomic_files import check_target
from ..color import DETAIL_SIZE
from ..errors import CommandError
from ..frames import TargetSize
from ..guidance import STAGE1_SCALE
from ..parallel import agree
from ..parallel.farm import check_farm
from .drafts import draft_options, draft_path, ensure_draft
from .on_workers import add_farm_options, farm_options
from .options import (
    NO_SOURCE_OPTIONS,
    add_file_options,
    add_model_options,
    add_refiner_options,
    add_size_options,
    existing_file,
)
from .prompts import Video, generate_all
from .refine import refine, refine_options

NANO_SCALE = 4.0  # from its draft to its refined video


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
    if options.prompts:
        return _generate_many(options)
    if options.ray is not None:
        raise CommandError("--ray spreads the videos of many prompts: it goes with --prompts.")
    video = _video(options)
    agree(options.ranks, lambda: check_target(options.target, force=options.force))
    ensure_draft(video.draft, video.draft_path, anew=options.anew, ranks=options.ranks)
    return 0 if options.draft_only else refine(video.refining)


def _generate_many(options: argparse.Namespace) -> int:
    if options.ranks is not None:
        raise CommandError("--prompts takes one process, or --ray: start it without torchrun.")
    path, folder = Path(options.prompt), options.target
    if not path.is_file() and folder.is_file():  # in the other order, as in `generate OUT --prompts FILE`
        path, folder = folder, path
    farm = farm_options(options)
    existing_file(path)
    if farm is not None:
        check_farm(farm)
    return generate_all(path, folder, options, _video)


def _video(options: argparse.Namespace) -> Video:
    """What the options ask for. Raises CommandError for invalid ones."""
    # Imported here, so that the other commands don't need PyAV.
    try:
        from ..video_files import CONTAINERS, check_codec
    except ModuleNotFoundError as error:
        raise CommandError(f"Video files need the package {error.name}: use ComfyUI's Python.") from error
    size = TargetSize("scale", scale=NANO_SCALE) if options.model is None else TargetSize()
    refining = refine_options(options, draft_path(options.target), size)
    if refining.settings.detail_size is None:  # stage II is trained to mend stage I's drafts, the miniature's, too
        refining = replace(refining, settings=replace(refining.settings, detail_size=DETAIL_SIZE))
    draft = draft_options(options, refining.models)
    if options.target.suffix.lower() not in CONTAINERS:
        raise CommandError(f"{options.target.name} should end in {', '.join(CONTAINERS)}.")
    check_codec(refining.output.codec, refining.output.bits, options.target.suffix)
    return Video(options.target, draft, refining)
