"""The colours that a latent shows while a sampler runs, without its VAE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...config import TEMPORAL_FACTOR


def fit_preview(latents: Sequence[Tensor], videos: Sequence[Tensor]) -> Tensor:
    """Least-squares map from latents [16, n + 1, h, w] to what they show, the mean colours of [3, 4n + 1, 8h, 8w].

    Returns [17, 3]: red, green and blue in [-1, 1] a channel, and in the last row for a latent of zeros.
    """
    rows, colours = [], []
    for latent, video in zip(latents, videos, strict=True):
        size = latent.shape[2:]
        starts = range(1, video.shape[1], TEMPORAL_FACTOR)  # the first frame stands alone
        frames = [video[:, :1], *(video[:, start : start + TEMPORAL_FACTOR] for start in starts)]
        small = torch.stack([F.adaptive_avg_pool2d(part.mean(dim=1), size) for part in frames], dim=1)
        rows.append(rearrange(latent.float(), "c t h w -> c (t h w)").T)
        colours.append(rearrange(small.float(), "c t h w -> c (t h w)").T)
    inputs = torch.cat(rows)
    inputs = torch.cat((inputs, torch.ones(len(inputs), 1)), dim=1)
    return torch.linalg.lstsq(inputs, torch.cat(colours)).solution
