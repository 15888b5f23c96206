"""How a process finds the others: torchrun's environment, one card for each process or the CPU."""

from __future__ import annotations

import atexit
import os
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from ..errors import CommandError
from .ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import Store

# Ranks wait for each other that long: on CPUs one layer's attention of a large video takes minutes, rank 0 writes the
# result alone, and before preference tuning one of them may refine a file of clips while the others have none left. A
# process that ends is noticed at once, without this.
PATIENCE = timedelta(hours=12)
LONGEST_RUN = timedelta(days=365)
SECONDS_TO_WAKE = 30.0  # a thread that is told to end; far more than it takes
_REPORTED = "reported"  # how many processes had an error to report
_WORD = "word for {}"  # a process: another has reported, or it ends itself
_YES, _NO = b"reported", b"ends"


def own_device(name: str | None) -> str:
    """The device of this process, from the user's choice. Raises CommandError for one that several can't share."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name is None and not cards):
        return "cpu"
    if name not in (None, "cuda"):
        raise CommandError(f"Several processes take a card each, or --device cpu; got --device {name}.")
    here = int(os.environ.get("LOCAL_RANK", "0"))
    if here >= cards:
        raise CommandError(
            f"There are {cards} cards here, one for each process, and more processes: give torchrun "
            f"--nproc-per-node {max(cards, 1)}, or the command --device cpu."
        )
    return f"cuda:{here}"


class Meeting:
    """Where the processes of a run meet, and agree on who reports an error."""

    def __init__(self) -> None:
        """Raises CommandError if the other processes can't be found."""
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        try:
            store, self.rank, self.size = next(rendezvous("env://", timeout=PATIENCE))
        except (RuntimeError, ValueError) as error:
            raise CommandError(f"The other processes can't be found: {str(error).splitlines()[0]}.") from error
        self._store: Store = dist.PrefixStore("flashvideo", store)
        self._heard = threading.Event()
        if self.rank and hasattr(store, "clone"):  # PyTorch of 2025 and newer: a connection of its own
            self._listener = threading.Thread(target=self._listen, args=(self._store.clone(),), daemon=True)
            self._listener.start()
            atexit.register(self._stop_listening)

    def _listen(self, store: Store) -> None:
        """Notice a report at once, while this process computes: who kept the store may have ended when it asks."""
        word = _WORD.format(self.rank)
        with suppress(RuntimeError):
            store.wait([word], LONGEST_RUN)
            if store.get(word) == _YES:
                self._heard.set()

    def _stop_listening(self) -> None:
        """Before Python ends: a thread that comes back from PyTorch's C++ after that aborts the process."""
        if not self._listener.is_alive():
            return
        with suppress(RuntimeError):
            self._store.set(_WORD.format(self.rank), _NO)
        self._listener.join(SECONDS_TO_WAKE)

    def join(self, device: str) -> Ranks:
        """All processes, once each of them has joined."""
        import torch.distributed as dist

        if device != "cpu":
            torch.cuda.set_device(device)
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        try:
            dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.size, timeout=PATIENCE)
            return Ranks.world()
        except RuntimeError as error:
            raise CommandError("The other processes of this run can't be reached.") from error

    def may_report(self) -> bool:
        """Whether this process is the first that has an error to report."""
        if self._heard.is_set():
            return False
        try:
            first = self._store.add(_REPORTED, 1) == 1
        except RuntimeError:  # the process that kept the store has ended in silence: rank 0, if it isn't torchrun's
            return self.rank == 1
        if first:
            with suppress(RuntimeError):
                for rank in range(self.size):
                    self._store.set(_WORD.format(rank), _YES)
        return first

    def has_heard(self, seconds: float) -> bool:
        """Whether another process reports an error within so many seconds."""
        return self._heard.wait(seconds)

    def leave(self, seconds: float) -> None:
        """End after a report: without torchrun, rank 0 keeps the store, and stays so many seconds for the others."""
        if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(seconds)
