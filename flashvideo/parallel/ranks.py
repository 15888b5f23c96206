"""The processes that work on one video together, and how they exchange tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .counting import GUIDANCE, Traffic

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Ranks:
    """A group of processes: this one is number `rank` of `size`.

    All of them must call the same methods in the same order. A method raises RuntimeError if another process has ended.
    """

    def __init__(self, rank: int, members: Sequence[int], group: ProcessGroup | None, traffic: Traffic) -> None:
        """`members` are the processes' global numbers, `group` None is all of them."""
        self.rank, self.size, self.traffic = rank, len(members), traffic
        self.halves: Halves | None = None
        self._members, self._group = members, group

    @classmethod
    def world(cls) -> Ranks:
        """All processes of the initialised group; an even number of them with `halves`."""
        import torch.distributed as dist

        rank, size = dist.get_rank(), dist.get_world_size()
        ranks = cls(rank, range(size), None, Traffic())
        if size % 2 == 0:
            ranks.halves = _halves(rank, size, ranks.traffic)
        return ranks

    @property
    def leads(self) -> bool:
        """Whether this is the rank that reports and writes."""
        return self.rank == 0

    def gather(self, x: Tensor, kind: str) -> Callable[[], Tensor]:
        """Start to collect a tensor of the same shape and type from every rank; call the result to get [size, ...].

        Raises RuntimeError under autograd, which these messages don't pass on.
        """
        import torch.distributed as dist

        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("several ranks evaluate a network together without autograd only")
        x = x.contiguous()
        out = x.new_empty((self.size, *x.shape))
        # Bytes: gloo doesn't know every type of numbers. Newer versions of PyTorch have a new name for it.
        collect = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = collect(_bytes(out), _bytes(x), group=self._group, async_op=True)
        self.traffic.count(kind, x.nbytes * (self.size - 1))

        def finish() -> Tensor:
            nonlocal x
            if x is not None:  # kept until it has been sent
                work.wait()
                x = None
            return out

        return finish

    def share(self, value: Any) -> Any:
        """Rank 0's value on every rank; anything that can be pickled, of small size."""
        import torch.distributed as dist

        box = [value if self.leads else None]
        dist.broadcast_object_list(box, src=self._members[0], group=self._group, device=torch.device("cpu"))
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank; anything that can be pickled, of small size."""
        import torch.distributed as dist

        values = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def send(self, x: Tensor, to: int) -> Callable[[], object]:
        """Start to send a tensor in main memory to another rank; call the result before the memory is used again."""
        import torch.distributed as dist

        x = x.contiguous()
        work = dist.isend(_bytes(x), self._members[to], group=self._group)
        return lambda: (work.wait(), x)

    def receive(self, out: Tensor, source: int, kind: str) -> Callable[[], object]:
        """Start to receive what another rank sends into `out`, contiguous and in main memory."""
        import torch.distributed as dist

        work = dist.irecv(_bytes(out), self._members[source], group=self._group)
        self.traffic.count(kind, out.nbytes)
        return work.wait


@dataclass(frozen=True)
class Halves:
    """The two halves of the ranks: number 0 evaluates without the prompt, number 1 with it."""

    index: int  # of this rank's half
    ranks: Ranks  # this half
    pair: Ranks  # this rank and the one in the same place of the other half

    def exchange(self, mine: Tensor) -> tuple[Tensor, Tensor]:
        """What the half without the prompt has, and the other half's; every rank has all of its half's."""
        without, prompted = self.pair.gather(mine, GUIDANCE)()
        return without, prompted


def _halves(rank: int, size: int, traffic: Traffic) -> Halves:
    import torch.distributed as dist

    half = size // 2
    index, place = divmod(rank, half)
    # Every rank takes part in making every group.
    sides = [[*range(half)], [*range(half, size)]]
    side_groups = [dist.new_group(side) for side in sides]
    pairs = [[each, half + each] for each in range(half)]
    pair_groups = [dist.new_group(pair) for pair in pairs]
    return Halves(
        index,
        Ranks(place, sides[index], side_groups[index], traffic),
        Ranks(index, pairs[place], pair_groups[place], traffic),
    )


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)
