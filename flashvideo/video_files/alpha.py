"""The alpha channel: how opaque each pixel of a frame is, read and written by its stored numbers.

Within a run colours are premultiplied, which is the picture as it stands on black. swscale isn't asked for alpha: on
the way to or from YUV it is up to one of 255 off, and what is opaque comes out slightly transparent.
"""

from __future__ import annotations

import av
import numpy as np
import torch
from torch import Tensor

from .orientation import UPRIGHT, Orientation

_CHANNELS = 4  # of a transparent picture
_EIGHT_BITS = 8
PALETTE = "pal8"  # its colours may be transparent
_FLOAT = "f32"  # in the names of such pixel formats


def has_alpha(frame: av.VideoFrame) -> bool:
    """Whether frames of this kind can be transparent."""
    return frame.format.name == PALETTE or any(component.is_alpha for component in frame.format.components)


def alpha_of(frame: av.VideoFrame, orientation: Orientation = UPRIGHT) -> np.ndarray:
    """How opaque each pixel is, float32 [H, W] in [0, 1], upright. For frames that have alpha."""
    component = next((each for each in frame.format.components if each.is_alpha), None)
    if component is None or not frame.format.is_planar:
        deep = component is not None and component.bits > _EIGHT_BITS
        packed = frame.reformat(format="rgba64le" if deep else "rgba").to_ndarray()  # exact: there is no YUV
        alpha = packed[..., 3].astype(np.float32) / np.iinfo(packed.dtype).max
    else:
        name, plane = frame.format.name, frame.planes[component.plane]
        order, size = ">" if name.endswith("be") else "<", (component.bits + 7) // 8
        kind = np.dtype(f"{order}f{size}" if _FLOAT in name or "f16" in name else f"{order}u{size}")
        stored = np.frombuffer(bytes(plane), kind).reshape(plane.height, -1)[:, : frame.width]
        whole = 1 if kind.kind == "f" else 2**component.bits - 1
        alpha = np.nan_to_num(stored.astype(np.float32) / whole, nan=0.0, posinf=1.0, neginf=0.0)
    return orientation.apply(alpha.clip(0, 1)[..., None])[..., 0]


def is_transparent(frame: av.VideoFrame) -> bool:
    """Whether something of a frame is transparent."""
    return has_alpha(frame) and bool(alpha_of(frame).min() < 1)


def split_alpha(picture: Tensor, steps: int) -> tuple[Tensor, np.ndarray]:
    """A premultiplied picture [H, W, 4] in [0, 1] as its own colours [H, W, 3], and alpha as whole numbers [H, W].

    `steps`: the number that means opaque. Where nothing shows the colour is black.
    """
    alpha = (picture[..., 3].clamp(0, 1) * steps).round()
    shown = picture[..., :3] * steps / alpha.clamp(min=1)[..., None]  # of what is stored, so that both together fit
    colours = torch.where(alpha[..., None] > 0, shown, 0.0).clamp(0, 1)
    return colours, alpha.numpy().astype(np.uint16)


def add_alpha(frame: av.VideoFrame, alpha: np.ndarray, kind: str) -> av.VideoFrame:
    """The planes of a frame and a fourth one, uint16 [H, W]: a frame of the pixel format `kind`, of up to 16 bits."""
    made = av.VideoFrame(frame.width, frame.height, kind)
    for new, plane in zip(made.planes, frame.planes, strict=False):
        rows = np.frombuffer(bytes(plane), np.uint8).reshape(plane.height, -1)
        new.update(_rows(rows[:, : new.line_size], new))
    fourth = made.planes[_CHANNELS - 1]
    fourth.update(_rows(np.ascontiguousarray(alpha.astype("<u2")).view(np.uint8), fourth))
    made.colorspace, made.color_range = frame.colorspace, frame.color_range
    return made


def _rows(content: np.ndarray, plane: av.video.plane.VideoPlane) -> bytes:
    """Bytes [rows, n] as a plane stores them, with its space at the ends of rows."""
    stored = np.zeros((plane.height, plane.line_size), np.uint8)
    stored[:, : content.shape[1]] = content
    return stored.tobytes()
