"""Two videos in one picture, to judge what the refiner did. Frames are [T, H, W, 3] in [0, 1]."""

from __future__ import annotations

from torch import Tensor

from ..frames import clean, extend_edges, resize
from ..progress import Progress

LAYOUTS = ("side by side", "split", "stacked")
_LINE_SHARE = 960  # the split's line is one pixel for each 960 of width: 2 at 1080p


def compare(before: Tensor, after: Tensor, layout: str = "side by side", *, progress: Progress | None = None) -> Tensor:
    """Show `before` [T1, h, w, 3] and `after` [T2, H, W, 3] together; returns [max(T1, T2), H', W', 3].

    `before` is resized bilinearly to `after`'s size, and the shorter clip holds its last frame. Layouts: "side by side"
    (before on the left) and "stacked" (before on top) show both whole, "split" shows one picture, its left half from
    `before` and its right half from `after`, parted by a thin white line. Sides are even, as h264 wants them: an odd
    one gets a repeated row or column. Raises ValueError for an unknown layout and as `frames.clean` does.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}.")
    before, _ = clean(before, "before")
    after, _ = clean(after, "after")
    count, (height, width) = max(len(before), len(after)), after.shape[1:3]
    rows = height * 2 if layout == "stacked" else height
    columns = width * 2 if layout == "side by side" else width
    canvas = after.new_empty(count, rows + rows % 2, columns + columns % 2, 3)

    first = canvas[:, :height, :width]
    resize(before, height, width, out=first[: len(before)], progress=progress)
    extend_edges(first, len(before), height, width)

    left = width // 2 if layout == "split" else 0
    second = canvas[:, rows - height : rows, columns - width + left : columns]
    second[: len(after)] = after[:, :, left:]
    extend_edges(second, len(after), height, width - left)

    if layout == "split":
        line = max(1, width // _LINE_SHARE)
        canvas[:, :, left - line // 2 : left - line // 2 + line] = 1.0
    extend_edges(canvas, count, rows, columns)
    return canvas
