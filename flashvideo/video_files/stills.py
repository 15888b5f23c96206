"""Stills with 16 bits a colour, of which Pillow reads and writes 8: PNG and TIFF, through FFmpeg."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from ..errors import CommandError
from .picture_metadata import with_profile
from .sequences import SEQUENCES, decode_picture

DEEP_ENDINGS = (".png", ".tif", ".tiff")
_CODECS = {"PNG": "png", "TIFF": "tiff"}  # by Pillow's names
_CHANNELS = {"rgb48": 3, "rgba64": 4, "ya16": 2}  # by FFmpeg's names of pixels, without the order of bytes
_WHITE = 65535
# By the EXIF tag: how stored pixels are turned to be upright.
_UPRIGHT = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}


def read_deep(path: Path, kind: str, orientation: int) -> np.ndarray | None:
    """Pixels of a still with 16 bits a colour, float32 [H, W, 3 or 4] in [0, 1], upright; else None.

    `kind`: Pillow's name of the format; `orientation`: the EXIF tag. Grey with alpha becomes colours; grey without is
    not read here, since Pillow keeps its depth.
    """
    if kind not in _CODECS:
        return None
    try:
        frame = decode_picture(path, _CODECS[kind])
    except CommandError:  # such as a compression that only Pillow knows
        return None
    name = frame.format.name
    channels = _CHANNELS.get(name[:-2])
    if channels is None:
        return None
    plane = frame.planes[0]
    numbers = np.frombuffer(bytes(plane), ">u2" if name.endswith("be") else "<u2").reshape(plane.height, -1)
    pixels = numbers[: frame.height, : frame.width * channels].reshape(frame.height, frame.width, channels)
    if channels == _CHANNELS["ya16"]:
        pixels = pixels[..., [0, 0, 0, 1]]
    return np.ascontiguousarray(_UPRIGHT.get(orientation, np.asarray)(pixels), np.float32) / _WHITE


def deep_file(pixels: np.ndarray, ending: str, profile: bytes | None) -> bytes:
    """Pixels uint16 [H, W, 3 or 4] as a file of one of DEEP_ENDINGS, with an ICC profile."""
    kind = SEQUENCES[ending]
    opaque = pixels.shape[2] == len("RGB")
    stored = (kind.pixels if opaque else kind.with_alpha)[16]
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb48le" if opaque else "rgba64le")
    context = av.CodecContext.create(kind.encoder, "w")
    context.height, context.width, context.pix_fmt = *pixels.shape[:2], stored
    context.time_base = Fraction(1)
    packets = [*context.encode(frame.reformat(format=stored)), *context.encode(None)]
    content = b"".join(bytes(packet) for packet in packets)
    return content if profile is None else with_profile(content, profile)
