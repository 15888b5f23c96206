"""How stored pictures are turned to be upright."""

from __future__ import annotations

from typing import NamedTuple

import av
import numpy as np

_UNSAFE = ("png", "apng")


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
