"""Every random number of training follows from a seed and names: there is no generator whose state could be lost."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator_for(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU generator that is the same for the same seed and names in every run.

    Names are such as ("noise", step); other names give numbers that have nothing to do with these.
    """
    digest = hashlib.blake2b(repr((seed, *names)).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def randint(generator: torch.Generator, low: int, high: int) -> int:
    """Draw a whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def spread_uniform(places: Tensor, of: int, generator: torch.Generator) -> Tensor:
    """A number from each of the intervals `places` [n], of `of` equal ones of [0, 1]: each uniform, together even."""
    return (torch.rand(len(places), generator=generator) + places) / of


def normal_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal noise of x's shape on the CPU, and move it to x: the same on every device."""
    return torch.randn(x.shape, generator=generator).to(x)
