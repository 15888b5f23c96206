"""Video files and animated pictures, read frame by frame: as much of them as can be decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor

from ..errors import CommandError
from .alpha import alpha_of, has_alpha
from .damage import Survey, damage_of
from .hdr import CURVES, PQ, Mastering, has_dynamic_metadata, mastering_of, pq_to_sdr
from .opening import decoder_of, is_encrypted, opened, picture_track
from .orientation import UPRIGHT, Orientation, orientation_of
from .pixels import BT709, colour_matrix, on_black, upright_pixels
from .times import Clock, in_order

_FALLBACK_RATE = Fraction(8)  # frames a second: what the model makes
_UNSPECIFIED = 2  # as a colour tag
_ANIMATIONS = {"WEBP", "AVIF", "TIFF"}  # of what Pillow reads; FFmpeg reads GIF and APNG
_MILLISECOND = Fraction(1, 1000)  # Pillow's unit of durations
_EIGHT_BITS = 8
_OPAQUE = 255
# One frame for each stored one, and only of those that are stored as two halves.
_DEINTERLACER = "bwdif", "mode=send_frame:parity=auto:deint=interlaced"

_RAW = "It is a raw stream, which holds neither times nor a count: frames that have been lost from it go unnoticed."
_INTERLACED = "It is interlaced and is refined with its comb lines: the command's --deinterlace makes whole ones first."


@dataclass(frozen=True)
class VideoClip:
    """A video file whose frames can be read more than once.

    `times` are the frames' timestamps in units of `time_base` seconds, after `start`, the seconds at which the clocks
    of the tracks begin where that is later than 0; `last` is how long the last frame is shown (0: as long as `rate`
    says). `height` and `width` are those of the upright pictures.

    `bits` are those of a colour, `curve` is "PQ" or "HLG" for HDR. `interlaced`: pictures are stored as two halves of
    different times; `deinterlaced`: `frames` makes whole ones of them. `transparent`: see `alpha`. `notes` are
    sentences on what gets lost because refined files hold none of it, and on what can't be known; `damage` on what of
    the file can't be decoded. `other_tracks`: sound and the like belong to the clip.
    """

    path: Path
    height: int
    width: int
    rate: Fraction
    time_base: Fraction
    times: tuple[int, ...]
    matrix: int
    orientation: Orientation = UPRIGHT
    pixel_aspect: Fraction | None = None
    tags: tuple[int, int] = (_UNSPECIFIED, _UNSPECIFIED)  # colour primaries and transfer
    start: Fraction = Fraction(0)
    last: int = 0
    bits: int = _EIGHT_BITS
    curve: str = ""
    mastering: Mastering = Mastering()
    interlaced: bool = False
    deinterlaced: bool = False
    transparent: bool = False
    notes: tuple[str, ...] = ()
    damage: tuple[str, ...] = ()
    other_tracks: bool = True

    @property
    def count(self) -> int:
        """How many frames there are."""
        return len(self.times)

    @property
    def ends(self) -> tuple[int, ...]:
        """When each frame makes way for the next one."""
        step = max(1, round(1 / (self.rate * self.time_base)))
        return (*self.times[1:], self.times[-1] + (self.last or step))

    def alone(self) -> VideoClip:
        """The clip without sound, whose clock then begins with its pictures."""
        first = self.times[0]
        return replace(
            self, start=self.start + first * self.time_base, times=tuple(time - first for time in self.times)
        )

    def beginning(self, count: int) -> VideoClip:
        """The clip's first `count` frames, without its other tracks."""
        last = self.last if count == self.count else self.times[count] - self.times[count - 1]
        return replace(self.alone(), times=self.alone().times[:count], last=last, other_tracks=False)

    def source(self) -> AbstractContextManager[av.container.InputContainer | None]:
        """The file, for its other tracks."""
        return opened(self.path) if self.other_tracks else nullcontext()

    def frames(self, start: int = 0) -> Iterator[Tensor]:
        """Frames from number `start` on, [height, width, 3], on black.

        They are uint8, or in [0, 1] if they have more than 8 bits or are transparent. PQ's are brought to an ordinary
        screen's brightness, see `hdr`.
        """
        deep = self.bits > _EIGHT_BITS or self.transparent
        for frame in self._pictures(start):
            pixels = torch.from_numpy(upright_pixels(frame, self.matrix, self.orientation, deep=deep))
            yield pq_to_sdr(pixels) if deep and self.curve == PQ else pixels

    def alpha(self, start: int = 0) -> Iterator[Tensor]:
        """How opaque each pixel of these frames is, [height, width] in [0, 1]."""
        for frame in self._pictures(start):
            opaque = np.ones((self.height, self.width), np.float32)
            yield torch.from_numpy(alpha_of(frame, self.orientation) if has_alpha(frame) else opaque)

    def _pictures(self, start: int) -> Iterator[av.VideoFrame]:
        with opened(self.path, steady=bool(self.damage)) as container:
            pictures = (item for item in decoded(container) if isinstance(item, av.VideoFrame))
            if self.deinterlaced:
                pictures = _whole_pictures(pictures, picture_track(container))
            yield from islice(pictures, start, self.count)


