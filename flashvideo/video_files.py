"""Video files through PyAV: frames out one by one, frames in as segments, and one file of the segments and the sound.

The timestamps of the pictures and every packet of sound are those of the source, so that rate, length and lips stay.
A segment is encoded by itself, from a key frame on, and kept as packets: a run that is interrupted has its finished
segments, and the file they make is the same as if nothing had happened.
"""

from __future__ import annotations

import heapq
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import torch
from av.codec.context import Flags
from torch import Tensor

from .errors import CommandError

VIDEO_ENDINGS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".gif")
CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}  # what is written
CODEC = "libx264"
CRF = 14  # of the official script's writer: hardly distinguishable from the frames themselves
# Without this, x264's assembler code reads beyond its tables for some widths, and no two files are the same.
_STEADY = "mbtree=0"
_FALLBACK_RATE = Fraction(8)  # frames a second: what the model makes
_BT709, _BT601 = 1, 5  # FFmpeg's numbers of the colour matrices
_MATRICES = {1: _BT709, 5: _BT601, 6: _BT601, 7: 7, 9: 9}  # by a stream's tag; what swscale knows
_UNSPECIFIED = 2  # as a tag
_LIMITED, _FULL = 1, 2  # FFmpeg's numbers of the ranges that brightness is stored in
_HD_ROWS = 720  # from here on, untagged video is taken as BT.709
# swscale's numbers: bilinear, colour for every pixel, rounding. Without the last two each channel loses 1.3 of 255.
_EXACT = 0x2 | 0x2000 | 0x40000
_CONTAINER_TICKS = 1_000_000  # a second, in which PyAV tells when a file's clock begins
_JOIN = Fraction(1, 2)  # seconds: where times step back further, another recording was joined

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoClip:
    """A video file whose frames can be read more than once.

    `times` are the frames' timestamps in units of `time_base` seconds, after `start`, the seconds at which the file's
    clock begins where that is later than 0. `turns` is by how many quarter turns (anticlockwise) the stored pictures
    have to be turned; `height` and `width` are those of the turned ones.
    """

    path: Path
    height: int
    width: int
    rate: Fraction
    time_base: Fraction
    times: tuple[int, ...]
    matrix: int
    turns: int = 0
    pixel_aspect: Fraction | None = None
    tags: tuple[int, int] = (_UNSPECIFIED, _UNSPECIFIED)  # colour primaries and transfer
    start: Fraction = Fraction(0)

    @property
    def count(self) -> int:
        """How many frames there are."""
        return len(self.times)

    def frames(self, start: int = 0) -> Iterator[Tensor]:
        """Frames from number `start` on, [height, width, 3] uint8."""
        with _opened(self.path) as container:
            for index, frame in enumerate(_decode(container)):
                if index >= start:
                    yield torch.from_numpy(upright_pixels(frame, self.matrix, self.turns))


def upright_pixels(frame: av.VideoFrame, matrix: int, turns: int) -> np.ndarray:
    """A frame as it is meant to be seen, uint8 [H, W, 3]: by its colour matrix, turned by so many quarter turns."""
    # PyAV takes BT.601 and limited range for granted unless the two are named and differ.
    frame = frame.reformat(
        format="rgb24",
        src_colorspace=matrix,
        dst_colorspace=_BT601,
        src_color_range=_FULL if int(frame.color_range) == _FULL else _LIMITED,
        dst_color_range=_LIMITED,
        interpolation=_EXACT,
    )
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(), turns))


def colour_matrix(frame: av.VideoFrame) -> int:
    """FFmpeg's number of the matrix that a frame's colours were made with, a guess where the file doesn't say."""
    return _MATRICES.get(int(frame.colorspace), _BT709 if frame.height >= _HD_ROWS else _BT601)


def quarter_turns(frame: av.VideoFrame) -> int:
    """By how many quarter turns (anticlockwise) a stored frame has to be turned: telephones store them lying."""
    return round(getattr(frame, "rotation", 0) / 90) % 4


