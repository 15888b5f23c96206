"""Rotary positions in three axes (FlashVideo section 3.2; the split of a head is CogVideoX's).

A head's first quarter turns with time, the next three eighths with the row, the last three eighths with the
column. Positions are plain integers at every resolution: nothing is interpolated, so one set of weights serves
270p and 1080p.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

ROPE_BASE = 10000.0
COMPLEX_DEVICES = ("cpu", "cuda")  # where complex numbers multiply fast, ROCm's included


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Widths that time, row and column take of a head, which must be a multiple of 16."""
    if head_dim % 16:
        raise ValueError(f"rotary positions need a head width that is a multiple of 16; got {head_dim}")
    time = head_dim // 4
    space = (head_dim - time) // 2
    return time, space, space


def rope_table(frames: int, rows: int, columns: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every video token, in the tokens' order: frame, row, column.

    Each rotation serves two adjacent dimensions and stands once: both tables are [frames * rows * columns,
    head_dim / 2] in float32.
    """
    angles = []
    for length, width in zip((frames, rows, columns), rope_axes(head_dim), strict=True):
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        positions = torch.arange(length, dtype=torch.float32, device=device)
        angles.append(torch.outer(positions, 1.0 / ROPE_BASE**exponents))
    table = per_token(*angles)
    return table.cos(), table.sin()


def per_token(times: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Numbers of frames [T, a], rows [H, b] and columns [W, c] for each video token: [T * H * W, a + b + c]."""
    t, h, w = times.shape[0], rows.shape[0], columns.shape[0]
    by_frame = repeat(times, "t c -> t h w c", h=h, w=w)
    by_row = repeat(rows, "h c -> t h w c", t=t, w=w)
    by_column = repeat(columns, "w c -> t h w c", t=t, h=h)
    return rearrange(torch.cat((by_frame, by_row, by_column), dim=-1), "t h w c -> (t h w) c")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent pairs of the last dimension: (a, b) becomes (a cos - b sin, b cos + a sin).

    `x` is [B, N, heads, head_dim]; `cos` and `sin` are [N, head_dim / 2] in float32. The arithmetic is float32,
    the result has the dtype of `x`.
    """
    cos, sin = cos[:, None], sin[:, None]  # [N, 1, head_dim / 2]
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` in place and without temporaries of its size in float32; not for autograd.

    A pair is a complex number, and turning it is one multiplication. Other dtypes than float32 are turned in a copy.
    """
    if x.device.type not in COMPLEX_DEVICES:
        return x.copy_(rotate(x, cos, sin))
    exact = x.float()  # `x` itself if it is float32
    torch.view_as_complex(exact.unflatten(-1, (-1, 2))).mul_(torch.complex(cos, sin)[:, None])
    return x if exact is x else x.copy_(exact)
