"""Check the code's style (ruff), and that imports run one way (import-linter).

    python scripts/lint.py

Needs these two alone, which it installs into `.bed/lint`, and not the rest of the bed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.bed import BED, ROOT, alone, clean_environment, say
from harness.install import SetUpError, lint_tools


def check() -> bool:
    """Whether all is well; shows what is not. Raises SetUpError if the tools can't be installed."""
    with alone("Another program is setting up .bed/: waiting for it."):
        python = lint_tools()
    return all([_style(python), _imports(python)])


def _style(python: Path) -> bool:
    say("Style: ruff check")
    return _run([str(python), "-m", "ruff", "check", "--quiet", "--cache-dir", str(BED / "ruff"), str(ROOT)])


def _imports(python: Path) -> bool:
    say("Imports: lint-imports")
    program = python.with_name("lint-imports")  # its module can't be run with `python -m`
    return _run([str(program), "--no-logo", "--cache-dir", str(BED / "imports")], quiet=True)


def _run(command: Sequence[str], *, quiet: bool = False) -> bool:
    """Whether a command succeeds; with `quiet` it is only heard if not."""
    # import-linter finds the package `flashvideo` there, whatever the folder of the pack is called.
    env = {**clean_environment(), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=quiet, text=True, check=False)
    if result.returncode and quiet:
        say(f"{result.stdout}{result.stderr}")
    return result.returncode == 0


def main() -> int:
    """Command line; returns the exit code."""
    try:
        return 0 if check() else 1
    except SetUpError as error:
        say(f"Not checked: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