def open_clip(path: Path, on_frame: Callable[[int, int], None] = lambda done, total: None) -> VideoClip:
    """Read a video to its end: only that tells how many frames there are, and that all can be read.

    `on_frame(done, expected)` runs after each; expected is 0 where the file doesn't say. Warns of tracks of sound that
    can't be copied. Raises CommandError.
    """
    with _opened(path) as container:
        tracks = len(container.streams.audio)
        unknown = tracks - len(_tracks(container))
        if unknown:
            log.warning("%s: %d of %d tracks of sound can't be copied and are left out.", path.name, unknown, tracks)
        stream = container.streams.video[0]
        times, first, size = [], None, None
        for frame in _decode(container):
            first = first or frame
            size = size or (frame.height, frame.width)
            if size != (frame.height, frame.width):
                raise CommandError(f"{path}: the pictures change their size at frame {len(times)}.")
            times.append(frame.pts)
            on_frame(len(times), stream.frames)
        if first is None:
            raise CommandError(f"{path} holds no pictures.")
        # PyAV from 19 on has rationals of its own, which lack most of a Fraction's arithmetic.
        time_base = Fraction(stream.time_base)
        rate = Fraction(stream.average_rate or stream.guessed_rate or _FALLBACK_RATE)
        start = Fraction(max(0, container.start_time or 0), _CONTAINER_TICKS)
        clock = _Clock(time_base, start)
        turns = quarter_turns(first)
        height, width = size if turns % 2 == 0 else size[::-1]
        context = stream.codec_context
        aspect = Fraction(stream.sample_aspect_ratio or 0) or None
        return VideoClip(
            path=path,
            height=height,
            width=width,
            rate=rate,
            time_base=time_base,
            times=tuple(clock(time, round(1 / (rate * time_base))) for time in times),
            matrix=colour_matrix(first),
            turns=turns,
            pixel_aspect=1 / aspect if aspect and turns % 2 else aspect,
            tags=(int(context.color_primaries), int(context.color_trc)),
            start=start,
        )


class _Clock:
    """Makes a track's times start with its file and go forward.

    A time that is missing follows from the one before; one that was there already is a tick later; and where another
    recording was joined, whose clock begins anew, it runs on.
    """

    def __init__(self, time_base: Fraction, start: Fraction) -> None:
        self._join = max(1, int(_JOIN / time_base))
        self._shift = -int(start / time_base)
        self._next: int | None = None  # when what comes next is due
        self._last = 0

    def __call__(self, time: int | None, duration: int) -> int:
        """The time of a picture or packet that lasts so long, all in ticks."""
        duration = max(1, duration)
        if self._next is None:
            now = 0 if time is None else time + self._shift
        elif time is None:
            now = self._next
        else:
            if time + self._shift < self._last - self._join:
                self._shift = self._next - time
            now = max(time + self._shift, self._last + 1)
        self._last, self._next = now, now + duration
        return now


def open_container(path: Path) -> av.container.InputContainer:
    """Open a media file for reading, whatever the code page of its titles. Raises av.FFmpegError or OSError."""
    try:
        return av.open(str(path), metadata_errors="replace")
    except TypeError:  # PyAV from 19 on has no such option: it marks what is not UTF-8 by surrogates, see `_texts`
        return av.open(str(path))


def _texts(metadata: Mapping[str, str]) -> dict[str, str]:
    """Tags as text that can be written; what was not UTF-8 becomes replacement characters."""

    def text(value: str) -> str:
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    return {text(key): text(value) for key, value in metadata.items()}


@contextmanager
def _opened(path: Path) -> Iterator[av.container.InputContainer]:
    try:
        with open_container(path) as container:
            if not container.streams.video:
                raise CommandError(f"{path} holds no pictures.")
            container.streams.video[0].thread_type = "AUTO"
            yield container
    except (av.FFmpegError, OSError) as error:
        raise CommandError(f"{path} can't be read as a video: {error.strerror or error}.") from error


