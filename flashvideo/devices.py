"""The device that a command works on, and main memory."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from .errors import CommandError

if TYPE_CHECKING:
    import torch

M_MMAP_THRESHOLD = -3  # as glibc's malloc.h calls it
LARGE_BLOCK = 2**20  # bytes
GIB = 2**30  # bytes; memory is counted in GiB, files in GB
# PyTorch's errors have no class of their own everywhere: Linux, Windows and macOS's CPU; MPS.
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def open_device(name: str | None) -> torch.device:
    """The device of this name, or without one the best there is. Raises CommandError if it isn't there."""
    import torch  # commands that need no device start without it

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either of them
        raise CommandError(f"There is no device {name!r} here ({str(error).splitlines()[0]}).") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no more memory, on a card or in the machine."""
    import torch

    message = str(error).lower()
    on_card = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
    return on_card or (isinstance(error, RuntimeError) and any(words in message for words in NO_MEMORY))


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take on a graphics card; None for devices that don't report it."""
    import torch

    if device.type != "cuda":
        return None
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + idle


def main_memory() -> int:
    """Bytes of main memory that this machine has."""
    import psutil  # ComfyUI brings it

    return psutil.virtual_memory().total


def return_memory() -> bool:
    """Let this process give large blocks of main memory back as soon as they are free; returns whether it will.

    By default glibc raises its limit when large blocks are freed: it keeps ever larger ones in its heap, and a long run
    leaves gaps between them. With a fixed limit it doesn't. Other C libraries have no such setting.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK))
    except (AttributeError, OSError, TypeError):  # no glibc; on Windows no library of that name
        return False
