"""What of a video can't be decoded, and where: counted while it is read to its end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av

from ..errors import CommandError
from .alpha import is_transparent
from .structure import is_broken, is_cut_off
from .times import missing_frames

_SILENCE = Fraction(1, 20)  # seconds: from there on packets of sound are missing
_NAMED = 3  # places in a sentence
# Each packet of these gives one frame, those before the first frame apart. VP8 and MPEG-4 have packets that show none.
_ONE_EACH = {"h264", "hevc", "vvc", "vp9", "av1", "mpeg1video", "mpeg2video", "mjpeg", "prores"}


@dataclass
class Survey:
    """What one reading of a whole video tells."""

    times: list[int | None] = field(default_factory=list)
    first: av.VideoFrame | None = None
    last: int = 0
    damaged: list[int | None] = field(default_factory=list)  # times of what can't be decoded
    packets: int = 0
    marked: int = 0  # packets and frames that FFmpeg marked as damaged
    unseen: int = 0  # packets that are not to be shown
    decoding_times: list[int] = field(default_factory=list)
    awaited: set[int] = field(default_factory=set)  # times of packets whose frames haven't come out
    shown: bool = False  # whether packets say when their frames are shown
    interlaced: bool = False
    delays: set[int] = field(default_factory=set)  # from decoding to showing: several where the file knows both
    transparent: bool = False  # whether something is
    sounds: dict[int, Fraction] = field(default_factory=dict)  # when a track's next packet is due, in seconds
    silences: list[tuple[Fraction, Fraction]] = field(default_factory=list)  # where packets of sound are missing

    def packet(self, packet: av.Packet) -> None:
        if packet.dts is None or not packet.size:
            return
        begin, length = (time * Fraction(packet.time_base) for time in (packet.dts, packet.duration or 0))
        if packet.stream.type == "audio" and length:
            due = self.sounds.get(packet.stream.index, begin)
            if begin - due > max(2 * length, _SILENCE):
                self.silences.append((due, begin))
            self.sounds[packet.stream.index] = begin + length

    def picture_packet(self, packet: av.Packet) -> None:
        if not packet.size:
            return
        self.packets += 1
        # A recording that begins in the middle of a stream has a damaged first packet by nature.
        self.marked += bool(packet.is_corrupt) and self.packets > 1
        self.unseen += bool(packet.is_discard)
        if packet.pts is not None and not packet.is_discard:
            self.awaited.add(packet.pts)
            self.shown = True
        if packet.dts is not None:
            self.decoding_times.append(packet.dts)
            if packet.pts is not None:
                self.delays.add(packet.pts - packet.dts)

    def frame(self, frame: av.VideoFrame, path: Path) -> None:
        self.first = self.first or frame
        if (frame.height, frame.width) != (self.first.height, self.first.width):
            raise CommandError(f"{path}: the pictures change their size at frame {len(self.times)}.")
        self.times.append(frame.pts)
        self.awaited.discard(frame.pts)
        self.interlaced = self.interlaced or frame.interlaced_frame
        self.last = frame.duration or 0
        self.marked += bool(frame.is_corrupt)
        self.transparent = self.transparent or is_transparent(frame)

    def undecoded(self, codec: str) -> tuple[int, set[int]]:
        """How many packets gave no frame, of codecs that make one of each, and their times where those are known."""
        if codec not in _ONE_EACH or self.interlaced:  # a packet may be half an interlaced frame
            return 0, set()
        if self.first.pts is None or not self.awaited:
            return (0 if self.shown else self.packets - self.unseen - len(self.times)), set()
        times = {time for time in self.awaited if time > self.first.pts}
        return len(times), times


def damage_of(
    path: Path, container: av.container.InputContainer, track: av.VideoStream, survey: Survey, times: tuple[int, ...]
) -> Iterator[str]:
    """A sentence on what of the pictures can't be decoded, and where; none without evidence of damage.

    `times` are the frames' own, after the clip's start. A gap in them is no evidence: it may be as it was recorded.
    """
    gaps, known = missing_frames(times), container.format.name
    time_base = Fraction(track.time_base)
    said = track.frames if "mov" in known else 0
    fewer = track.frames > survey.packets > 0  # AVI also counts frames that only say that a picture stays
    undecoded, undecoded_times = survey.undecoded(track.codec_context.name)
    short = is_cut_off(path, known) or (fewer and said > 0)
    early = times[-1] * time_base + 2 * _longest_step(times) * time_base < _duration(container)
    if not (survey.damaged or survey.marked or short or undecoded or _both_missing(survey, times, gaps, time_base)):
        if not (gaps or early or fewer) or not is_broken(path, known):
            return
        short = early
    lost = max(0, said - survey.unseen - len(times)) if said else sum(count for _, count in gaps)
    lost = max(lost, len(survey.damaged), undecoded)
    places = [times[index] * time_base for index, _ in gaps if index < len(times) - 1]
    if not places:
        begin = times[0] - (survey.first.pts or 0)
        known_times = {time for time in survey.damaged if time is not None} | undecoded_times
        places = [(begin + time) * time_base for time in sorted(known_times)]
    where = [f"{float(place):.1f} s" for place in places[:_NAMED]]
    if short:
        where.append(f"from {float(times[-1] * time_base):.1f} s on")
    what = f"{lost} of {lost + len(times)} frames can't be decoded" if lost else "some frames are damaged"
    yield what + (f" ({', '.join(where)})" if where else "") + "; the others are refined at their own times."


def _longest_step(times: tuple[int, ...]) -> int:
    return max((after - before for before, after in pairwise(times)), default=0)


def _duration(container: av.container.InputContainer) -> Fraction:
    """Seconds that a file lasts by its own words; 0 where it doesn't say."""
    return Fraction(container.duration or 0, av.time_base)


def _both_missing(survey: Survey, times: tuple[int, ...], gaps: list[tuple[int, int]], time_base: Fraction) -> bool:
    """Whether pictures and sound are missing at one place: a gap of one alone may be as it was recorded."""
    begin = survey.first.pts or 0
    for index, _ in gaps:
        before, after = ((times[place] - times[0] + begin) * time_base for place in (index - 1, index))
        if any(start < after and before < end for start, end in survey.silences):
            return True
    return False