def _decode(container: av.container.InputContainer) -> Iterator[av.VideoFrame]:
    return container.decode(container.streams.video[0])


@dataclass(frozen=True)
class VideoFormat:
    """How the refined pictures are encoded: H.264, of constant quality (`crf`: 0 is lossless, 51 the worst)."""

    clip: VideoClip
    height: int
    width: int
    crf: int = CRF

    def prepare(self, context: av.VideoCodecContext) -> None:
        """Set up an encoder."""
        context.height, context.width = self.height, self.width
        # Colours at half size need even sides.
        context.pix_fmt = "yuv444p" if self.height % 2 or self.width % 2 else "yuv420p"
        context.framerate, context.time_base = self.clip.rate, 1 / self.clip.rate
        context.colorspace, context.color_range = self.clip.matrix, _LIMITED
        context.color_primaries, context.color_trc = self.clip.tags
        if self.clip.pixel_aspect is not None:
            context.sample_aspect_ratio = self.clip.pixel_aspect
        context.options = {"crf": str(self.crf), "x264-params": _STEADY}


def encode_segment(frames: Iterable[Tensor], form: VideoFormat) -> dict[str, Tensor]:
    """Encode frames, [t, H, W, 3] uint8 at a time, from a key frame on.

    Returns `data`, the packets' bytes one after the other, and `packets` [n, 4]: size, number of the frame shown,
    number by which it is decoded (starts below 0), and whether it is a key frame.
    """
    context = av.CodecContext.create(CODEC, "w")
    form.prepare(context)
    context.flags |= Flags.global_header
    packets, index = [], 0
    for chunk in frames:
        for pixels in chunk.numpy():
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(
                format=context.pix_fmt,
                src_colorspace=_BT601,
                dst_colorspace=form.clip.matrix,
                interpolation=_EXACT,
            )
            frame.pts, frame.time_base = index, context.time_base
            packets += context.encode(frame)
            index += 1
    packets += context.encode(None)
    rows = [[packet.size, packet.pts, packet.dts, int(packet.is_keyframe)] for packet in packets]
    data = np.frombuffer(b"".join(bytes(packet) for packet in packets), dtype=np.uint8)
    return {"data": torch.from_numpy(data.copy()), "packets": torch.tensor(rows)}


class _Nowhere(io.RawIOBase):
    """A file that keeps nothing but its length, to see whether a container takes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self._at = self._end = 0

    def writable(self) -> bool:
        """Anything can be written."""
        return True

    def seekable(self) -> bool:
        """Containers write their header anew at the end."""
        return True

    def tell(self) -> int:
        """Where the next byte would go."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._end}[whence]
        return self._at

    def write(self, data: Any) -> int:
        """Forget bytes."""
        self._at += len(data)
        self._end = max(self._end, self._at)
        return len(data)


def check_container(suffix: str, form: VideoFormat) -> None:
    """Raise CommandError if a file with this ending doesn't take the pictures and all sound that is copied."""
    with _opened(form.clip.path) as source:
        tracks = _tracks(source)
        try:
            with _output(_Nowhere(), CONTAINERS[suffix.lower()], form, source) as (container, _, sound):
                for packet in _sound_packets(source, sound, form.clip.start):
                    container.mux(packet)
        except (av.FFmpegError, ValueError) as error:
            codecs = ", ".join(each.codec_context.name for each in tracks) or "none"
            raise CommandError(
                f"A {suffix} file can't hold {CODEC} pictures and the sound of {form.clip.path.name} as it is "
                f"({codecs}): {error}. .mkv takes nearly all kinds of sound."
            ) from error