def _whole_pictures(pictures: Iterator[av.VideoFrame], track: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Make one picture of the two halves of each, by FFmpeg's filter."""
    graph = av.filter.Graph()
    graph.link_nodes(graph.add_buffer(template=track), graph.add(*_DEINTERLACER), graph.add("buffersink")).configure()
    for picture in chain(pictures, [None]):  # None: there are no more
        graph.push(picture)
        with suppress(av.BlockingIOError, av.EOFError):  # nothing more for now
            while True:
                yield graph.pull()


@dataclass(frozen=True)
class AnimatedPicture(VideoClip):
    """An animated WebP or AVIF or the pages of a TIFF."""

    def source(self) -> AbstractContextManager[None]:
        """There are no other tracks."""
        return nullcontext()

    def frames(self, start: int = 0) -> Iterator[Tensor]:
        """Frames from number `start` on, [height, width, 3] uint8, or on black in [0, 1] if they are transparent."""
        for pixels in self._stored(start):
            colours = pixels[..., :3]
            if self.transparent:
                colours = on_black(colours.astype(np.float32) / _OPAQUE, pixels[..., 3].astype(np.float32) / _OPAQUE)
            yield torch.from_numpy(np.ascontiguousarray(colours))

    def alpha(self, start: int = 0) -> Iterator[Tensor]:
        """See `VideoClip`."""
        for pixels in self._stored(start):
            yield torch.from_numpy(pixels[..., 3].astype(np.float32) / _OPAQUE)

    def _stored(self, start: int) -> Iterator[np.ndarray]:
        with Image.open(self.path) as image:
            for index in range(start, self.count):
                image.seek(index)
                yield np.array(image.convert("RGBA"))


@dataclass(frozen=True)
class Damaged:
    """A packet that can't be decoded, and its time in ticks, if it has one."""

    time: int | None


def decoded(container: av.container.InputContainer) -> Iterator[av.VideoFrame | Damaged]:
    """The frames of a video that can be decoded, in the order in which they are shown, and what can't be."""
    track = picture_track(container)
    decoder = decoder_of(track)
    for packet in _packets(container, track):
        yield from _decoded(packet, decoder)


def _decoded(packet: av.Packet | Damaged, decoder: av.VideoCodecContext) -> Iterator[av.VideoFrame | Damaged]:
    if isinstance(packet, Damaged):
        yield packet
        return
    try:
        yield from decoder.decode(packet)
    except av.FFmpegError:
        yield Damaged(packet.pts if packet.pts is not None else packet.dts)


def _packets(container: av.container.InputContainer, *tracks: av.stream.Stream) -> Iterator[av.Packet | Damaged]:
    """The packets as far as the container can be read."""
    packets = container.demux(*tracks)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.FFmpegError:
            yield Damaged(None)
            return
        yield packet


def open_clip(
    path: Path, on_frame: Callable[[int, int], None] = lambda done, total: None, *, deinterlace: bool = False
) -> VideoClip:
    """Read a video or an animated picture to its end: only that shows how many frames can be decoded.

    `on_frame(done, expected)` runs after each; expected is 0 where the file doesn't say. `deinterlace`: make whole
    pictures of interlaced ones. Raises CommandError.
    """
    if is_animated(path) and _pillow_kind(path) in _ANIMATIONS:
        return _open_animation(path, on_frame)
    clip = _survey(path, on_frame, steady=False)
    if clip.damage:  # counted as the frames will be read
        clip = _survey(path, on_frame, steady=True)
    if deinterlace:
        return replace(clip, deinterlaced=clip.interlaced)
    return replace(clip, notes=(*clip.notes, _INTERLACED)) if clip.interlaced else clip


def _survey(path: Path, on_frame: Callable[[int, int], None], *, steady: bool) -> VideoClip:
    with opened(path, steady=steady) as container:
        track, survey = picture_track(container), Survey()
        decoder = decoder_of(track)
        sounds = [each for each in container.streams.audio if each.codec_context is not None]
        for packet in _packets(container, track, *sounds):
            if isinstance(packet, Damaged):
                survey.damaged.append(None)
                continue
            survey.packet(packet)
            if packet.stream.index != track.index:
                continue
            survey.picture_packet(packet)
            for item in _decoded(packet, decoder):
                if isinstance(item, Damaged):
                    survey.damaged.append(item.time)
                else:
                    survey.frame(item, path)
                    on_frame(len(survey.times), track.frames)
        if survey.first is None:
            why = "it is encrypted" if is_encrypted(path) else "none of its pictures can be decoded"
            raise CommandError(f"{path} can't be read as a video: {why}.")
        return _clip(path, container, track, survey, [track, *sounds])


def _clip(
    path: Path,
    container: av.container.InputContainer,
    track: av.VideoStream,
    survey: Survey,
    tracks: list[av.stream.Stream],
) -> VideoClip:
    first, context = survey.first, track.codec_context
    # PyAV from 19 on has rationals of its own, which lack most of a Fraction's arithmetic.
    time_base = Fraction(track.time_base)
    rate = Fraction(track.average_rate or track.guessed_rate or _FALLBACK_RATE)
    begins = [each.start_time * Fraction(each.time_base) for each in tracks if each.start_time is not None]
    start = max(Fraction(0), min(begins, default=Fraction(0)))
    shown = in_order(survey.times)
    if shown != survey.times and survey.decoding_times and len(survey.delays) <= 1:
        # Such times are those of decoding, and the first frame is shown when the first packet is due.
        early = min(time for time in shown if time is not None) - min(survey.decoding_times)
        shown = [None if time is None else time - early for time in shown]
    clock, step = Clock(time_base, start), round(1 / (rate * time_base))
    times = tuple(clock(time, step) for time in shown)
    orientation = orientation_of(first, context.name)
    size = (first.height, first.width)
    aspect = Fraction(track.sample_aspect_ratio or 0) or None
    return VideoClip(
        path=path,
        height=size[orientation.transposed],
        width=size[not orientation.transposed],
        rate=rate,
        time_base=time_base,
        times=times,
        matrix=colour_matrix(first),
        orientation=orientation,
        pixel_aspect=1 / aspect if aspect and orientation.transposed else aspect,
        tags=(int(context.color_primaries), int(context.color_trc)),
        start=start,
        last=survey.last if survey.last != step else 0,
        bits=max(component.bits for component in first.format.components),
        curve=CURVES.get(int(context.color_trc), ""),
        mastering=mastering_of(first, context.name),
        interlaced=survey.interlaced,
        transparent=survey.transparent,
        notes=tuple(_losses(survey, context.name)),
        damage=tuple(damage_of(path, container, track, survey, times)),
    )


def _losses(survey: Survey, codec: str) -> Iterator[str]:
    """What refined pictures don't keep, and what nobody can know."""
    frame = survey.first
    if frame.pts is None and not survey.shown:
        yield _RAW
    if has_dynamic_metadata(frame, codec):
        yield "Its dynamic HDR metadata (HDR10+ or Dolby Vision) gets lost: frame by frame, it belongs to the source."


def is_animated(path: Path) -> bool:
    """Whether a picture file holds several pictures."""
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) > 1 and image.format != "MPO"  # a photo and its previews
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError):
        return False


def _pillow_kind(path: Path) -> str | None:
    with Image.open(path) as image:
        return image.format


def _open_animation(path: Path, on_frame: Callable[[int, int], None]) -> AnimatedPicture:
    times, transparent, end = [], False, Fraction(0)
    try:
        with Image.open(path) as image:
            size, count = image.size, image.n_frames
            for page in ImageSequence.Iterator(image):
                page.load()
                if page.size != size:
                    raise CommandError(f"{path}: the pictures change their size at frame {len(times)}.")
                transparent = transparent or page.mode in ("RGBA", "LA", "PA") or "transparency" in page.info
                times.append(round(end / _MILLISECOND))
                end += Fraction(page.info.get("duration") or 1000 / _FALLBACK_RATE) * _MILLISECOND
                on_frame(len(times), count)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise CommandError(f"{path} can't be read as an animated picture: {error}.") from error
    return AnimatedPicture(
        path=path,
        height=size[1],
        width=size[0],
        rate=(len(times) / end).limit_denominator(1001),
        time_base=_MILLISECOND,
        times=tuple(times),
        matrix=BT709,
        last=round(end / _MILLISECOND) - times[-1],
        transparent=transparent,
    )
