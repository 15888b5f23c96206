"""The command line, `python -m flashvideo COMMAND` in the pack's folder; `python flashvideo COMMAND` is the same.

The Python of ComfyUI's portable build looks for no modules in the current folder, and knows only the second.
"""

from __future__ import annotations

import sys
from pathlib import Path


def _run() -> int:
    if not __package__:
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    # Imported here: found only now.
    from flashvideo import devices
    from flashvideo.commands.main import main

    if sys.argv[1:2] in (["refine"], ["generate"]):  # long runs in a process that is theirs alone
        devices.return_memory()
    return main()


if __name__ == "__main__":
    sys.exit(_run())
