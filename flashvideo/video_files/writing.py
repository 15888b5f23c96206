"""One file of encoded segments and of the source's other tracks: sound, subtitles, chapters, tags."""

from __future__ import annotations

import heapq
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
from torch import Tensor

from ..errors import CommandError
from .encoding import AUTO, ENCODERS, Encoder, VideoFormat
from .opening import disposition, has_flag, opened, picture_track, texts
from .reading import VideoClip
from .sound import SoundEncoder, SoundEnds
from .times import Clock

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}  # what is written
SOUNDS = ("copy", "aac", "none")
_AAC_BITS = 192_000  # a second
_AAC_LAYOUTS = ("mono", "stereo", "5.1", "7.1")
_AAC_RATE = 48_000  # where AAC doesn't know the source's rate
_FFMPEGS_OWN = 2**16  # from here on an error is no system's: the packet is damaged
_ATTACHED = "attached_pic"
_COVERS = {"mjpeg": "jpg", "png": "png"}  # codecs of pictures that all containers here take
_MIMES = {"jpg": "image/jpeg", "png": "image/png"}
_PLACES = ("com.apple.quicktime.location.ISO6709", "LOCATION", "location-eng")  # other names of "location"
_OTHER_TAGS = "com."  # telephones' own, which MP4's usual tags have no room for
# Made anew by what writes.
_NEEDLESS = {"major_brand", "minor_version", "compatible_brands", "encoder", "ENCODER", "DURATION"}

Tell = Callable[[str], None]


@dataclass
class _Tracks:
    """The output's tracks by the source's numbers, and what happened to them."""

    pictures: av.VideoStream
    others: dict[int, av.stream.Stream] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)  # of what the container has no room for
    damaged: Counter[int] = field(default_factory=Counter)  # packets that can't be written, by the source's number
    written: Counter[int] = field(default_factory=Counter)


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


def check_container(suffix: str, form: VideoFormat, tell: Tell = lambda text: None) -> tuple[str, ...]:
    """Raise CommandError if a file with this ending doesn't take the pictures and the sound.

    `tell` gets what else of the source it has no room for; returns sentences on sound that is damaged.
    """
    _check_holds(suffix, form.encoder)
    with form.clip.source() as source:
        try:
            with _output(_Nowhere(), CONTAINERS[suffix.lower()], form, source) as (container, tracks):
                for packet in _other_packets(source, tracks, form):
                    _mux(container, packet, tracks)
        except (av.FFmpegError, ValueError) as error:
            codecs = ", ".join(each.codec_context.name for each in _sounds(source)) or "none"
            able = [ending for ending in CONTAINERS if ending != suffix.lower() and _takes(ending, form, source)]
            pictures, name = form.encoder.title, form.clip.path.name
            raise CommandError(
                f"A {suffix} file can't hold {pictures} pictures and the sound of {name} as it is ({codecs}): {error}. "
                + (f"{' and '.join(able)} can." if able else "No container here can."),
                hint="--sound aac encodes it anew, --sound none leaves it out.",
            ) from error
        for name, count in Counter(tracks.dropped).items():
            tell(f"Left out of the {suffix} file: {name}" + (f" (x {count})." if count > 1 else "."))
        return tuple(_sound_damage(source, tracks))


def check_codec(codec: str, bits: int | None, suffix: str) -> None:
    """Raise CommandError if files with this ending can't have these pictures, whatever the clip; see `VideoFormat`."""
    if codec != AUTO:
        _check_holds(suffix, ENCODERS[codec])
        ENCODERS[codec].check(max(ENCODERS[codec].halved) if bits is None else bits)


def _check_holds(suffix: str, encoder: Encoder) -> None:
    if CONTAINERS[suffix.lower()] not in encoder.containers:
        able = [ending for ending, kind in CONTAINERS.items() if kind in encoder.containers]
        raise CommandError(f"A {suffix} file can't hold {encoder.title} pictures. {' and '.join(able)} can.")


def _takes(suffix: str, form: VideoFormat, source: av.container.InputContainer) -> bool:
    """Whether a container has the kinds of sound of the source."""
    try:
        with _output(_Nowhere(), CONTAINERS[suffix], form, source):
            return True
    except (av.FFmpegError, ValueError):
        return False


def write_video(target: Path, form: VideoFormat, segments: Iterable[dict[str, Tensor]], kind: str = "") -> None:
    """Write a video file of encoded segments, in order, with the other tracks of the clip's file.

    `kind` is one of CONTAINERS' values; without it the ending of `target` decides. Raises CommandError if the file
    can't be written.
    """
    with form.clip.source() as source:
        try:
            kind = kind or CONTAINERS[target.suffix.lower()]
            with _output(str(target), kind, form, source) as (container, tracks):
                pictures = _picture_packets(segments, form.clip, tracks.pictures)
                # In the order of time, so that the container has to hold back nothing.
                for packet in heapq.merge(pictures, _other_packets(source, tracks, form), key=_moment):
                    _mux(container, packet, tracks)
        except (av.FFmpegError, ValueError) as error:
            raise CommandError(f"The refined {form.clip.path.name} can't be written: {error}.") from error


