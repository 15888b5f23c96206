"""Real processes with gloo on the CPU: the same function on each, or the same command, as torchrun starts them."""

from __future__ import annotations

import importlib
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from forked import ROOT, fork, fork_program
from patience import joined

PATIENCE = 600  # seconds; far beyond what the checks take, even on a busy machine


def on_ranks(size: int, folder: Path, check: str, *arguments: Any) -> list[Any]:
    """What `check`, "module:function" of this folder, returns on each of `size` ranks for (ranks, *arguments)."""
    processes = [fork(_child, rank, size, folder, check, arguments) for rank in range(size)]
    codes = [joined(process) for process in processes]
    assert codes == [0] * size, codes
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _child(rank: int, size: int, folder: Path, check: str, arguments: tuple[Any, ...]) -> None:
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    import torch.distributed as dist

    from flashvideo.parallel import Ranks

    torch.set_num_threads(1)
    store = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE))
    module, _, function = check.partition(":")
    result = getattr(importlib.import_module(module), function)(Ranks.world(), *arguments)
    torch.save(result, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> str:
    """A port that no program listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


class Run:
    """A command on several processes, with the environment that torchrun gives them."""

    def __init__(self, folder: Path, size: int, *words: str | Path) -> None:
        self.output, self.error = folder / "stdout.txt", folder / "stderr.txt"
        for file in (self.output, self.error):
            file.unlink(missing_ok=True)
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(size)}
        self.processes = [
            fork_program(["-m", "flashvideo", *words], folder, {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(size)
        ]

    def wait(self) -> list[int]:
        """Exit codes."""
        return [joined(process) for process in self.processes]

    def wait_for(self, condition: Callable[[str], bool]) -> None:
        """Wait until what is on the terminal fulfils a condition."""
        end = time.monotonic() + PATIENCE
        while not self.error.exists() or not condition(self.error.read_text()):
            assert time.monotonic() < end and any(process.is_alive() for process in self.processes)
            time.sleep(0.1)

    def sentences(self) -> list[str]:
        """The lines on standard error without progress bars."""
        return [line for line in self.error.read_text().splitlines() if line.strip() and "%|" not in line]
