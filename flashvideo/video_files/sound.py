"""Packets of sound: copied to their end and not beyond it, or encoded anew."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from fractions import Fraction

import av

from .times import Clock

_ROUNDED = Fraction(1, 500)  # seconds: MP4 counts the length of a track in milliseconds
_HIDDEN = "skip_samples"  # beside a packet: samples of its beginning and of its end that are not to be heard
# FFmpeg's decoders of codecs whose packets all hold equally many samples.
_EQUAL_PACKETS = ("aac", "ac3", "eac3", "mp2", "mp2float", "mp3", "mp3float")
_HIDDEN_FORM = "<IIBB"  # both numbers, and two reasons, which nothing reads


class SoundEnds:
    """Shortens packets of sound by what of them is not to be heard.

    MP4 says so by the last packet's duration, Matroska by a number of samples beside it. Here it's said both ways.
    """

    def __init__(self) -> None:
        self._usual: dict[int, int] = {}  # of a track: the longest packet so far, in its time base

    def __call__(self, packet: av.Packet) -> None:
        """Shorten a packet where needed; packets of a track come in their order."""
        track, length = packet.stream, packet.duration
        if track.type != "audio" or not length or packet.pts is None:
            return
        rate, time_base = track.codec_context.sample_rate, Fraction(packet.time_base)
        usual = self._usual[track.index] = max(length, self._usual.get(track.index, 0))
        begin, samples = _hidden(packet)
        hidden = round(Fraction(samples, rate) / time_base)
        if track.duration:  # packets after the end are damage, or a recording's that goes on
            beyond = packet.pts + length - (track.start_time or 0) - track.duration
            if beyond * time_base > _ROUNDED and hidden < beyond < length:
                hidden = beyond
            short = usual - length + hidden if track.codec_context.name in _EQUAL_PACKETS and beyond >= -1 else 0
            if max(short, hidden) * time_base > _ROUNDED:
                _hide(packet, begin, round(max(short, hidden) * time_base * rate))
        packet.duration = max(1, length - max(0, hidden))


def _hidden(packet: av.Packet) -> tuple[int, int]:
    """Samples of a packet's beginning and end that aren't heard, by what stands beside it."""
    if not getattr(packet, "has_sidedata", lambda _: False)(_HIDDEN):
        return 0, 0
    beside = bytes(packet.get_sidedata(_HIDDEN))
    return struct.unpack(_HIDDEN_FORM, beside)[:2] if len(beside) == struct.calcsize(_HIDDEN_FORM) else (0, 0)


def _hide(packet: av.Packet, begin: int, end: int) -> None:
    """Say beside a packet how many samples of its beginning and end aren't heard, where PyAV can."""
    if hasattr(av.packet, "PacketSideData"):
        kind = av.packet.packet_sidedata_type_from_literal(_HIDDEN)
        beside = av.packet.PacketSideData(kind, struct.calcsize(_HIDDEN_FORM))
        beside.update(struct.pack(_HIDDEN_FORM, begin, end, 0, 0))
        packet.set_sidedata(beside)


class SoundEncoder:
    """Encodes a track of sound anew, at the times that it has."""

    def __init__(self, made: av.AudioStream, clock: Clock) -> None:
        context = made.codec_context
        self._made, self._clock = made, clock
        self._resampler = av.AudioResampler(format="fltp", layout=context.layout.name, rate=context.sample_rate)
        self._next: int | None = None  # sample

    def __call__(self, packet: av.Packet) -> Iterator[av.Packet]:
        """The packets that one of the source makes ready. Raises av.FFmpegError for a damaged one."""
        time_base = Fraction(packet.time_base)
        for frame in packet.decode():
            length = round(Fraction(frame.samples, frame.sample_rate) / time_base)
            at = self._clock(frame.pts, length)
            if self._next is None:
                self._next = round(at * time_base * self._made.codec_context.sample_rate)
            frame.pts = None
            yield from self._encoded(self._resampler.resample(frame))

    def end(self) -> Iterator[av.Packet]:
        """What is left."""
        yield from self._encoded(self._resampler.resample(None))
        yield from self._made.encode(None)

    def _encoded(self, frames: list[av.AudioFrame]) -> Iterator[av.Packet]:
        for frame in frames:
            frame.pts, frame.time_base = self._next, Fraction(1, self._made.codec_context.sample_rate)
            self._next += frame.samples
            yield from self._made.encode(frame)
