"""3D convolutions as 2D ones, for training in bfloat16 on a CPU."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional


def overruns(conv: nn.Module, x: Tensor) -> bool:
    """Whether oneDNN would make the gradient of a Conv3d's weights in bfloat16.

    Where there are few frames it gives NaN, or writes beyond its memory, which ends the process (PyTorch 2.13, a
    processor with AMX). The gradient of x [B, C, T, H, W], and 2D convolutions, are right.
    """
    if x.device.type != "cpu" or not (torch.is_grad_enabled() and conv.weight.requires_grad):
        return False
    return torch.bfloat16 in (x.dtype, torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)


def by_moments(conv: nn.Module, x: Tensor) -> Tensor:
    """Run a Conv3d, which pads space alone, as a Conv2d of frames whose channels are those of all moments it sees.

    [B, C, T, H, W] -> [B, C', T - 2, H, W] for a kernel of 3.
    """
    moments = conv.kernel_size[0]
    frames = x.shape[2] - moments + 1
    seen = torch.cat([x[:, :, first : first + frames] for first in range(moments)], dim=1)
    pictures, kernel = rearrange(seen, "b c t h w -> (b t) c h w"), rearrange(conv.weight, "o c t h w -> o (t c) h w")
    out = functional.conv2d(pictures, kernel, conv.bias, padding=conv.padding[1:])
    return rearrange(out, "(b t) c h w -> b c t h w", b=len(x))
