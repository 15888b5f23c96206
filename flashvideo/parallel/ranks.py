"""The processes that work on one video together, and how they exchange tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..errors import CommandError
from .counting import GUIDANCE, STATE, Traffic

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Value = TypeVar("Value")


class RankEndedError(CommandError):
    """A process of this run has ended, or can't be reached any more."""

    def __init__(self, hint: str = "The same command resumes it.") -> None:
        super().__init__("The run has ended because one of its processes did.", hint)


class RefusedError(CommandError):
    """Rank 0 has refused the work, and reports why."""

    def __init__(self) -> None:
        super().__init__("Refused by rank 0.")


class Ranks:
    """A group of processes: this one is number `rank` of `size`.

    All of them must call the same methods in the same order. Methods raise RankEndedError if another process has ended.
    `busy`: the work on a video has begun, and an error of one ends all.
    """

    def __init__(self, rank: int, members: Sequence[int], group: ProcessGroup | None, traffic: Traffic) -> None:
        """`members` are the processes' global numbers, `group` None is all of them."""
        self.rank, self.size, self.traffic = rank, len(members), traffic
        self.halves: Halves | None = None
        self.busy = False
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
        with _noticed():
            work = collect(_bytes(out), _bytes(x), group=self._group, async_op=True)
        self.traffic.count(kind, x.nbytes * (self.size - 1))

        def finish() -> Tensor:
            nonlocal x
            if x is not None:  # kept until it has been sent
                with _noticed():
                    work.wait()
                x = None
            return out

        return finish

    def sum(self, x: Tensor, kind: str) -> None:
        """Replace a contiguous tensor, of one shape and type on all ranks, by the sum of all of them."""
        import torch.distributed as dist

        with _noticed():
            dist.all_reduce(x, group=self._group)
        # What a rank of a ring receives: the parts of its own sum, then the sums of the others.
        self.traffic.count(kind, 2 * (self.size - 1) * x.nbytes // self.size)

    def share(self, value: Any) -> Any:
        """Rank 0's value on every rank; anything that can be pickled, of small size."""
        import torch.distributed as dist

        box = [value if self.leads else None]
        with _noticed():
            dist.broadcast_object_list(box, src=self._members[0], group=self._group, device=torch.device("cpu"))
        return box[0]

    def share_tensors(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Rank 0's tensors on every rank, in main memory; None on the others."""
        import torch.distributed as dist

        outline = self.share(tensors and {name: (tuple(each.shape), each.dtype) for name, each in tensors.items()})
        shared = {}
        for name, (shape, dtype) in outline.items():
            here = torch.empty(shape, dtype=dtype) if tensors is None else tensors[name].detach().cpu().contiguous()
            with _noticed():
                dist.broadcast(_bytes(here), src=self._members[0], group=self._group)
            if tensors is None:
                self.traffic.count(STATE, here.nbytes)
            shared[name] = here
        return shared

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank; anything that can be pickled, of small size."""
        import torch.distributed as dist

        values = [None] * self.size
        with _noticed():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def send(self, x: Tensor, to: int) -> Callable[[], object]:
        """Start to send a tensor in main memory to another rank; call the result before the memory is used again."""
        import torch.distributed as dist

        x = x.contiguous()
        with _noticed():
            work = dist.isend(_bytes(x), self._members[to], group=self._group)

        def finish() -> None:
            with _noticed():
                work.wait()
            x.numel()  # kept until it has been sent

        return finish

    def receive(self, out: Tensor, source: int, kind: str) -> Callable[[], object]:
        """Start to receive what another rank sends into `out`, contiguous and in main memory."""
        import torch.distributed as dist

        with _noticed():
            work = dist.irecv(_bytes(out), self._members[source], group=self._group)
        self.traffic.count(kind, out.nbytes)

        def finish() -> None:
            with _noticed():
                work.wait()

        return finish


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


@contextmanager
def _noticed() -> Iterator[None]:
    """Turn a backend's error into ours: they have many, and all mean that a process can't be reached."""
    try:
        yield
    except RuntimeError as error:
        raise RankEndedError from error


def agree(ranks: Ranks | None, decide: Callable[[], Value]) -> Value:
    """What rank 0 decides, on every rank; the others don't decide. Without ranks it is decided here.

    If rank 0 raises an error, the others raise RefusedError.
    """
    if ranks is None:
        return decide()
    if not ranks.leads:
        decided, value = ranks.share(None)
        if not decided:
            raise RefusedError
        return value
    try:
        value = decide()
    except Exception:
        ranks.share((False, None))
        raise
    return ranks.share((True, value))[1]
