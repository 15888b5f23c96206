"""The device that a command works on, and the memory that it gives back."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from flashvideo.devices import open_device, return_memory
from flashvideo.errors import CommandError

ROOT = Path(__file__).resolve().parents[2]
# Blocks of 8 MB and more that go again, between small ones that stay; prints by how much memory has grown, in bytes.
GAPS = """
import torch
from flashvideo.devices import return_memory

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))

if {ours}:
    assert return_memory()
first, small = torch.ones(2**22), []
del first
before = resident()
for count in range(20):
    for size in (2**21, 2**21 + 2**16 * count):
        large = torch.ones(size)
        small.append(torch.ones(2**10))
        del large
print(resident() - before)
"""


def growth(*, ours: bool) -> int:
    script = [sys.executable, "-c", GAPS.format(ours=ours)]
    return int(subprocess.run(script, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_memory_has_no_gaps_after_large_blocks() -> None:
    assert growth(ours=True) < 4 * 2**20 < growth(ours=False)


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())  # musl and macOS know no mallopt
    assert return_memory() is False

    def windows(name: str | None) -> None:
        raise TypeError("expected str, not None")

    monkeypatch.setattr("ctypes.CDLL", windows)
    assert return_memory() is False


def test_a_device_that_is_not_there_is_named() -> None:
    assert open_device("cpu").type == "cpu"
    with pytest.raises(CommandError, match="There is no device 'abacus' here"):
        open_device("abacus")
