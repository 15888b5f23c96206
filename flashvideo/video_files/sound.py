"""Packets of sound: copied to their end and not beyond it, or encoded anew."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import av

from .times import Clock

_ROUNDED = Fraction(1, 500)  # seconds: MP4 counts the length of a track in milliseconds


def keep_end(packet: av.Packet) -> None:
    """Shorten a packet of sound by what of it is not to be heard: MP4 says so by its duration, others beside it."""
    track, length = packet.stream, packet.duration
    if track.type != "audio" or not length or packet.pts is None:
        return
    hidden = 0
    if getattr(packet, "has_sidedata", lambda _: False)("skip_samples"):
        samples = int.from_bytes(bytes(packet.get_sidedata("skip_samples"))[4:8], "little")
        hidden = round(Fraction(samples, track.codec_context.sample_rate) / Fraction(packet.time_base))
    if track.duration:  # packets after the end are damage, or a recording's that goes on
        beyond = packet.pts + length - (track.start_time or 0) - track.duration
        if beyond * Fraction(packet.time_base) > _ROUNDED and beyond < length:
            hidden = max(hidden, beyond)
    packet.duration = max(1, length - max(0, hidden))


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
