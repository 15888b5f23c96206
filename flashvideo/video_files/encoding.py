"""Refined frames as segments of H.264, HEVC, AV1 or ProRes, and drafts without loss.

A segment is encoded by itself, from a key frame on, and kept as packets: a run that is interrupted has its finished
segments, and the file they make is the same as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.codec.context import Flags
from torch import Tensor

from ..errors import CommandError
from .alpha import add_alpha, split_alpha
from .hdr import PQ, SCREEN_UNITS, Mastering, sdr_to_pq
from .opening import opened
from .pixels import BT601, DEEP_YUV, EXACT, LIMITED
from .reading import VideoClip

CRF = 14  # of the official script's writer: hardly distinguishable from the frames themselves
AUTO = "auto"
BITS = 8, 10  # a colour that files are written with
KEEP_ALPHA = "The command keeps it in ProRes (--codec prores) and in numbered PNG, TIFF and OpenEXR."
_WHITE = 255
# Without the first, x264's assembler code reads beyond its tables for some widths, and no two files are the same;
# x265's result would depend on how many threads there are.
_STEADY_X264, _STEADY_X265 = "mbtree=0", "frame-threads=1:log-level=error"
_REORDERED = 2  # frames by which x264 and x265 decode earlier than they show
_MAX_CRF_X264, _MAX_CRF_AV1 = 51, 63


@dataclass(frozen=True)
class Encoder:
    """A kind of pictures in a file, and FFmpeg's encoder for it.

    `halved`, `full`: pixel formats by bits a colour, with colours at half size (for even sides only) and at full size;
    `with_alpha`: for what is transparent.
    `tag`: what players of Apple's ask for in MP4 and MOV.
    """

    title: str
    name: str
    halved: Mapping[int, str]
    full: Mapping[int, str]
    options: Callable[[int, Mastering], dict[str, str]]
    containers: Collection[str] = ("mp4", "mov", "matroska")
    tag: str = ""
    with_alpha: Mapping[int, str] = field(default_factory=dict)

    def check(self, bits: int) -> None:
        """Raise CommandError if it isn't there, or has other bits a colour."""
        if bits not in self.halved:
            raise CommandError(f"{self.title} has {' or '.join(map(str, self.halved))} bits a colour, not {bits}.")
        try:
            av.Codec(self.name, "w")
        except (av.FFmpegError, ValueError) as error:  # PyAV's own error is a ValueError
            raise CommandError(f"This machine's PyAV can't write {self.title} ({self.name}).") from error


def _h264(crf: int, mastering: Mastering) -> dict[str, str]:
    known = [_STEADY_X264]
    if mastering.screen:
        known.append(f"mastering-display={mastering.screen_text(*SCREEN_UNITS)}")
    if mastering.brightest:
        known.append("cll={},{}".format(*mastering.brightest))
    # With 10 bits quality 0 still loses something.
    return {**({"crf": str(crf)} if crf else {"qp": "0"}), "x264-params": ":".join(known)}


def _hevc(crf: int, mastering: Mastering) -> dict[str, str]:
    known = [_STEADY_X265, *(["lossless=1"] if crf == 0 else [])]
    if mastering.screen:
        known.append(f"master-display={mastering.screen_text(*SCREEN_UNITS)}")
    if mastering.brightest:
        known.append("max-cll={},{}".format(*mastering.brightest))
    return {"crf": str(crf), "x265-params": ":".join(known)}


def _av1(crf: int, mastering: Mastering) -> dict[str, str]:
    known = ["lp=1"]  # threads that its result may depend on
    if mastering.screen:
        known.append(f"mastering-display={mastering.screen_text()}")
    if mastering.brightest:
        known.append("content-light={},{}".format(*mastering.brightest))
    return {"crf": str(round(crf * _MAX_CRF_AV1 / _MAX_CRF_X264)), "preset": "6", "svtav1-params": ":".join(known)}


_HALVED, _FULL = {8: "yuv420p", 10: "yuv420p10le"}, {8: "yuv444p", 10: "yuv444p10le"}
ENCODERS = {
    "h264": Encoder("H.264", "libx264", _HALVED, _FULL, _h264),
    "hevc": Encoder("HEVC", "libx265", _HALVED, _FULL, _hevc, tag="hvc1"),
    "av1": Encoder("AV1", "libsvtav1", _HALVED, {}, _av1),
    "prores": Encoder(
        "ProRes",
        "prores_ks",
        {10: "yuv422p10le"},
        {10: "yuv444p10le"},
        lambda crf, mastering: {},
        containers=("mov", "matroska"),
        with_alpha={10: "yuva444p10le"},
    ),
}
CODECS = (AUTO, *ENCODERS)


