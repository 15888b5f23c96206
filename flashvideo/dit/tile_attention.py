"""Windowed attention, an approximation: a position in the video attends only to its neighbourhood.

Boxes of latent frames, rows and columns tile the video. Text attends to everything and everything to the text, exactly.
The queries of a tile attend to their tile and its next neighbours, NEIGHBOURS along each axis: at the border these are
the nearest tiles, so that every position sees equally much. It works without training and without a custom kernel: a
tile's attention is a dense call on fewer keys. After sliding tile attention (arXiv 2502.04507).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, product

import torch
from torch import Tensor

from .network import Attention, attention_sdpa

NEIGHBOURS = 3  # tiles along an axis that a tile sees: itself and one on either side
Grid = tuple[int, int, int]  # latent frames, rows and columns

# How many tiles there are along each axis. Time stays whole: at equal shares of the video, windows in time cost more
# quality than windows in the picture (docs/performance.md).
VIEWS: dict[str, Grid] = {"wide": (1, 4, 4), "medium": (1, 5, 5), "narrow": (1, 7, 7)}


def share(tiles: Grid) -> float:
    """The share of the video that each position sees."""
    return math.prod(min(1.0, NEIGHBOURS / parts) for parts in tiles)


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of the sequence that attend to the same tokens: the `keys`, as runs."""

    queries: slice
    keys: tuple[slice, ...]


class WindowAttention:
    """Attention for `FlashVideoDiT.forward`, which also needs the `order`: a tile's tokens are consecutive.

    An object is for one size of video. It is exact where no axis has more than NEIGHBOURS tiles.
    """

    def __init__(self, text: int, grid: Grid, tiles: Grid, dense: Attention = attention_sdpa) -> None:
        """`text` tokens and a `grid` of patches, cut into `tiles` along each axis; `dense` attends within a window."""
        cuts = [_cuts(size, parts) for size, parts in zip(grid, tiles, strict=True)]
        places = torch.arange(grid[0] * grid[1] * grid[2]).view(grid)
        boxes = [places[box].flatten() for box in product(*cuts)]
        self.order = torch.cat(boxes)  # [N], on the CPU
        self.spans = _spans(text, [len(box) for box in boxes], tuple(len(cut) for cut in cuts))
        self._dense = dense

    @property
    def computed_share(self) -> float:
        """The share of exact attention's pairs, and so of its operations, that is computed."""
        pairs = sum(_length(span.queries) * sum(map(_length, span.keys)) for span in self.spans)
        return pairs / self.spans[-1].queries.stop ** 2

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, start: int = 0) -> Tensor:
        """[B, heads, n, head_dim] and twice [B, heads, N, head_dim] -> [B, n, heads * head_dim].

        Holds one window's keys and values at a time besides its inputs.
        """
        stop, attended = start + q.shape[2], []
        for span in self.spans:
            first, last = max(start, span.queries.start), min(stop, span.queries.stop)
            if first < last:
                piece = q[:, :, first - start : last - start]
                attended.append(self._dense(piece, _gather(k, span.keys), _gather(v, span.keys), heads, first))
        return torch.cat(attended, dim=1)


def _cuts(size: int, parts: int) -> list[slice]:
    """Cut an axis into parts whose lengths differ by one at most; no more parts than positions."""
    parts = min(parts, size)
    return [slice(index * size // parts, (index + 1) * size // parts) for index in range(parts)]


def _near(index: int, count: int) -> range:
    """The tiles along an axis that tile number `index` of `count` sees."""
    first = min(max(index - NEIGHBOURS // 2, 0), max(count - NEIGHBOURS, 0))
    return range(first, min(first + NEIGHBOURS, count))


def _spans(text: int, volumes: Sequence[int], counts: Grid) -> list[Span]:
    """The text's span, which sees everything, and each tile's. `volumes` are the tiles' tokens, in the tiles' order."""
    edges = list(accumulate(volumes, initial=text))
    spans = [Span(slice(0, text), (slice(0, edges[-1]),))]
    for tile, (frame, row, column) in enumerate(product(*map(range, counts))):
        columns, runs = _near(column, counts[2]), [slice(0, text)]
        for near_frame, near_row in product(_near(frame, counts[0]), _near(row, counts[1])):
            line = (near_frame * counts[1] + near_row) * counts[2]  # the first tile of this row of tiles
            runs.append(slice(edges[line + columns[0]], edges[line + columns[-1] + 1]))
        spans.append(Span(slice(edges[tile], edges[tile + 1]), _joined(runs)))
    return spans


def _joined(runs: Sequence[slice]) -> tuple[slice, ...]:
    """Join adjacent runs."""
    joined = [runs[0]]
    for run in runs[1:]:
        if run.start == joined[-1].stop:
            joined[-1] = slice(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return tuple(joined)


def _length(run: slice) -> int:
    return run.stop - run.start


def _gather(x: Tensor, runs: tuple[slice, ...]) -> Tensor:
    """Runs of the tokens of [B, heads, N, head_dim]: a view if it is one run."""
    if len(runs) == 1:
        return x[:, :, runs[0]]
    tokens = x.transpose(1, 2)  # the order in memory: a run is one copy
    return torch.cat([tokens[:, run] for run in runs], dim=1).transpose(1, 2)
