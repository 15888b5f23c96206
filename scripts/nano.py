"""Build FlashVideo-Nano from nothing, repeat the paper's tables on it, or measure, with the Python in `.bed/`.

    python scripts/nano.py train|ablate|bench [OPTIONS ...]

The options are those of `python -m flashvideo train nano`, `ablate` or `bench`.
"""

from __future__ import annotations

import os
import subprocess
import sys

import set_up
from harness.bed import ROOT, Bed, say

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
    options = [*_COMMANDS[sys.argv[1]], *sys.argv[2:]]
    if sys.argv[1] == "ablate" and "--clip" not in options:
        from demo import footage

        options += ["--clip", str(footage(bed))]
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


if __name__ == "__main__":
    sys.exit(main())