@contextmanager
def _output(
    file: str | BinaryIO, kind: str, form: VideoFormat, source: av.container.InputContainer | None
) -> Iterator[tuple[av.container.OutputContainer, _Tracks]]:
    """A container with the refined pictures' track, and those of the source that it takes."""
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(form.encoder.name, rate=form.clip.rate)
        form.prepare(stream.codec_context, kind)
        stream.time_base = form.clip.time_base
        tracks = _Tracks(stream)
        if source is not None:
            _copy_tags(container, source, tracks, form.clip)
            _add_sound(container, source, tracks, form.sound)
            _add_others(container, source, tracks, form.clip.path)
        container.start_encoding()
        yield container, tracks


def _copy_tags(
    container: av.container.OutputContainer, source: av.container.InputContainer, tracks: _Tracks, clip: VideoClip
) -> None:
    tags = {key: value for key, value in texts(source.metadata).items() if key not in _NEEDLESS}
    place = next((tags[key] for key in _PLACES if key in tags), None)
    if place is not None:
        tags.setdefault("location", place)
    if container.format.name != "matroska":
        for key in [key for key in tags if key.startswith(_OTHER_TAGS) and key not in _PLACES]:
            tracks.dropped.append(f"the tag {key}")
    container.metadata.update(tags)
    before = picture_track(source)
    tracks.pictures.metadata.update({k: v for k, v in texts(before.metadata).items() if k.lower() in _PICTURE_TAGS})
    tracks.pictures.disposition = disposition(before)
    chapters = source.chapters()
    if chapters:
        container.set_chapters([_moved(chapter, clip.start) for chapter in chapters])


_PICTURE_TAGS = {"language", "title", "timecode", "handler_name"}


def _moved(chapter: Any, start: Fraction) -> Any:
    """A chapter in the time of a file that starts at 0."""
    shift = int(start / Fraction(chapter["time_base"]))
    metadata = texts(chapter["metadata"])
    return {
        **chapter,
        "start": max(0, chapter["start"] - shift),
        "end": max(0, chapter["end"] - shift),
        "metadata": metadata,
    }


def _sounds(source: av.container.InputContainer | None) -> list[av.AudioStream]:
    """The tracks of sound that can be read; PyAV knows nothing of those that FFmpeg has no decoder for."""
    return [] if source is None else [each for each in source.streams.audio if each.codec_context is not None]


def _add_sound(
    container: av.container.OutputContainer, source: av.container.InputContainer, tracks: _Tracks, sound: str
) -> None:
    for track in _sounds(source) if sound != "none" else ():
        if sound == "aac":
            rates, layout = av.Codec("aac", "w").audio_rates, track.layout.name
            rate = track.rate if track.rate in rates else _AAC_RATE
            layout = layout if layout in _AAC_LAYOUTS else "stereo"
            made = container.add_stream("aac", rate=rate, layout=layout)
            made.bit_rate = _AAC_BITS
        else:
            made = container.add_stream_from_template(track)
        _describe(made, track)
        tracks.others[track.index] = made
    unknown = [each for each in source.streams.audio if each.codec_context is None]
    tracks.dropped += ["a track of sound of an unknown kind"] * len(unknown)


def _add_others(
    container: av.container.OutputContainer, source: av.container.InputContainer, tracks: _Tracks, path: Path
) -> None:
    """Subtitles, covers and attached files where the container takes their kind; the rest is named as dropped."""
    shown = picture_track(source).index
    for track in source.streams:
        if track.index == shown or track.type == "audio" or _is_attached(container, track, tracks, path):
            continue
        name = "a cover picture" if _is_cover(track) else _name(track)
        if track.type == "subtitle" and track.codec_context is not None:
            try:
                made = container.add_stream_from_template(track)
            except ValueError:  # the container has no such kind
                tracks.dropped.append(f"{name} ({track.codec_context.name}), which .mkv has room for")
                continue
            _describe(made, track)
            tracks.others[track.index] = made
        elif "timecode" not in track.metadata:  # MP4 and MOV make a timecode's track anew from its tag
            tracks.dropped.append(name)
        else:
            tracks.pictures.metadata.setdefault("timecode", track.metadata["timecode"])