@dataclass(frozen=True)
class VideoFormat:
    """How a refined video is written: its pictures, and its sound.

    `codec` is one of CODECS; auto is H.264, for more than 8 bits HEVC. `bits` a colour, one of BITS; None is 8, and 10
    for sources of more. `crf` is the quality, constant over time: 0 is lossless (but for AV1), 51 the worst; ProRes
    has none. `sound` is one of `writing.SOUNDS`: copied as it is, encoded anew as AAC, or none.

    Raises CommandError for a codec that isn't there, or can't have these bits or this size.
    """

    clip: VideoClip
    height: int
    width: int
    crf: int = CRF
    sound: str = "copy"
    codec: str = AUTO
    bits: int | None = None

    def __post_init__(self) -> None:
        self.encoder.check(self.depth)
        if self.pixels is None:
            size = f"{self.width}x{self.height}"
            raise CommandError(f"{self.encoder.title} needs even sides; the result would be {size}.")

    @property
    def encoder(self) -> Encoder:
        """What the pictures are encoded with."""
        automatic = "h264" if self.depth == min(BITS) else "hevc"
        return ENCODERS[automatic if self.codec == AUTO else self.codec]

    @property
    def depth(self) -> int:
        """Bits a colour."""
        if self.bits is None:
            least = 10 if self.codec == "prores" else min(BITS)
            return max(least, 10 if self.clip.bits > min(BITS) else min(BITS))
        return self.bits

    @property
    def keeps_alpha(self) -> bool:
        """Whether the pictures are transparent as their source is."""
        return self.clip.transparent and self.depth in self.encoder.with_alpha

    @property
    def pixels(self) -> str | None:
        """FFmpeg's name of the pixel format; None where the codec has none."""
        if self.keeps_alpha:
            return self.encoder.with_alpha[self.depth]
        is_even = self.height % 2 == self.width % 2 == 0
        return (self.encoder.halved if is_even else self.encoder.full).get(self.depth)

    def prepare(self, context: av.VideoCodecContext, container: str = "") -> None:
        """Set up an encoder, for a container that it has to name itself to."""
        context.height, context.width, context.pix_fmt = self.height, self.width, self.pixels
        context.framerate, context.time_base = self.clip.rate, 1 / self.clip.rate
        context.colorspace, context.color_range = self.clip.matrix, LIMITED
        context.color_primaries, context.color_trc = self.clip.tags
        if self.clip.pixel_aspect is not None:
            context.sample_aspect_ratio = self.clip.pixel_aspect
        if self.encoder.tag and container in ("mp4", "mov"):
            context.codec_tag = self.encoder.tag
        context.options = self.encoder.options(self.crf, self.clip.mastering)

    def losses(self) -> Iterator[str]:
        """A sentence on each thing of the pictures that this format has no room for."""
        clip = self.clip
        if clip.transparent and not self.keeps_alpha:
            yield f"Its transparency gets lost: the result stands on black. {KEEP_ALPHA}"
        if clip.bits > self.depth:
            hdr = f", and it is HDR ({clip.curve}): dark and bright parts may show steps" if clip.curve else ""
            yield f"Its {clip.bits} bits a colour become {self.depth}{hdr}."
        if (clip.mastering.screen or clip.mastering.brightest) and self.encoder.name == "prores_ks":
            yield "ProRes has no room for its mastering data (the display that it was made on, its brightest frames)."


def encode_segment(frames: Iterable[Tensor], form: VideoFormat) -> dict[str, Tensor]:
    """Encode frames, [t, H, W, 3 or premultiplied 4] at a time, uint8 or in [0, 1], from a key frame on.

    Returns `data`, the packets' bytes one after the other, and `packets` [n, 4]: size, number of the frame shown,
    number by which it is decoded (starts below 0), and whether it is a key frame.
    """
    context = av.CodecContext.create(form.encoder.name, "w")
    form.prepare(context)
    context.flags |= Flags.global_header
    packets, index = [], 0
    for chunk in frames:
        for picture in chunk:
            frame = _frame(picture, form)
            frame.pts, frame.time_base = index, context.time_base
            packets += context.encode(frame)
            index += 1
    packets += context.encode(None)
    # x265 doesn't set the times of decoding of one or two frames.
    unset = any(abs(packet.dts) > len(packets) + _REORDERED for packet in packets)
    decoded = [number - _REORDERED if unset else packet.dts for number, packet in enumerate(packets)]
    rows = [
        [packet.size, packet.pts, when, int(packet.is_keyframe)] for packet, when in zip(packets, decoded, strict=True)
    ]
    data = np.frombuffer(b"".join(bytes(packet) for packet in packets), dtype=np.uint8)
    return {"data": torch.from_numpy(data.copy()), "packets": torch.tensor(rows)}


def _frame(picture: Tensor, form: VideoFormat) -> av.VideoFrame:
    """A picture [H, W, 3 or premultiplied 4] as the file stores it."""
    if not form.keeps_alpha:
        return _opaque_frame(picture, form, form.pixels)
    colours, alpha = split_alpha(picture, 2**form.depth - 1)
    return add_alpha(_opaque_frame(colours, form, form.encoder.full[form.depth]), alpha, form.pixels)


def _opaque_frame(picture: Tensor, form: VideoFormat, kind: str) -> av.VideoFrame:
    pixels = _stored(picture, form)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24" if pixels.dtype == np.uint8 else "rgb48le")
    return frame.reformat(format=kind, src_colorspace=BT601, dst_colorspace=form.clip.matrix, interpolation=EXACT)


def _stored(picture: Tensor, form: VideoFormat) -> np.ndarray:
    """A picture as pixels of the file's brightness, uint8 or uint16."""
    if picture.dtype == torch.uint8:
        return picture.numpy()
    if form.clip.curve == PQ:
        picture = sdr_to_pq(picture)
    white, dtype = (_WHITE, np.uint8) if form.depth == min(BITS) else (DEEP_YUV, np.uint16)
    return (picture * white).round().numpy().astype(dtype)


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
    with opened(path) as container:
        return container.metadata.get("COMMENT", "")
