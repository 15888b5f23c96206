"""What a run refines and what it makes: a video file or numbered pictures, on either side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ..atomic_files import WriteError, check_target, whole_file
from ..errors import CommandError
from ..frames import PictureSize
from ..video_files import (
    CONTAINERS,
    SEQUENCES,
    PictureSequence,
    SequenceFormat,
    VideoClip,
    VideoFormat,
    check_container,
    encode_pictures,
    encode_segment,
    is_pattern,
    open_clip,
    open_sequence,
    picture_name,
    with_metadata,
    write_video,
)
from ..video_files.sequences import PICTURE_RATE
from .file_options import FileOptions

Segment = dict[str, Tensor]
_LARGEST_DENOMINATOR = 1001  # of a rate: 23.976 is 24000/1001


def open_source(
    source: Path, options: FileOptions, on_frame: Callable[[int, int], None] = lambda done, total: None
) -> VideoClip:
    """The clip of a video file, or of numbered pictures; see `open_clip`. Raises CommandError."""
    if is_pattern(source):
        if options.deinterlace:
            raise CommandError("--deinterlace is for video files, not for numbered pictures.")
        rate = PICTURE_RATE if options.fps is None else Fraction(options.fps).limit_denominator(_LARGEST_DENOMINATOR)
        return open_sequence(source, rate, on_frame)
    if options.fps is not None:
        raise CommandError("--fps is for numbered pictures; a video keeps its own times.")
    return open_clip(source, on_frame, deinterlace=options.deinterlace)


class Output(Protocol):
    """What a run writes, in segments."""

    form: VideoFormat | SequenceFormat

    def check(self, options: FileOptions, *, resumes: bool) -> tuple[str, ...]:
        """Warn of what gets lost, before the work starts; returns sentences on damaged sound. Raises CommandError."""

    def encode(self, frames: Iterable[Tensor]) -> Segment:
        """Encode refined frames, [t, H, W, 3] in [0, 1] at a time."""

    def write(self, segments: Iterable[Segment], note_result: Callable[[Path], None], *, force: bool) -> None:
        """Write the result of all segments. `note_result` gets a complete file just before it is renamed."""


@dataclass(frozen=True)
class VideoOutput:
    """A video file."""

    target: Path
    form: VideoFormat

    def check(self, options: FileOptions, *, resumes: bool) -> tuple[str, ...]:
        """See `Output`."""
        return check_container(self.target.suffix, self.form, options.warn)

    def encode(self, frames: Iterable[Tensor]) -> Segment:
        """See `Output`."""
        return encode_segment(frames, self.form)

    def write(self, segments: Iterable[Segment], note_result: Callable[[Path], None], *, force: bool) -> None:
        """See `Output`."""
        with whole_file(self.target, replace=force) as part:
            write_video(part, self.form, segments, CONTAINERS[self.target.suffix.lower()])
            note_result(part)


@dataclass(frozen=True)
class PictureOutput:
    """Numbered pictures."""

    form: SequenceFormat

    def check(self, options: FileOptions, *, resumes: bool) -> tuple[str, ...]:
        """See `Output`. A run that resumes may have written some of the pictures."""
        _check_pictures(self.form, force=options.force or resumes)
        with self.form.clip.source() as source:
            if source is not None and source.streams.audio:
                options.warn("Pictures hold no sound: it is left out.")
        return ()

    def encode(self, frames: Iterable[Tensor]) -> Segment:
        """See `Output`."""
        return encode_pictures(frames, self.form)

    def write(self, segments: Iterable[Segment], note_result: Callable[[Path], None], *, force: bool) -> None:
        """See `Output`."""
        _write_pictures(self.form, segments, replace=force)


def output_of(clip: VideoClip, size: PictureSize, target: Path, options: FileOptions) -> Output:
    """What a run writes to `target`. Raises CommandError for a format that doesn't go."""
    if is_pattern(target):
        if options.codec != "auto":
            raise CommandError("--codec is for video files: the ending says how numbered pictures are stored.")
        return PictureOutput(SequenceFormat(clip, *size, target, options.bits, options.start_number))
    if options.start_number is not None:
        raise CommandError("--start-number is for numbered pictures as OUT, such as out/%04d.png.")
    return VideoOutput(target, VideoFormat(clip, *size, options.crf, options.sound, options.codec, options.bits))


def check_patterns(source: Path, target: Path) -> None:
    """Raise CommandError unless a source and a result, of which one at least is numbered pictures, go together."""
    if is_pattern(target) and target.suffix.lower() not in SEQUENCES:
        raise CommandError(f"{target.name}: numbered pictures are written as {', '.join(SEQUENCES)}.")
    if not is_pattern(target) and target.suffix.lower() not in CONTAINERS:
        raise CommandError(f"{target.name} should end in {', '.join(CONTAINERS)}, or name pictures as %04d.png does.")
    if is_pattern(target) and not target.parent.parent.is_dir():
        raise CommandError(f"There is no folder {target.parent.parent} to write to.")
    if is_pattern(source) and not source.parent.is_dir():
        raise CommandError(f"There is no folder {source.parent}.")


def _check_pictures(form: SequenceFormat, *, force: bool) -> None:
    """Raise WriteError unless the pictures can be written; `force` allows to replace some, but never the source's."""
    folder = form.pattern.parent
    folder.mkdir(exist_ok=True)
    if isinstance(form.clip, PictureSequence):
        sources = {picture_name(form.clip.path, number).resolve() for number in form.clip.numbers}
        if any(picture_name(form.pattern, number).resolve() in sources for number in form.numbers):
            raise WriteError(f"{form.pattern} are the pictures to be read: give the new ones another name or folder.")
    for number in form.numbers:
        check_target(picture_name(form.pattern, number), force=force)


def _write_pictures(form: SequenceFormat, segments: Iterable[Segment], *, replace: bool) -> None:
    """Write encoded pictures, each whole or not at all, with what their sources say of themselves in the same kind.

    A picture that is there already with the same content stays. Raises WriteError for another one, unless `replace`.
    """
    numbers, index = form.numbers, 0
    sources = form.clip.numbers if isinstance(form.clip, PictureSequence) else ()
    for segment in segments:
        data, position = segment["data"].numpy(), 0
        for (size,) in segment["packets"].tolist():
            content = data[position : position + size].tobytes()
            position += size
            if sources:
                content = with_metadata(content, picture_name(form.clip.path, sources[index]))
            target = picture_name(form.pattern, numbers[index])
            index += 1
            if not (target.is_file() and target.read_bytes() == content):
                with whole_file(target, replace=replace) as part:
                    part.write_bytes(content)
