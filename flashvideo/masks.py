"""Masks [1 or T, H, W] in [0, 1], one for all frames or one for each, as ComfyUI's nodes give them."""

from __future__ import annotations

import torch
from torch import Tensor


def clean_mask(mask: Tensor, count: int, name: str = "mask") -> Tensor:
    """A mask [H, W], [T, H, W] or [T, 1, H, W] for `count` frames as float32 [1 or count, H, W] in [0, 1].

    Raises ValueError for another shape or number of frames, and for numbers that are not finite; `name` is what the
    message calls the mask.
    """
    mask = _frames_of(mask, name)
    if len(mask) not in (1, count):
        raise ValueError(f"{name} must have 1 frame, or as many as the clip, {count}; got {len(mask)}.")
    return mask


def opacity(transparent: Tensor, name: str = "alpha") -> Tensor | None:
    """How opaque each pixel is, float32 [T, H, W] in [0, 1], of a mask that is 1 where nothing is seen.

    None if all is opaque: then size and number of frames don't count, since Load Image gives an empty mask of 64x64
    for a picture without transparency. Raises ValueError as `clean_mask` does, but takes any number of frames.
    """
    mask = _frames_of(transparent, name)
    return 1 - mask if mask.any() else None


def _frames_of(mask: Tensor, name: str) -> Tensor:
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3 or 0 in mask.shape:
        raise ValueError(f"{name} must be [frames, height, width]; got {list(mask.shape)}.")
    mask = mask.float()
    if not torch.isfinite(mask).all():
        raise ValueError(f"{name} holds numbers that are not finite (NaN); look at the node that made it.")
    return mask.clamp(0, 1)
