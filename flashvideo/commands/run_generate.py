"""What `generate` does; `generate` has its options."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from ..atomic_files import check_target
from ..config import DETAIL_SIZE
from ..errors import CommandError
from ..frames import TargetSize
from ..parallel import agree
from ..parallel.farm import check_farm
from .chosen import existing_file
from .drafts import draft_options, draft_path, ensure_draft
from .on_workers import farm_options
from .prompts import Video, generate_all
from .run_refine import refine, refine_options

NANO_SCALE = 4.0  # from its draft to its refined video


def run(options: argparse.Namespace) -> int:
    """Make a video, or those of many prompts; returns the exit code. Raises CommandError before the work starts."""
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
