"""The benchmarks' programs run, on small inputs, and print a table of numbers. How fast anything is is not asked."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from forked import fork_program
from patience import finished, joined

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
# Program, its options, the first column, and a part of what stands there.
RUNS = [
    ("dit", "--width 64 --rounds 1 --sizes 1 --dtypes float32", "dtype", {"float32"}),
    ("scaling", "--width 64 --rounds 1 --sizes 3", "latent frames x rows x columns", {"exponent"}),
    ("attention", "--clips 1 --clip 5 64 64 --grid 2 6 8 --width 64 --rounds 1", "attention", {"exact", "wide"}),
    ("full_size", "--small", "work", {"VAE encode, 64x96x9", "VAE decode, 64x96x9"}),
    ("long_memory", "--minutes 1 --rate 1 --height 32 --width 48", "phase", {"encode", "refine", "decode"}),
]


def run(program: str, *words: object, folder: Path, alone: bool = False) -> tuple[int, str, str]:
    """Run a program to its end, however long that takes; its exit code, output and errors.

    `alone`: as users start it, and not where PyTorch is imported already.
    """
    command = [FOLDER / f"{program}.py", *map(str, words)]
    if not alone:
        code = joined(fork_program(command, folder))
        return code, *((folder / f"{name}.txt").read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        output, errors = finished(process)
    return process.returncode, output, errors


@pytest.mark.slow
@pytest.mark.parametrize(("program", "options", "heading", "expected"), RUNS, ids=[run[0] for run in RUNS])
def test_a_benchmark_runs_and_reports(
    program: str, options: str, heading: str, expected: set[str], tmp_path: Path
) -> None:
    target = tmp_path / "result.json"
    words = (*options.split(), "--device", "cpu", "--json", target)
    code, output, errors = run(program, *words, folder=tmp_path, alone=program == "dit")
    assert code == 0, errors
    rows = json.loads(target.read_text(encoding="utf-8"))["rows"]
    assert {row[heading] for row in rows} >= expected
    assert f"| {heading} |" in output
    numbers = [value for row in rows for value in row.values() if isinstance(value, int | float)]
    assert numbers
    assert not any(math.isnan(value) for value in numbers)


@pytest.mark.parametrize(
    "program", sorted({path.stem for path in FOLDER.glob("*.py")} - {"common"} - {run[0] for run in RUNS})
)
def test_a_benchmark_says_what_it_asks(program: str, tmp_path: Path) -> None:
    """Those that need minutes, tens of gigabytes or a peer: at least their imports and options hold."""
    code, _, errors = run(program, "--help", folder=tmp_path)
    assert "Traceback" not in errors, errors
    lacks_peer = program == "vae" and "pip install diffusers" in errors
    assert code == 0 or lacks_peer, errors
