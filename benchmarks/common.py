"""What the benchmarks share: the library without ComfyUI, alternating timings, peak memory, one table and its JSON."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile as memory_profile

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# glibc keeps freed memory for later once the process has freed a block of this size, as any process has that decoded
# a video. Without it whoever allocates more pays for fresh pages from the kernel each time.
ALLOCATOR_LIMIT = 2**25 - 2**16
MIB, GIB = 2**20, 2**30  # bytes; memory is counted in these, files in GB
SEED = 250205179  # FlashVideo's arXiv number


def load_library() -> None:
    """Make `import flashvideo` find this repository's, whatever the current folder is.

    The repository's root stays off `sys.path`: there, `nodes` would be the pack's and not ComfyUI's.
    """
    folder = ROOT / "flashvideo"
    spec = importlib.util.spec_from_file_location("flashvideo", folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["flashvideo"] = module
    spec.loader.exec_module(module)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that every benchmark has."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the result there")


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done what was asked of it."""
    kind = torch.device(device).type
    if kind != "cpu":
        getattr(torch, kind).synchronize()


def is_single_thread(device: torch.device | str) -> bool:
    """Whether work on this device runs on the calling thread alone."""
    return torch.device(device).type == "cpu" and torch.get_num_threads() == 1


def alternate(
    peers: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device | str = "cpu", warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each peer in each round; in a round every peer runs once, in turn, so that drift hits all alike.

    On the CPU with one thread they are seconds of processor time: what other programs take of the core is not counted.
    """
    if torch.device(device).type == "cpu":
        torch.empty(ALLOCATOR_LIMIT, dtype=torch.uint8)
    clock = time.process_time if is_single_thread(device) else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(-warmup, rounds):
        for name, run in peers.items():
            synchronize(device)
            start = clock()
            run()
            synchronize(device)
            if turn >= 0:
                seconds[name].append(clock() - start)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each peer's times."""
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_memory(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Bytes that `run` holds at its peak beyond what stood before: tensors, and the temporaries inside operators."""
    if torch.device(device).type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with memory_profile(profile_memory=True) as profiler:
        run()
    held = peak = 0
    events = (event for event in profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def device_name(device: torch.device | str) -> str:
    """The device in words, with the number of threads where that matters."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{os.cpu_count()}-core {platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


def report(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    device: torch.device | str,
    facts: Mapping[str, Any] | None = None,
    target: Path | None = None,
) -> None:
    """Print one Markdown table under its facts, and write the same as JSON."""
    known = {
        "device": device_name(device),
        "clock": "processor time" if is_single_thread(device) else "wall time",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **(facts or {}),
    }
    lines = [f"### {title}", "", "; ".join(f"{name}: {value}" for name, value in known.items()), ""]
    lines += [_row(columns), _row(["---"] * len(columns))]
    lines += [_row([_cell(value) for value in row]) for row in rows]
    sys.stdout.write("\n".join(lines) + "\n\n")
    if target is not None:
        table = [dict(zip(columns, row, strict=True)) for row in rows]
        target.write_text(json.dumps({"title": title, **known, "rows": table}, indent=1) + "\n", encoding="utf-8")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)
