"""A run's stored work for several processes: rank 0's folder, which the others read through rank 0.

They need no folder, no disk of their own, and no look at rank 0's. All ranks call the same methods in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..parallel import Ranks, RefusedError
from ..parallel.counting import STATE
from .work_folder import Tensors, WorkFolder, WorkProgress


@contextmanager
def leading(ranks: Ranks | None) -> Iterator[Callable[[], None]]:
    """Around rank 0's work on a clip, all of it; call what it gives when nothing can be refused any more.

    Until then an error is rank 0's alone, and the clip is left out; from then on it ends all ranks.
    """
    if ranks is None:
        yield lambda: None
        return

    def begin() -> None:
        ranks.busy = True
        ranks.share(True)

    try:
        yield begin
    except Exception:
        if not ranks.busy:
            ranks.share(False)
        raise
    ranks.share(ranks.busy)  # begun and written, or not begun
    ranks.busy = False


@contextmanager
def following(ranks: Ranks) -> Iterator[None]:
    """Around the other ranks' part of it. Raises RefusedError if rank 0 leaves the clip out."""
    if not ranks.share(None):
        raise RefusedError
    ranks.busy = True
    yield
    ranks.share(None)
    ranks.busy = False


class SharedWork:
    """Rank 0's `folder`, for all ranks; None on the others."""

    def __init__(self, folder: WorkFolder | None, ranks: Ranks) -> None:
        self._folder, self._ranks = folder, ranks

    def progress(self) -> WorkProgress:
        """The last saved progress; its tensors travel when they are used, which all ranks must do alike."""
        here = None if self._folder is None else self._folder.progress()
        phase, done, names = self._ranks.share(here and (here.phase, here.done, list(here.tensors)))
        return WorkProgress(phase, done, _Saved(names, here and here.tensors, self._ranks))

    def save(self, phase: str, done: int, tensors: Callable[[], Tensors], *, always: bool = False) -> bool:
        """See `WorkFolder.save`. Ranks may have different tensors; of those with one name the first rank's is saved."""
        kept = tensors()
        owners: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        parts = self._ranks.collect({name: (tuple(each.shape), each.dtype) for name, each in kept.items()})
        for rank, part in enumerate(parts):
            for name, (shape, dtype) in part.items():
                owners.setdefault(name, (rank, shape, dtype))
        size = sum(torch.Size(shape).numel() * dtype.itemsize for _, shape, dtype in owners.values())
        if not self._ranks.share(self._folder and (always or self._folder.is_due(phase, size))):
            return False
        if self._folder is not None:
            self._folder.write(phase, done, _Collected(owners, kept, self._ranks))
        else:
            for name, (owner, _, _) in owners.items():
                if owner == self._ranks.rank:
                    self._ranks.send(kept[name].cpu(), 0)()
        return True

    def put(self, kind: str, index: int, tensors: Tensors) -> None:
        """Store tensors by kind and number."""
        if self._folder is not None:
            self._folder.put(kind, index, tensors)

    def get(self, kind: str, index: int) -> Tensors:
        """Return stored tensors, on every rank."""
        return self._ranks.share_tensors(self._folder and self._folder.get(kind, index))

    def drop(self, kind: str, index: int) -> None:
        """Delete stored tensors, if any."""
        if self._folder is not None:
            self._folder.drop(kind, index)


class _Saved(Mapping):
    """The tensors of a saved state, each of which travels to all ranks when it is used."""

    def __init__(self, names: list[str], tensors: Tensors | None, ranks: Ranks) -> None:
        self._names, self._tensors, self._ranks = dict.fromkeys(names), tensors, ranks

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._ranks.share_tensors(self._tensors and {name: self._tensors[name]})[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Collected(Mapping):
    """The tensors of a state on rank 0, each of which comes from its owner when it is used; once, and in order."""

    def __init__(self, owners: Mapping[str, tuple], kept: Tensors, ranks: Ranks) -> None:
        self._owners, self._kept, self._ranks = owners, kept, ranks

    def __getitem__(self, name: str) -> Tensor:
        owner, shape, dtype = self._owners[name]
        if owner == 0:
            return self._kept[name]
        tensor = torch.empty(shape, dtype=dtype)
        self._ranks.receive(tensor, owner, STATE)()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)
