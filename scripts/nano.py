"""Build FlashVideo-Nano from nothing, repeat the paper's tables on it, or measure, with the Python in `.bed/`.

    python scripts/nano.py train|ablate|bench [OPTIONS ...]

The options are those of `python -m flashvideo train nano`, `ablate` or `bench`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import set_up
from harness import install
from harness.bed import EXTRA, ROOT, Bed, alone, say

_COMMANDS = {"train": ["train", "nano"], "ablate": ["ablate"], "bench": ["bench"]}


def main() -> int:
    """Command line; returns the command's exit code."""
    if len(sys.argv) < 2 or sys.argv[1] not in _COMMANDS:
        say(__doc__ or "")
        return 2
    set_up.enter(__file__)
    bed = Bed.load()
    if bed is None:
        say("The private ComfyUI in .bed/ is not complete: run scripts/set_up.py.")
        return 1
    if sys.argv[1] == "ablate":
        _judges(bed)
    options = [*_COMMANDS[sys.argv[1]], *sys.argv[2:]]
    if sys.argv[1] == "ablate" and "--clip" not in options:
        options += _clip(bed)
    command = [sys.executable, "-m", "flashvideo", *options]
    env = {**os.environ, "COMFYUI_PATH": bed.comfyui}  # ComfyUI carries the text encoder's tokenizer
    if os.name == "posix":  # in place of this program: signals then reach the command itself
        os.chdir(ROOT)
        os.execve(sys.executable, command, env)
    process = subprocess.Popen(command, cwd=ROOT, env=env)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the command hears it too, and saves what it has
            continue


def _clip(bed: Bed) -> list[str]:
    """The option that names the real clip; none where it can't be downloaded."""
    from demo import footage

    try:
        return ["--clip", str(footage(bed))]
    except install.SetUpError as error:
        say(f"{error}\nThe tables are made without a real clip.")
        return []


def _judges(bed: Bed) -> None:
    """Install BRISQUE and PIQE into the bed where they are missing. Without them their columns stay empty."""
    if all(importlib.util.find_spec(name) for name in ("brisque", "pypiqe", "libsvm", "cv2")):
        return
    listed = ["--no-deps", "-r", str(install.REQUIREMENTS / "evidence.txt")]
    if not bed.own_python:  # nothing is installed into a user's Python
        listed = ["--upgrade", "--target", str(EXTRA), *listed]
    try:
        with alone("Another program is setting up .bed/: waiting for it."):
            install.pip(Path(bed.python), "BRISQUE and PIQE", listed)
    except install.SetUpError as error:
        say(f"{error}\nThe columns BRISQUE and PIQE stay empty.")


if __name__ == "__main__":
    sys.exit(main())