def _is_cover(track: av.stream.Stream) -> bool:
    return track.type == "video" and has_flag(track, _ATTACHED)


def _is_attached(container: av.container.OutputContainer, track: av.stream.Stream, tracks: _Tracks, path: Path) -> bool:
    """Whether a cover or an attached file has been carried over: in Matroska both are attachments."""
    matroska = container.format.name == "matroska"
    if track.type == "attachment" and matroska and hasattr(container, "add_attachment"):
        name = texts(track.metadata).get("filename", "attachment")
        container.add_attachment(name, track.mimetype or "application/octet-stream", track.data)
        return True
    ending = _COVERS.get(track.codec_context.name) if _is_cover(track) and track.codec_context else None
    if ending is None:
        return False
    if container.format.name == "mp4":
        made = container.add_stream_from_template(track)
        made.disposition = disposition(track)
        tracks.others[track.index] = made
        return True
    if not matroska or not hasattr(container, "add_attachment"):  # PyAV has it from 15 on
        return False
    with opened(path) as again:
        picture = next((bytes(each) for each in again.demux(again.streams[track.index]) if each.size), b"")
    container.add_attachment(f"cover.{ending}", _MIMES[ending], picture)
    return True


def _name(track: av.stream.Stream) -> str:
    kinds = {
        "video": "another track of pictures (the default one is refined)",
        "subtitle": "subtitles",
        "attachment": "an attached file",
    }
    return kinds.get(track.type, "a track of data")


def _describe(made: av.stream.Stream, track: av.stream.Stream) -> None:
    tags = texts(track.metadata).items()
    made.metadata.update({key: value for key, value in tags if key not in _NEEDLESS})
    made.disposition = disposition(track)


def _picture_packets(
    segments: Iterable[dict[str, Tensor]], clip: VideoClip, stream: av.VideoStream
) -> Iterator[av.Packet]:
    step = max(1, round(1 / (clip.rate * clip.time_base)))
    ends, offset = clip.ends, 0
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


def _other_packets(
    source: av.container.InputContainer | None, tracks: _Tracks, form: VideoFormat
) -> Iterator[av.Packet]:
    """Packets of sound and subtitles, with the times that they have in a file that starts at 0."""
    if source is None or not tracks.others:
        return
    kept = [source.streams[index] for index in tracks.others]
    clocks = {track.index: Clock(Fraction(track.time_base), form.clip.start) for track in kept}
    encoders = {
        index: SoundEncoder(made, clocks[index])
        for index, made in tracks.others.items()
        if form.sound == "aac" and made.type == "audio"
    }
    packets, shorten = source.demux(kept), SoundEnds()
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            break
        except av.FFmpegError:  # as far as it can be read
            break
        index = packet.stream.index
        if _is_cover(packet.stream) and packet.size:
            packet.pts = packet.dts = 0
            packet.stream = tracks.others[index]
            yield packet
            continue
        if packet.dts is None or not packet.size:  # the last one is empty and only says that there are no more
            continue
        tracks.damaged[index] += bool(packet.is_corrupt)
        if index in encoders:
            try:
                yield from encoders[index](packet)
            except av.FFmpegError:
                tracks.damaged[index] += 1
            continue
        shorten(packet)
        decoded = packet.dts
        packet.dts = clocks[index](decoded, packet.duration or 0)
        packet.pts = packet.dts + (0 if packet.pts is None else max(0, packet.pts - decoded))
        packet.stream = tracks.others[index]
        yield packet
    for encoder in encoders.values():
        yield from encoder.end()


def _mux(container: av.container.OutputContainer, packet: av.Packet, tracks: _Tracks) -> None:
    """Write a packet; one of another track than the pictures' that is damaged is counted and left out."""
    index = next((number for number, made in tracks.others.items() if made is packet.stream), None)
    try:
        container.mux(packet)
    except av.FFmpegError as error:
        if index is None or error.errno < _FFMPEGS_OWN:
            raise
        tracks.damaged[index] += 1
    else:
        if index is not None:
            tracks.written[index] += 1


def _sound_damage(source: av.container.InputContainer | None, tracks: _Tracks) -> Iterator[str]:
    """Raises ValueError where nothing of a track can be written: its kind is the reason, not damage."""
    numbers = {track.index: number for number, track in enumerate(_sounds(source), start=1)}
    for index, count in sorted(tracks.damaged.items()):
        if count and not tracks.written[index]:
            raise CommandError(f"Nothing of track {numbers.get(index, index)} of sound can be read.")
        if count:
            name = source.streams[index].codec_context.name
            yield f"{count} packets of sound (track {numbers.get(index, index)}, {name}) are damaged."


def _moment(packet: av.Packet) -> Fraction:
    return packet.dts * Fraction(packet.time_base)
