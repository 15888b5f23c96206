"""Refined frames as H.264 segments, and drafts without loss.

A segment is encoded by itself, from a key frame on, and kept as packets: a run that is interrupted has its finished
segments, and the file they make is the same as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.codec.context import Flags
from torch import Tensor

from .opening import opened
from .pixels import BT601, EXACT, LIMITED
from .reading import VideoClip

CODEC = "libx264"
CRF = 14  # of the official script's writer: hardly distinguishable from the frames themselves
# Without this, x264's assembler code reads beyond its tables for some widths, and no two files are the same.
_STEADY = "mbtree=0"


@dataclass(frozen=True)
class VideoFormat:
    """How a refined video is written: H.264 of constant quality (`crf`: 0 is lossless, 51 the worst), and its sound.

    `sound` is one of `writing.SOUNDS`: copied as it is, encoded anew as AAC, or none.
    """

    clip: VideoClip
    height: int
    width: int
    crf: int = CRF
    sound: str = "copy"

    def prepare(self, context: av.VideoCodecContext) -> None:
        """Set up an encoder."""
        context.height, context.width = self.height, self.width
        # Colours at half size need even sides.
        context.pix_fmt = "yuv444p" if self.height % 2 or self.width % 2 else "yuv420p"
        context.framerate, context.time_base = self.clip.rate, 1 / self.clip.rate
        context.colorspace, context.color_range = self.clip.matrix, LIMITED
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
                format=context.pix_fmt, src_colorspace=BT601, dst_colorspace=form.clip.matrix, interpolation=EXACT
            )
            frame.pts, frame.time_base = index, context.time_base
            packets += context.encode(frame)
            index += 1
    packets += context.encode(None)
    rows = [[packet.size, packet.pts, packet.dts, int(packet.is_keyframe)] for packet in packets]
    data = np.frombuffer(b"".join(bytes(packet) for packet in packets), dtype=np.uint8)
    return {"data": torch.from_numpy(data.copy()), "packets": torch.tensor(rows)}


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
