"""The VAE's tiles on several processes: each has tiles of its own, and all measure the picture together.

Statistics: every rank sends the moments of its tiles, a few numbers for each norm, and all join them in the same order.
Halos: where a picture is stored between two groups of units, a rank's tiles get from their neighbours what the next
group reads around them; that is one latent pixel or a few, and computing it again would repeat every layer before it.
Within a group halos are computed again, as in one process: there is no stored picture to take them from. The result
goes to all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..parallel import Ranks
from ..parallel.counting import PICTURES, STATISTICS
from .memory import SMALLEST_TILE_LATENT, TilePlan, reaches
from .tiles import MAIN_MEMORY, GroupJob, Moments, Tile, TiledRun


class RankedTiledRun(TiledRun):
    """A `TiledRun` of which each of the `ranks` does a part; all call it with the same arguments.

    If there are fewer tiles than ranks, some ranks repeat another's tile, which spares them waiting for nothing.
    """

    def __init__(
        self, plan: TilePlan, device: torch.device | str, dtype: torch.dtype, ranks: Ranks, **options: Any
    ) -> None:
        super().__init__(plan, device, dtype, **options)
        self.ranks = ranks

    def own_tiles(self) -> list[Tile]:
        """This rank's tiles, neighbours in the tiles' order."""
        return self._tiles_of(self.ranks.rank)

    def _tiles_of(self, rank: int) -> list[Tile]:
        count, size = len(self.tiles), self.ranks.size
        if count < size:
            return [self.tiles[rank % count]]
        return self.tiles[rank * count // size : (rank + 1) * count // size]

    def _of_all_tiles(self, sums: list[Moments]) -> list[Moments]:
        device = sums[0].mean.device
        repeats = self.ranks.rank >= len(self.tiles)
        counts = [torch.tensor([[0 if repeats else each.count]], dtype=torch.float64, device=device) for each in sums]
        rows = [
            torch.cat((count, each.mean.double(), each.variance.double()), dim=1)
            for count, each in zip(counts, sums, strict=True)
        ]
        rows = self.ranks.gather(torch.cat(rows), STATISTICS)().transpose(0, 1)  # [chunks, ranks, 1 + 2 * groups]
        return [_joined(each) for each in rows]

    def _after_writing(self, job: GroupJob) -> None:
        groups = self.plan.groups
        if job.index + 1 == len(groups):
            needs = [[self.whole]] * self.ranks.size
        else:
            # The next group reads the result, and the one after it may add it up.
            readers = groups[job.index + 1 : job.index + 3]
            reach = max(reaches(group)[0] for group in readers if group is readers[0] or group[0].joins)
            needs = [
                [tile.grown(reach, self.whole) for tile in self._tiles_of(rank)] for rank in range(self.ranks.size)
            ]
        for target in job.targets:
            self._exchange(target, needs)

    def _exchange(self, x: Tensor, needs: list[list[Tile]]) -> None:
        """Send what other ranks need of this one's tiles in x [1, C, t, H, W], and receive what this one needs."""
        owners = {tile: rank for rank in reversed(range(self.ranks.size)) for tile in self._tiles_of(rank)}
        sending, receiving, me = [], [], self.ranks.rank
        for tile, owner in owners.items():
            for rank, wanted in enumerate(needs):
                area = _shared(tile, wanted)
                if rank == owner or me not in (rank, owner) or area is None:
                    continue
                part = area.cut(x, self.whole)
                if me == owner:
                    sending.append(self.ranks.send(part.to(MAIN_MEMORY), rank))
                else:
                    buffer = torch.empty(part.shape, dtype=x.dtype, device=MAIN_MEMORY)
                    receiving.append((part, buffer, self.ranks.receive(buffer, owner, PICTURES)))
        for part, buffer, finish in receiving:
            finish()
            part.copy_(buffer)
        for finish in sending:
            finish()


def side_for_ranks(grid: tuple[int, int], longest: int, ranks: int) -> int:
    """A tile's side, at most `longest` latent pixels, with which the busiest rank has least to do."""
    whole = Tile(0, grid[0], 0, grid[1])

    def busiest(side: int) -> tuple[int, int]:
        tiles = [tile.grown(1, whole) for tile in whole.split(side)]
        largest = max((tile.bottom - tile.top) * (tile.right - tile.left) for tile in tiles)
        return -(-len(tiles) // ranks) * largest, -side

    return min(range(min(SMALLEST_TILE_LATENT, longest), longest + 1), key=busiest)


def _joined(rows: Tensor) -> Moments:
    """The moments of all ranks [ranks, 1 + 2 * groups] together."""
    groups = rows.shape[1] // 2
    numbers = [(int(row[0]), row[None, 1:].float()) for row in rows if row[0]]  # a count has more digits than float32
    found = [Moments(count, both[:, :groups], both[:, groups:]) for count, both in numbers]
    total = found[0]
    for each in found[1:]:
        total = total.joined(each)
    return total


def _shared(tile: Tile, wanted: list[Tile]) -> Tile | None:
    """The smallest rectangle of a tile that holds all that is wanted of it; None for nothing."""
    parts = [
        Tile(max(tile.top, one.top), min(tile.bottom, one.bottom), max(tile.left, one.left), min(tile.right, one.right))
        for one in wanted
    ]
    parts = [part for part in parts if part.top < part.bottom and part.left < part.right]
    if not parts:
        return None
    tops, bottoms, lefts, rights = zip(*parts, strict=True)
    return Tile(min(tops), max(bottoms), min(lefts), max(rights))
