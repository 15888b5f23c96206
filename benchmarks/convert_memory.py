"""Time and peak memory of converting a full-size stage-I checkpoint: `python benchmarks/convert_memory.py`.

Makes a synthetic stage1.pt with the official file's names, shapes and LoRA matrices (11.8 GB of bfloat16), converts
it in a process of its own, compares some of the result with the source, and prints one table. Needs 36 GB of disk
in the temporary folder (or --folder) and nothing else; everything it makes is removed again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from common import GIB
from safetensors import safe_open

REPOSITORY = Path(__file__).resolve().parents[1]
LAYOUT = REPOSITORY / "tests" / "data" / "golden" / "layout_stage1.json"
POLL = 0.02  # seconds between looks at the process's memory
PATTERN = 2**22 + 1  # random numbers, repeated; odd, so that rows differ


@dataclass
class Peak:
    """Largest memory of a process in bytes, and how long it ran."""

    resident: int = 0  # everything, mapped pages of the file included
    anonymous: int = 0  # what it holds itself
    seconds: float = 0.0


def main() -> None:
    """Make, convert, check, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to put the files (default: the temporary folder)")
    parser.add_argument("--dtype", default="keep")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, target = Path(folder) / "stage1.pt", Path(folder) / "stage1.safetensors"
        make_checkpoint(source)
        peak = convert(source, target, options.dtype)
        check(source, target)
        sys.stdout.write(
            "| file | to | size | peak resident | of it anonymous | time |\n|---|---|---|---|---|---|\n"
            f"| stage I, LoRA split | {options.dtype} | {source.stat().st_size / 1e9:.2f} GB | "
            f"{peak.resident / GIB:.2f} GiB | {peak.anonymous / GIB:.2f} GiB | {peak.seconds:.0f} s |\n"
        )


def make_checkpoint(path: Path) -> None:
    """Save full-size weights, from a mapped file so that making them takes no memory either."""
    shapes = {name: shape for name, (shape, _) in json.loads(LAYOUT.read_text())["keys"].items()}
    pattern = torch.randn(PATTERN, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    backing = path.with_suffix(".values")
    backing.mkdir()
    state = {}
    for index, (name, shape) in enumerate(shapes.items()):
        # A file for each tensor: torch.save writes whole storages.
        values = torch.from_file(str(backing / str(index)), shared=True, size=math.prod(shape), dtype=torch.bfloat16)
        for block in values.split(PATTERN):
            block.copy_(pattern[: len(block)])
        state[name] = values.view(shape)
    torch.save({"module": state}, path)
    shutil.rmtree(backing)


def convert(source: Path, target: Path, dtype: str) -> Peak:
    """Run the command in a process of its own and watch its memory."""
    command = [sys.executable, "-m", "flashvideo", "convert", str(source), str(target), "--dtype", dtype]
    start, peak = time.perf_counter(), Peak()
    process = subprocess.Popen(command, cwd=REPOSITORY)
    while process.poll() is None:
        status = _status(process.pid)
        peak.resident = max(peak.resident, status.get("VmHWM", 0))
        peak.anonymous = max(peak.anonymous, status.get("RssAnon", 0))
        time.sleep(POLL)
    peak.seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"the conversion failed with exit code {process.returncode}")
    return peak


def _status(pid: int) -> dict[str, int]:
    """The kernel's numbers about a process, in bytes; empty once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines)
    return {field[0].rstrip(":"): int(field[1]) * 1024 for field in fields if field[-1] == "kB"}


def check(source: Path, target: Path) -> None:
    """Compare a merged weight of the last layer and an unchanged one with the source."""
    state = torch.load(source, weights_only=True, mmap=True)["module"]
    stem = "model.diffusion_model.transformer.layers.41."
    dense = stem + "attention.dense."
    up, down = state[dense + "matrix_B.0"].float(), state[dense + "matrix_A.0"].float()
    merged = (state[dense + "original.weight"].float() + up @ down / down.shape[0]).bfloat16()
    with safe_open(target, framework="pt") as file:
        kept = torch.bfloat16
        torch.testing.assert_close(file.get_tensor("blocks.41.attn_out.weight").to(kept), merged, rtol=0.1, atol=1e-2)
        expected = state[stem + "mlp.dense_4h_to_h.bias"]
        torch.testing.assert_close(file.get_tensor("blocks.41.ff_out.bias").to(kept), expected, rtol=0.1, atol=1e-2)


if __name__ == "__main__":
    if not Path("/proc/self/status").exists():
        raise SystemExit("this benchmark reads memory from /proc: run it on Linux")
    os.nice(5)
    main()
