"""Latents recognised by their numbers, since ComfyUI's nodes rebuild LATENTs and samplers see nothing but the samples.

A key stands for the numbers of one position. Cropping, flipping, repeating, batching, saving and loading keep the keys;
a sampler, an upscale or a blend makes other numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEY_CHANNELS = 4  # of 16 bits make one whole number, unique among the positions of a video
KEY_DTYPES = (torch.float16, torch.bfloat16)  # a latent that was stored in either is recognised
_PROBES = 4096  # positions of a video that are looked up
_MOST_KEYS = 2**15  # of one latent; of a larger one, those that a power of two divides, by their own bits


def keys_of(samples: Tensor, dtype: torch.dtype) -> Tensor:
    """One whole number for each position of samples [B, C, ...], [B, N]."""
    values = samples[:, :KEY_CHANNELS].movedim(1, -1).to("cpu", torch.float32).to(dtype)
    return values.contiguous().view(torch.int64).flatten(1)


def stored_keys(samples: Tensor) -> tuple[dict[torch.dtype, Tensor], int]:
    """Keys to remember a latent by, in each of KEY_DTYPES, and their step: one in so many is stored."""
    count, step = samples[:, 0].numel(), 1
    while count > step * _MOST_KEYS:
        step *= 2
    keys = {}
    for dtype in KEY_DTYPES:
        each = keys_of(samples, dtype).flatten()
        keys[dtype] = each[_is_stored(each, step)]
    return keys, step


def probes_of(keys: Tensor, step: int) -> Tensor:
    """Some of a video's keys, to look up among those that are stored with `step`."""
    probes = keys if step == 1 else keys[_is_stored(keys, step)]
    return probes[:: max(1, len(probes) // _PROBES)]


def _is_stored(keys: Tensor, step: int) -> Tensor:
    """Which keys are stored, one in `step`. Their own bits decide, so that it doesn't depend on their position."""
    mixed = keys ^ (keys >> 16) ^ (keys >> 32) ^ (keys >> 48)
    return (mixed & (step - 1)) == 0
