"""The bed: the private ComfyUI that this project runs its demo and tests in.

Everything lives in `.bed/` inside the project: virtual environment, ComfyUI, caches, temporary files, the base
folder of the demo's server. Programs of the bed run with a home folder of their own, so that nothing outside the
project changes and nothing of the user's own set-up leaks in. Only the standard library is used here: this file also
runs before anything is installed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

ROOT = Path(__file__).resolve().parents[2]
BED = ROOT / ".bed"
PACK_NAME = "ComfyUI-FlashVideo"

VENV = BED / "venv"
CONVERTER = BED / "converter"
LINT = BED / "lint"
EXTRA = BED / "extra"
NEWEST_PACKAGES = BED / "newest"
STAMP = BED / "bed.json"
TEMPORARY = BED / "tmp"
LOCK = BED / "lock"

CANCELLED = 128 + signal.SIGINT  # exit code after Ctrl+C, as flashvideo/errors.py has it, which needs packages

_LOOK_AGAIN_SECONDS = 0.5
_INSIDE = "FLASHVIDEO_INSIDE_BED"
_PRIVATE_FOLDERS = {
    "HOME": "home",
    "USERPROFILE": "home",
    "APPDATA": "home/config",
    "LOCALAPPDATA": "home/data",
    "XDG_CONFIG_HOME": "home/config",
    "XDG_DATA_HOME": "home/data",
    "XDG_STATE_HOME": "home/state",
    "XDG_CACHE_HOME": "cache",
    "HF_HOME": "cache/huggingface",
    "TORCH_HOME": "cache/torch",
    "TORCHINDUCTOR_CACHE_DIR": "cache/inductor",
    "TRITON_CACHE_DIR": "cache/triton",
    "MPLCONFIGDIR": "cache/matplotlib",
}
_FOREIGN = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "CONDA_PREFIX", "HF_HUB_CACHE", "HF_TOKEN_PATH")


@dataclass(frozen=True)
class Bed:
    """A ready ComfyUI: the Python that runs it and the folder that holds its main.py."""

    python: str
    comfyui: str
    origin: str  # "yours" (COMFYUI_PATH), "comfy-cli" or "wheel"
    own_python: bool  # False: the Python of the user's ComfyUI, into which nothing is installed
    key: str

    @property
    def base(self) -> Path:
        """The base folder of the demo's server: models, input, output, custom_nodes."""
        return BED / "base"

    def environment(self) -> dict[str, str]:
        """Environment of every program that runs in the bed."""
        env = clean_environment()
        env.update({name: str(BED / folder) for name, folder in _PRIVATE_FOLDERS.items()})
        env.update({_INSIDE: "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"})
        env["FLASHVIDEO_COMFYUI"] = self.comfyui
        if not self.own_python:
            env["PYTHONPATH"] = str(EXTRA)  # the test tools, which are not installed into the user's Python
            env["PYTHONNOUSERSITE"] = "1"
        if self.origin == "yours":
            env["PYTHONPYCACHEPREFIX"] = str(BED / "cache" / "pycache")  # leave no byte code in the user's ComfyUI
        for folder in _PRIVATE_FOLDERS.values():
            (BED / folder).mkdir(parents=True, exist_ok=True)
        return env

    def save(self) -> None:
        """Write the stamp that lets the next set-up do nothing."""
        STAMP.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls) -> Bed | None:
        """The bed that the stamp describes; None if there is none or its files are gone."""
        try:
            bed = cls(**json.loads(STAMP.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        complete = Path(bed.python).exists() and (Path(bed.comfyui) / "main.py").exists() and CONVERTER.exists()
        return bed if complete else None


def clean_environment() -> dict[str, str]:
    """The caller's environment without what would leak into a virtual environment; temporary files stay inside."""
    env = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    TEMPORARY.mkdir(parents=True, exist_ok=True)
    env.update(dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(TEMPORARY)))
    env.update({"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"})
    return env


@contextmanager
def alone(waiting: str) -> Iterator[None]:
    """Change the bed while no other program does; prints `waiting` if it has to wait for one.

    The system frees the lock of a program that was killed.
    """
    LOCK.parent.mkdir(exist_ok=True)
    with LOCK.open("ab") as file:
        if not _locked(file):
            say(waiting)
            while not _locked(file):
                time.sleep(_LOOK_AGAIN_SECONDS)
        yield


def _locked(file: BinaryIO) -> bool:
    """Whether the file is this program's now; on a disk that knows no locks it always is."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def inside() -> bool:
    """True in a program that the bed started."""
    return os.environ.get(_INSIDE) == "1"


def stop_on_terminate() -> None:
    """Make SIGTERM raise KeyboardInterrupt, as Ctrl+C does, so that this program cleans up.

    Ctrl+C is handled again too: a program that a shell script starts in the background ignores it, and all that is
    started here would inherit that, such as a ComfyUI that must be stopped by Ctrl+C.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def say(text: str = "") -> None:
    """Print a line, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def seconds(value: float) -> str:
    """A duration in words: `4.2 s`, `3 min 05 s`."""
    return f"{value:.1f} s" if value < 60 else f"{int(value) // 60} min {int(value) % 60:02d} s"