def write_video(target: Path, form: VideoFormat, segments: Iterable[dict[str, Tensor]], kind: str = "") -> None:
    """Write a video file of encoded segments, in order, with the sound of the clip's file as it is there.

    `kind` is one of CONTAINERS' values; without it the ending of `target` decides.

    Raises CommandError if the file can't be written.
    """
    with _opened(form.clip.path) as source:
        try:
            kind = kind or CONTAINERS[target.suffix.lower()]
            with _output(str(target), kind, form, source) as (container, stream, sound):
                pictures = _picture_packets(segments, form.clip, stream)
                # In the order of time, so that the container has to hold back nothing.
                for packet in heapq.merge(pictures, _sound_packets(source, sound, form.clip.start), key=_moment):
                    container.mux(packet)
        except (av.FFmpegError, ValueError) as error:
            raise CommandError(f"The refined {form.clip.path.name} can't be written: {error}.") from error


def write_lossless(target: Path, frames: Tensor, rate: Fraction, comment: str) -> None:
    """Write frames [T, H, W, 3] uint8 to a Matroska file, bit by bit; `comment` is kept in it, see `read_comment`."""
    with av.open(str(target), "w", format="matroska") as container:
        container.metadata["COMMENT"] = comment
        stream = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for pixels in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def read_comment(path: Path) -> str:
    """The comment that a video file carries; empty without one. Raises CommandError if it is no video."""
    with _opened(path) as container:
        return container.metadata.get("COMMENT", "")


@contextmanager
def _output(
    file: str | BinaryIO, kind: str, form: VideoFormat, source: av.container.InputContainer
) -> Iterator[tuple[av.container.OutputContainer, av.VideoStream, dict[int, av.AudioStream]]]:
    """A container with one stream of pictures and the source's of sound, those by the source's numbers."""
    with av.open(file, "w", format=kind) as container:
        container.metadata.update(_texts(source.metadata))
        stream = container.add_stream(CODEC, rate=form.clip.rate)
        form.prepare(stream.codec_context)
        stream.time_base = form.clip.time_base
        sound = {each.index: container.add_stream_from_template(each) for each in _tracks(source)}
        for each in _tracks(source):
            sound[each.index].metadata.update(_texts(each.metadata))
        container.start_encoding()
        yield container, stream, sound


def _picture_packets(
    segments: Iterable[dict[str, Tensor]], clip: VideoClip, stream: av.VideoStream
) -> Iterator[av.Packet]:
    step = max(1, round(1 / (clip.rate * clip.time_base)))
    ends = (*clip.times[1:], clip.times[-1] + step)
    offset = 0
    for segment in segments:
        data, position = segment["data"].numpy(), 0
        for size, shown, decoded, key in segment["packets"].tolist():
            packet = av.Packet(data[position : position + size].tobytes())
            position += size
            shown, decoded = shown + offset, decoded + offset
            packet.stream, packet.time_base, packet.is_keyframe = stream, clip.time_base, bool(key)
            packet.pts = clip.times[shown]
            packet.dts = clip.times[decoded] if decoded >= 0 else clip.times[0] + decoded * step
            packet.duration = ends[shown] - clip.times[shown]
            yield packet
        offset += len(segment["packets"])


def _tracks(source: av.container.InputContainer) -> list[av.AudioStream]:
    """The tracks of sound that can be copied; PyAV knows nothing of those that FFmpeg has no decoder for."""
    return [each for each in source.streams.audio if each.codec_context is not None]


def _sound_packets(
    source: av.container.InputContainer, streams: dict[int, av.AudioStream], start: Fraction
) -> Iterator[av.Packet]:
    if not streams:
        return
    tracks = [source.streams[index] for index in streams]
    clocks = {track.index: _Clock(Fraction(track.time_base), start) for track in tracks}
    for packet in source.demux(tracks):
        if packet.dts is not None:  # the last one is empty and only says that there are no more
            index, decoded = packet.stream.index, packet.dts
            packet.dts = clocks[index](decoded, packet.duration or 0)
            packet.pts = packet.dts + (0 if packet.pts is None else max(0, packet.pts - decoded))
            packet.stream = streams[index]
            yield packet


def _moment(packet: av.Packet) -> Fraction:
    return packet.dts * Fraction(packet.time_base)
