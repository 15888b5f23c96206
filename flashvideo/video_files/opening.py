"""The one place that opens media files for reading, and which of their tracks is the picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av

from ..errors import CommandError

# What is taken from a folder; a single file may have any name.
VIDEO_ENDINGS = (
    ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mpe", ".m2v", ".ts", ".mts", ".m2ts", ".vob",
    ".gif", ".apng", ".wmv", ".asf", ".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".ogm", ".mxf", ".mjpeg", ".mjpg", ".y4m",
    ".divx", ".dv", ".rm", ".rmvb", ".nut", ".h264", ".264", ".h265", ".265", ".hevc", ".ivf",
)  # fmt: skip
_LIBVPX = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_ENCRYPTED = (b"encv", b"drmi", b"enca", b"drms")  # kinds of tracks in an MP4
_SEARCHED = 4 * 2**20  # bytes at either end of a file: an MP4's index is there


def open_container(path: Path) -> av.container.InputContainer:
    """Open a media file for reading, whatever the code page of its titles. Raises av.FFmpegError or OSError."""
    try:
        return av.open(str(path), metadata_errors="replace")
    except TypeError:  # PyAV from 19 on has no such option: it marks what is not UTF-8 by surrogates, see `texts`
        return av.open(str(path))


def texts(metadata: Mapping[str, str]) -> dict[str, str]:
    """Tags as text that can be written; what was not UTF-8 becomes replacement characters."""

    def text(value: str) -> str:
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    return {text(key): text(value) for key, value in metadata.items()}


def disposition(stream: av.stream.Stream) -> int:
    """FFmpeg's flags of a track: default, forced, attached picture, ..."""
    return _number(stream.disposition)


def has_flag(stream: av.stream.Stream, name: str) -> bool:
    """Whether a track has the flag of this name."""
    return bool(disposition(stream) & _number(getattr(av.stream.Disposition, name)))


def _number(flags: Any) -> int:
    return int(getattr(flags, "value", flags))  # a flag or, in PyAV from 19 on, a number


def picture_track(container: av.container.InputContainer) -> av.VideoStream | None:
    """The track of pictures that players show: the default one, else the first; cover art is none."""
    tracks = [each for each in container.streams.video if not has_flag(each, "attached_pic")]
    return next((each for each in tracks if has_flag(each, "default")), tracks[0] if tracks else None)


def decoder_of(track: av.VideoStream) -> av.VideoCodecContext:
    """What decodes a track: FFmpeg's own, but libvpx for VP8 and VP9 with alpha, which only that reads."""
    library = _LIBVPX.get(track.codec_context.name)
    tags = {key.lower(): value for key, value in texts(track.metadata).items()}
    if library is None or tags.get("alpha_mode") != "1":
        return track.codec_context
    try:
        return av.CodecContext.create(library, "r")
    except (av.FFmpegError, ValueError):  # a PyAV that lacks it
        return track.codec_context


@contextmanager
def opened(path: Path, *, steady: bool = False) -> Iterator[av.container.InputContainer]:
    """Have a video file open. Raises CommandError if it can't be read or has no pictures.

    `steady`: decode damaged pictures the same way each time; with several threads it varies which of them come out.
    """
    try:
        with open_container(path) as container:
            track = picture_track(container)
            if track is None:
                cover = " but a cover" if container.streams.video else ""
                raise CommandError(f"{path} holds no pictures{cover}.")
            if track.codec_context is None:
                raise CommandError(f"{path}: nothing here can decode its pictures.")
            if steady:
                track.codec_context.thread_count = 1
            else:
                track.thread_type = "AUTO"
            yield container
    except (av.FFmpegError, OSError) as error:
        raise CommandError(f"{path} can't be read as a video: {error.strerror or error}.") from error


def is_encrypted(path: Path) -> bool:
    """Whether an MP4's index says that its tracks are encrypted."""
    with path.open("rb") as file:
        head = file.read(_SEARCHED)
        file.seek(max(0, path.stat().st_size - _SEARCHED))
        data = head + file.read(_SEARCHED)
    return b"schm" in data and any(kind in data for kind in _ENCRYPTED)
