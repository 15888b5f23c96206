"""Decoded frames as they are meant to be seen: upright, by their own colour matrix, on black where transparent."""

from __future__ import annotations

from typing import NamedTuple

import av
import numpy as np

BT709, BT601 = 1, 5  # FFmpeg's numbers of the colour matrices
_MATRICES = {1: BT709, 5: BT601, 6: BT601, 7: 7, 9: 9}  # by a stream's tag; what swscale knows
LIMITED, FULL = 1, 2  # FFmpeg's numbers of the ranges that brightness is stored in
_HD_ROWS = 720  # from here on, untagged video is taken as BT.709
# swscale's numbers: bilinear, colour for every pixel, rounding. Without the last two each channel loses 1.3 of 255.
EXACT = 0x2 | 0x2000 | 0x40000
_UNSAFE = ("png", "apng")
_CHANNELS = 4  # of a transparent picture
_OPAQUE = 255
# White in 16 bits: all of them in RGB; swscale moves 255 of 8 bits up by 8 when it comes from or goes to YUV.
DEEP_RGB, DEEP_YUV = 65535, 65280


class Orientation(NamedTuple):
    """How stored pictures are turned to be upright: first transposed, then their rows or columns reversed."""

    transposed: bool = False
    rows_reversed: bool = False
    columns_reversed: bool = False

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Turn a picture [H, W, C]."""
        pixels = pixels.swapaxes(0, 1) if self.transposed else pixels
        pixels = pixels[::-1] if self.rows_reversed else pixels
        return np.ascontiguousarray(pixels[:, ::-1] if self.columns_reversed else pixels)


UPRIGHT = Orientation()
_BY_ANGLE = {  # degrees counterclockwise
    -90: Orientation(True, False, True),
    90: Orientation(True, True, False),
    180: Orientation(False, True, True),
    -180: Orientation(False, True, True),
}


def side_data(frame: av.VideoFrame, name: str, codec: str) -> bytes | None:
    """What comes with a frame beside its pixels, by PyAV's name; None without it. `codec`: FFmpeg's name.

    Not asked of PNG: for its colour profile, PyAV (16 at least) frees memory twice, which ends the program. None, too,
    where something else comes with the frame that PyAV doesn't know, such as EXIF.
    """
    if codec in _UNSAFE:
        return None
    try:
        return bytes(frame.side_data[name])
    except (KeyError, ValueError):
        return None


def orientation_of(frame: av.VideoFrame, codec: str) -> Orientation:
    """The orientation that a file's display matrix asks for: telephones store lying or mirrored pictures.

    The matrix maps (x, y) to (a x + c y, b x + d y), see FFmpeg's libavutil/display.h; angles between quarter turns
    are taken as the nearest one.
    """
    data = side_data(frame, "DISPLAYMATRIX", codec)
    if data is None:
        return _BY_ANGLE.get(getattr(frame, "rotation", 0), UPRIGHT)
    matrix = np.frombuffer(data, "<i4").reshape(3, 3)
    (a, b), (c, d) = matrix[:2, :2].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(False, d < 0, a < 0)
    return Orientation(True, b < 0, c < 0)


def colour_matrix(frame: av.VideoFrame) -> int:
    """FFmpeg's number of the matrix that a frame's colours were made with, a guess where the file doesn't say."""
    return _MATRICES.get(int(frame.colorspace), BT709 if frame.height >= _HD_ROWS else BT601)


def is_transparent(frame: av.VideoFrame) -> bool:
    """Whether something of a frame is transparent."""
    if not _has_alpha(frame):
        return False
    return bool(frame.reformat(format="rgba").to_ndarray()[..., 3].min() < _OPAQUE)


def _has_alpha(frame: av.VideoFrame) -> bool:
    return any(component.is_alpha for component in frame.format.components)


def upright_pixels(
    frame: av.VideoFrame, matrix: int, orientation: Orientation = UPRIGHT, *, deep: bool = False
) -> np.ndarray:
    """A frame as it is meant to be seen, [H, W, 3]: by its colour matrix, upright, on black.

    uint8, or float32 in [0, 1] if `deep`, for pictures of more than 8 bits a colour.
    """
    colours = "rgba" if _has_alpha(frame) else "rgb"
    depth = {"rgb": "rgb48le", "rgba": "rgba64le"} if deep else {"rgb": "rgb24", "rgba": "rgba"}
    is_rgb = frame.format.is_rgb
    # PyAV takes BT.601 and limited range for granted unless the two are named and differ.
    frame = frame.reformat(
        format=depth[colours],
        src_colorspace=matrix,
        dst_colorspace=BT601,
        src_color_range=FULL if int(frame.color_range) == FULL else LIMITED,
        dst_color_range=LIMITED,
        interpolation=EXACT,
    )
    pixels = frame.to_ndarray()
    if deep:
        return orientation.apply(_fractions(pixels, DEEP_RGB if is_rgb else DEEP_YUV))
    return orientation.apply(on_black(pixels))


def _fractions(pixels: np.ndarray, white: int) -> np.ndarray:
    """A picture uint16 [H, W, 3 or 4] as float32 [H, W, 3] in [0, 1], on black."""
    colours = np.minimum(pixels[..., :3].astype(np.float32) / white, 1)
    return colours if pixels.shape[2] < _CHANNELS else colours * (pixels[..., 3:].astype(np.float32) / DEEP_RGB)


def on_black(pixels: np.ndarray) -> np.ndarray:
    """A picture uint8 [H, W, 3 or 4] without its alpha channel: what is hidden becomes black, not visible."""
    if pixels.shape[2] < _CHANNELS:
        return pixels
    colours, alpha = pixels[..., :3].astype(np.uint16), pixels[..., 3:]
    return ((colours * alpha + 127) // 255).astype(np.uint8)
