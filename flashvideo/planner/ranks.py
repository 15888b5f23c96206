"""What one evaluation costs each of several processes: operations, and bytes that come from the others.

See `flashvideo.parallel` for how it is spread. The counters of a run (`parallel.Traffic`) give the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from ..config import TEXT_TOKENS, DiTConfig
from ..dit import dit_tokens
from ..parallel import sequence_edges
from .flops import Flops, dit_flops

FLOAT32_BYTES = 4  # guidance combines float32 predictions


@dataclass(frozen=True)
class RankWork:
    """The share of the busiest rank, the first: it has the longest piece."""

    flops: Flops
    keys_values: float = 0.0  # bytes received
    patches: float = 0.0
    guidance: float = 0.0

    @property
    def received(self) -> float:
        """Bytes of all kinds."""
        return self.keys_values + self.patches + self.guidance


def evaluation_on_ranks(
    config: DiTConfig, shape: tuple[int, int, int], ranks: int, itemsize: int, text_tokens: int = TEXT_TOKENS
) -> RankWork:
    """One evaluation of one latent of `shape` (T, H, W) on `ranks` processes, in numbers of `itemsize` bytes."""
    whole = dit_flops(config, shape, text_tokens)
    video = dit_tokens(config, shape)
    edges = sequence_edges(text_tokens, video, ranks)
    if edges is None or ranks == 1:
        return RankWork(whole)
    total, longest = edges[-1], max(after - before for before, after in pairwise(edges))
    width, patch = config.hidden_size, config.patch_size**2
    others = total - longest
    # Every rank embeds all patches; then it has its own tokens alone.
    layers = config.num_layers * (4 * width**2 + 2 * width * config.ff_dim)
    spared = 2 * others * (layers + width * patch * config.out_channels)
    flops = Flops(whole.matmul - spared, whole.attention * longest / total)
    videos = [after - before for before, after in pairwise((text_tokens, *edges[1:]))]
    return RankWork(
        flops,
        keys_values=2.0 * config.num_layers * longest * width * itemsize * (ranks - 1),
        patches=float(max(videos) * patch * config.out_channels * itemsize * (ranks - 1)),
    )


def guided_on_ranks(
    config: DiTConfig, shape: tuple[int, int, int], ranks: int, itemsize: int, text_tokens: int = TEXT_TOKENS
) -> RankWork:
    """One guided evaluation: with and without the prompt at once in two halves of an even number, else in turn."""
    if ranks % 2:
        one = evaluation_on_ranks(config, shape, ranks, itemsize, text_tokens)
        return RankWork(one.flops * 2, 2 * one.keys_values, 2 * one.patches)
    half = evaluation_on_ranks(config, shape, ranks // 2, itemsize, text_tokens)
    return replace(half, guidance=float(config.out_channels * math.prod(shape) * FLOAT32_BYTES))
