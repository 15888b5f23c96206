"""`python -m flashvideo bench NAME`: run one of the scripts in `benchmarks/`, each of which answers one question."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
_SHARED = "common"  # what the scripts have in common


def add_bench(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line, in a checkout; what ComfyUI's registry hands out has no benchmarks."""
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem != _SHARED)
    if not names:
        return
    parser = commands.add_parser("bench", help="measure speed and memory beside peers")
    parser.add_argument("name", choices=names)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the script; NAME --help tells them")
    parser.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> int:
    process = subprocess.Popen([sys.executable, str(BENCHMARKS / f"{options.name}.py"), *options.options])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the script hears it too, and stops what it has started
            continue
