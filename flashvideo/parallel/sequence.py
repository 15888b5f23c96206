"""Sequence parallelism by gathered keys and values: each rank owns one piece of the tokens from the first layer to the
last projection, and every layer's queries attend to the keys and values of all ranks.

Exact with any number of ranks, any number of heads and any attention: the queries only start elsewhere. Ring attention
(arXiv 2310.01889) would hold less, and exchanging heads (arXiv 2309.14509) would move less, but the one needs a kernel
of its own and the other a number of heads that the ranks divide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .counting import KEYS_VALUES, PATCHES
from .ranks import Ranks


@dataclass(frozen=True)
class SequencePiece:
    """This rank's piece of a sequence, whose first tokens are text; piece i is from edges[i] to edges[i + 1]."""

    ranks: Ranks
    edges: tuple[int, ...]
    text: int

    @property
    def start(self) -> int:
        """The piece's first token."""
        return self.edges[self.ranks.rank]

    def cut(self, tokens: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The piece's tokens, a copy, of [B, N, hidden], and the positions of those that are video."""
        start, stop = self.edges[self.ranks.rank : self.ranks.rank + 2]
        video = slice(max(start - self.text, 0), stop - self.text)
        return tokens[:, start:stop].clone(), (rope[0][video], rope[1][video])

    def gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Start to collect keys or values [B, n, heads, width] of all pieces; call the result for [B, N, ...]."""
        return _gather(self.ranks, x, self._sizes, KEYS_VALUES)

    def gather_video(self, x: Tensor) -> Tensor:
        """All video tokens [B, N, width] from each piece's."""
        sizes = list(self._sizes)
        sizes[0] -= self.text
        return _gather(self.ranks, x, sizes, PATCHES)()

    @property
    def _sizes(self) -> list[int]:
        return [after - before for before, after in pairwise(self.edges)]


def sequence_edges(text: int, video: int, ranks: int) -> tuple[int, ...] | None:
    """Where the ranks' pieces of a sequence begin and where the last ends; None for fewer tokens than there are ranks.

    The pieces are equally long, but for the last, which is what remains. The text is in the first, with one token of
    the video at least: where it is longer than a piece, the others share the rest.
    """
    total = text + video
    longest = -(-total // ranks)
    first = max(longest, text + 1)
    if first > longest and ranks > 1:
        longest = -(-(total - first) // (ranks - 1))
    edges = (0, *(min(first + index * longest, total) for index in range(ranks)))
    return edges if all(before < after for before, after in pairwise(edges)) else None


def sequence_piece(ranks: Ranks, text: int, video: int) -> SequencePiece | None:
    """This rank's piece of `text` and `video` tokens; None where each rank has to work on the whole sequence."""
    edges = sequence_edges(text, video, ranks.size) if ranks.size > 1 else None
    return None if edges is None else SequencePiece(ranks, edges, text)


def _gather(ranks: Ranks, x: Tensor, sizes: Sequence[int], kind: str) -> Callable[[], Tensor]:
    """Start to collect pieces [B, n, ...] of different lengths n; call the result for [B, N, ...].

    Shorter pieces are filled up to the longest: collectives move tensors of one size.
    """
    longest = max(sizes)
    if x.shape[1] < longest:
        padded = x.new_empty((x.shape[0], longest, *x.shape[2:]))
        padded[:, : x.shape[1]] = x
        x = padded
    # One sequence at a time, so that its pieces lie one after the other.
    pending = [ranks.gather(one, kind) for one in x]
    whole: list[Tensor] = []

    def finish() -> Tensor:
        if not whole:
            joined = [_joined(get(), sizes) for get in pending]
            whole.append(joined[0][None] if len(joined) == 1 else torch.stack(joined))
            pending.clear()
        return whole[0]

    return finish


def _joined(pieces: Tensor, sizes: Sequence[int]) -> Tensor:
    """[ranks, longest, ...] -> [N, ...], a view if only the last piece is shorter."""
    if all(size == pieces.shape[1] for size in sizes[:-1]):
        return pieces.flatten(0, 1)[: sum(sizes)]
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])
