"""A part of a clip to be refined alone: its box, and a mask with a soft border that puts the result back.

Frames are [T, H, W, C] in [0, 1] and masks [1 or T, H, W], 1 where something is to be refined. The mask is never
narrower than what was painted: its border grows outwards. Beyond the border it is exactly 0, so that blending with it
keeps those pixels to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import PIXEL_MULTIPLE
from ..masks import clean_mask

MAX_BORDER = 512  # pixels


@dataclass(frozen=True)
class Region:
    """Where the region is in the frames, in pixels, and how much of each of its pixels is replaced.

    mask: [1 or T, height, width] in [0, 1]; 1 within what was marked, falling to 0 over the border.
    """

    top: int
    left: int
    height: int
    width: int
    mask: Tensor

    def crop(self, frames: Tensor) -> Tensor:
        """The region's part of frames [T, H, W, C], as a view."""
        return frames[:, self.top : self.top + self.height, self.left : self.left + self.width]


def find_region(frames: Tensor, mask: Tensor | None, border: int, context: int) -> Region:
    """The smallest box around a mask, its soft border and `context` pixels more on each side.

    Args:
        frames: [T, H, W, C]; only the shape counts.
        mask: [1 or T, H, W] or [H, W]; another size is stretched to the frames'. None marks the middle half.
        border: pixels over which the result fades into the rest, outside of what is marked; 0 to MAX_BORDER.
        context: pixels around the border that are refined with the region and thrown away.

    The box holds the marked pixels of all frames. Its sides are multiples of 16 where the picture has the room, so
    that the refiner needs no padding. Raises ValueError for a mask that marks nothing, holds numbers that are not
    finite, or has another number of frames.
    """
    if frames.ndim != 4 or 0 in frames.shape:
        raise ValueError(f"images must be [frames, height, width, 3]; got {list(frames.shape)}.")
    count, height, width = frames.shape[:3]
    marked = _middle(height, width) if mask is None else clean_mask(mask, count)
    softened = torch.cat([_soften(_fitted(one[None], height, width), border) for one in marked])
    anywhere = softened.amax(0) > 0
    if not anywhere.any():
        raise ValueError(
            "mask is empty: it marks nothing to refine. Paint the region in the MaskEditor of Load Image, or connect "
            "a mask that is white there."
        )
    top, rows = _span(anywhere.any(1), context, height)
    left, columns = _span(anywhere.any(0), context, width)
    return Region(top, left, rows, columns, softened[:, top : top + rows, left : left + columns].contiguous())


def _middle(height: int, width: int) -> Tensor:
    mask = torch.zeros(1, height, width)
    mask[:, height // 4 : height - height // 4, width // 4 : width - width // 4] = 1
    return mask


def _fitted(mask: Tensor, height: int, width: int) -> Tensor:
    """A mask [1, h, w] stretched to [1, height, width]."""
    if mask.shape[1:] == (height, width):
        return mask
    return F.interpolate(mask[None], (height, width), mode="bilinear", align_corners=False)[0]


def _soften(mask: Tensor, border: int) -> Tensor:
    """A mask [1, H, W] that keeps its value where it is marked, and falls to exactly 0 `border` pixels outside.

    It grows by half of the border and is averaged over the other half, twice for a smooth fall.
    """
    if not border:
        return mask
    grown, faded = (border + 1) // 2, border // 2
    for reach in ((grown, 0), (0, grown)):
        mask = F.max_pool2d(mask, (2 * reach[0] + 1, 2 * reach[1] + 1), stride=1, padding=reach)
    for half in ((faded + 1) // 2, faded // 2):
        mask = F.avg_pool2d(F.pad(mask, (half, half, 0, 0), mode="replicate"), (1, 2 * half + 1), stride=1)
        mask = F.avg_pool2d(F.pad(mask, (0, 0, half, half), mode="replicate"), (2 * half + 1, 1), stride=1)
    return mask.clamp(max=1)  # stretched ones may be rounded up


def _span(marked: Tensor, context: int, size: int) -> tuple[int, int]:
    """First pixel and length along one side: the marked pixels [size] with context, a multiple of 16 if that fits."""
    places = marked.nonzero().flatten()
    first, last = max(0, int(places[0]) - context), min(size, int(places[-1]) + 1 + context)
    length = -(-(last - first) // PIXEL_MULTIPLE) * PIXEL_MULTIPLE
    if length >= size:
        return 0, size
    first = max(0, first - (length - (last - first)) // 2)
    return min(first, size - length), length
