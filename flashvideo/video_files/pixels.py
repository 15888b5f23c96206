"""Decoded frames as they are meant to be seen: upright, by their own colour matrix, on black where transparent."""

from __future__ import annotations

import av
import numpy as np

from .alpha import PALETTE, alpha_of, has_alpha
from .orientation import UPRIGHT, Orientation

BT709, BT601 = 1, 5  # FFmpeg's numbers of the colour matrices
_MATRICES = {1: BT709, 5: BT601, 6: BT601, 7: 7, 9: 9}  # by a stream's tag; what swscale knows
LIMITED, FULL = 1, 2  # FFmpeg's numbers of the ranges that brightness is stored in
_HD_ROWS = 720  # from here on, untagged video is taken as BT.709
# swscale's numbers: bilinear, colour for every pixel, rounding. Without the last two each channel loses 1.3 of 255.
EXACT = 0x2 | 0x2000 | 0x40000
_EIGHT_BITS, _WHITE = 8, 255
# White in 16 bits: all of them in RGB; swscale moves 255 of 8 bits up by 8 when it comes from or goes to YUV.
DEEP_RGB, DEEP_YUV = 65535, 65280


def colour_matrix(frame: av.VideoFrame) -> int:
    """FFmpeg's number of the matrix that a frame's colours were made with, a guess where the file doesn't say."""
    return _MATRICES.get(int(frame.colorspace), BT709 if frame.height >= _HD_ROWS else BT601)


def upright_pixels(
    frame: av.VideoFrame,
    matrix: int,
    orientation: Orientation = UPRIGHT,
    *,
    deep: bool = False,
    premultiplied: bool = False,
) -> np.ndarray:
    """A frame as it is meant to be seen, [H, W, 3]: by its colour matrix, upright, on black.

    uint8, or float32 in [0, 1] if `deep`: for more than 8 bits a colour, and for transparent pictures whose colours are
    to be found again. `premultiplied`: the stored colours are on black already.
    """
    alpha = alpha_of(frame) if has_alpha(frame) and not premultiplied else None
    if frame.format.name == PALETTE:  # which PyAV doesn't take for RGB
        frame = frame.reformat(format="rgba")
    is_rgb, is_fine = frame.format.is_rgb, max(component.bits for component in frame.format.components) > _EIGHT_BITS
    # PyAV takes BT.601 and limited range for granted unless the two are named and differ.
    pixels = frame.reformat(
        format="rgb48le" if deep and is_fine else "rgb24",
        src_colorspace=matrix,
        dst_colorspace=BT601,
        src_color_range=FULL if int(frame.color_range) == FULL else LIMITED,
        dst_color_range=LIMITED,
        interpolation=EXACT,
    ).to_ndarray()
    if deep:
        white = _WHITE if not is_fine else DEEP_RGB if is_rgb else DEEP_YUV
        pixels = np.minimum(pixels.astype(np.float32) / white, 1)
    return orientation.apply(pixels if alpha is None else on_black(pixels, alpha))


def on_black(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours [H, W, 3], uint8 or in [0, 1], by their alpha [H, W]: what is hidden becomes black, not visible."""
    shown = colours * alpha[..., None]
    return shown if colours.dtype != np.uint8 else (shown + 0.5).astype(np.uint8)
