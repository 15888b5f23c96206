"""Clips that tests make: pixels, with motion, light and texture."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_of(count: int = 4, height: int = 135, width: int = 241, detail: float = 0.03, seed: int = 0) -> Tensor:
    """A moving scene [count, height, width, 3] in 0.15..0.85: coloured light, blobs that wander, fine texture."""
    noise = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, width / height, width), indexing="ij")
    frames = []
    for index in range(count):
        light = torch.stack([0.5 + 0.15 * x - 0.1 * y, 0.45 + 0.1 * y, 0.55 - 0.1 * x], -1)  # [H, W, 3]
        for blob, color in enumerate([(0.2, -0.1, -0.15), (-0.15, 0.1, 0.15), (0.05, 0.15, -0.2)]):
            away = (x - 0.3 - 0.5 * blob - 0.02 * index) ** 2 + (y - 0.25 - 0.25 * blob) ** 2
            light = light + torch.exp(-away / 0.03)[..., None] * torch.tensor(color)
        frames.append(light + detail * torch.randn(height, width, 1, generator=noise))
    return torch.stack(frames).clamp(0.15, 0.85)
