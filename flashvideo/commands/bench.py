"""`python -m flashvideo bench NAME`: run one of the scripts in `benchmarks/`, each of which answers one question."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
_SHARED = "common"  # shared by the scripts; no benchmark


def benchmarks() -> list[str]:
    """The names of the scripts; none in the registry's download."""
    return sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem != _SHARED)


def add_bench(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "bench",
        description="Runs one of the scripts in benchmarks/, each of which answers one question about speed or memory.",
    )
    parser.add_argument("name", choices=benchmarks(), help="which benchmark")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the script; see NAME --help")
    parser.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> int:
    process = subprocess.Popen([sys.executable, str(BENCHMARKS / f"{options.name}.py"), *options.options])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the script gets the signal too, and cleans up
            continue
