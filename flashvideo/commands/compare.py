"""`python -m flashvideo compare A B ... page.html`: versions of a video on one page, with a slider between."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from ..atomic_files import check_target, file_size, write_whole
from ..errors import CommandError
from .terminal import ProgressBars, say, warn

_ENDINGS = (".html", ".htm")
_PHASE = "compare"


def add_compare(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "compare",
        description="Write one file of HTML that any browser shows without a network: two of the versions with a "
        "slider between, the same frame of both at any moment, with zoom, sharpness, change and PSNR of every frame, "
        "and the settings that ComfyUI stored. Smaller versions are enlarged bilinearly to the size of the largest.",
    )
    parser.add_argument("sources", metavar="VIDEO", nargs="+", type=Path, help="2 to 6 videos, the one before first")
    parser.add_argument("target", metavar="PAGE", type=Path, help="the file to write (.html)")
    parser.add_argument("--force", action="store_true", help="replace PAGE if it exists")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    try:
        from ..compare.page import MAX_VERSIONS, Version, comparison_page
        from ..video_files import is_pattern, open_clip, open_sequence
    except ModuleNotFoundError as error:
        raise CommandError(f"Comparing files needs the package {error.name}: use ComfyUI's Python.") from error
    sources, target = options.sources, options.target
    if target.suffix.lower() not in _ENDINGS:
        raise CommandError(f"{target.name} should end in .html: the page comes last, after the videos.")
    if not 1 < len(sources) <= MAX_VERSIONS:
        raise CommandError(f"A page takes 2 to {MAX_VERSIONS} videos; got {len(sources)}.")
    for source in sources:
        if not is_pattern(source) and not source.is_file():
            raise CommandError(f"There is no file {source}.")
    check_target(target, force=options.force)
    clips = [open_sequence(source) if is_pattern(source) else open_clip(source) for source in sources]
    for clip in clips:
        for text in clip.damage:
            warn(f"{clip.path.name}: {text}")
    versions = [Version(name, clip, tuple(_facts(clip))) for name, clip in zip(_names(sources), clips, strict=True)]
    bars = ProgressBars("frame")
    try:
        page = comparison_page(versions, lambda done, total: bars(_PHASE, done, total))
    finally:
        bars.close()
    write_whole(target, lambda part: part.write_text(page, encoding="utf-8"), replace=options.force)
    say(f"{target}: {len(versions)} versions, {file_size(target.stat().st_size)}")
    return 0


def _names(sources: list[Path]) -> Iterator[str]:
    """Names of files, with their folder's where two are the same."""
    names = [source.name for source in sources]
    return (source.name if names.count(source.name) == 1 else str(source) for source in sources)


def _facts(clip: object) -> Iterator[tuple[str, str]]:
    """What is worth knowing of a video."""
    from ..compare.page import settings_of
    from ..video_files import is_pattern, picture_track, texts

    yield "size", f"{clip.width}x{clip.height}"
    yield "frames", f"{clip.count}, {float(clip.rate):.5g} a second"
    yield "colours", f"{clip.bits} bits" + (f", {clip.curve}" if clip.curve else "")
    if is_pattern(clip.path):
        return
    yield "file", file_size(clip.path.stat().st_size)
    with clip.source() as container:
        if container is not None:
            yield "codec", picture_track(container).codec_context.name
            yield from settings_of(texts(container.metadata))
