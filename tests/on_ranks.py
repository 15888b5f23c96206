"""Real processes with gloo on the CPU: the same function on each, as torchrun would start it."""

from __future__ import annotations

import importlib
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from forked import ROOT, fork
from patience import joined

PATIENCE = timedelta(minutes=5)  # far beyond what the checks take, even on a busy machine


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
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=PATIENCE)
    module, _, function = check.partition(":")
    result = getattr(importlib.import_module(module), function)(Ranks.world(), *arguments)
    torch.save(result, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
