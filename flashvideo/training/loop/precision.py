"""Whether bfloat16 helps on this processor. Without instructions for it, training takes 50 to 100 times longer."""

from __future__ import annotations

import time
from functools import cache

import torch

# Of torch.cpu.get_capabilities: x86 names its two extensions, ARM64 has them for NEON and for SVE.
_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
_SIDE, _RUNS = 256, 5  # of the product that is timed
_FASTER = 1.2  # times, to be called a help


@cache
def cpu_has_bf16() -> bool:
    """Whether the processor multiplies in bfloat16: by its flags, or by timing where PyTorch doesn't report them."""
    if hasattr(torch.cpu, "get_capabilities"):  # older versions of PyTorch have none
        flags = torch.cpu.get_capabilities()
        return any(flags.get(name) for name in _INSTRUCTIONS)
    return _FASTER * _seconds(torch.bfloat16) < _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The shortest time of a small matrix product."""
    matrix = torch.ones(_SIDE, _SIDE, dtype=dtype)
    times = []
    for _ in range(_RUNS + 1):  # the first one warms up
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - started)
    return min(times[1:])
