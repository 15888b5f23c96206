"""Real processes with gloo on the CPU: the same function on each, as torchrun would start it."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

TESTS = Path(__file__).resolve().parent
PATIENCE = timedelta(minutes=5)  # far beyond what the checks take, even on a busy machine


def on_ranks(size: int, folder: Path, check: str, *arguments: Any) -> list[Any]:
    """What `check`, "module:function" of this folder, returns on each of `size` ranks for (ranks, *arguments)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_imports"])
    processes = [context.Process(target=_child, args=(rank, size, folder, check, arguments)) for rank in range(size)]
    # The server, which imports for all of them, finds modules there, and nowhere else.
    with patch.dict(os.environ, PYTHONPATH=str(TESTS)):
        for process in processes:
            process.start()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    assert codes == [0] * size, codes
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _child(rank: int, size: int, folder: Path, check: str, arguments: tuple[Any, ...]) -> None:
    if str(TESTS.parent) not in sys.path:
        sys.path.append(str(TESTS.parent))
    import torch.distributed as dist

    from flashvideo.parallel import Ranks

    torch.set_num_threads(1)
    store = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=PATIENCE)
    module, _, function = check.partition(":")
    result = getattr(importlib.import_module(module), function)(Ranks.world(), *arguments)
    torch.save(result, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
