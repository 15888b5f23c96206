"""`python -m flashvideo bench NAME`: run one of the scripts in `benchmarks/`, each of which answers one question."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from ..errors import CommandError
from .terminal import REPOSITORY

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
_SHARED = "common"  # shared by the scripts; no benchmark


def add_bench(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line. The registry's download has no benchmarks: there it says so."""
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem != _SHARED)
    if not names:
        parser = commands.add_parser("bench", help="not in this download, only in the repository")
        parser.add_argument("rest", nargs=argparse.REMAINDER)
        parser.set_defaults(run=_no_benchmarks)
        return
    parser = commands.add_parser(
        "bench",
        help="measure speed and memory beside peers",
        description="Runs one of the scripts in benchmarks/, each of which answers one question about speed or memory.",
    )
    parser.add_argument("name", choices=names, help="which benchmark")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the script; see NAME --help")
    parser.set_defaults(run=_bench)


def _no_benchmarks(_options: argparse.Namespace) -> None:
    raise CommandError(f"Benchmarks are not part of this download. Clone {REPOSITORY} to run them.")


def _bench(options: argparse.Namespace) -> int:
    process = subprocess.Popen([sys.executable, str(BENCHMARKS / f"{options.name}.py"), *options.options])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the script gets the signal too, and cleans up
            continue
