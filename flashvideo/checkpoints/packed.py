"""GGUF's packed numbers: blocks of a few bits a number that share scale factors.

A row of a matrix [out, in] is a sequence of blocks, and a packed matrix a tensor of bytes [out, bytes of a row]. Rows
can be taken apart and put together as those of any matrix. The layouts are ggml's (github.com/ggml-org/ggml,
src/ggml-quants.c); the tests compare every one with the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_LONG = 256  # numbers in a block of the kinds called K; 8 or 16 groups of them have scale factors of their own


@dataclass(frozen=True)
class Packing:
    """A way to pack numbers. A block of `numbers` takes `nbytes`; `halves` are its float16 factors' first and end."""

    name: str
    number: int  # ggml's, which files hold
    numbers: int
    nbytes: int
    halves: tuple[int, int]
    unpack_blocks: Callable[[Tensor], Tensor]

    def row_bytes(self, columns: int) -> int:
        """Length of a packed row. Raises ValueError if no whole number of blocks makes it."""
        if columns % self.numbers:
            raise ValueError(f"{columns} numbers are no multiple of {self.numbers}, as {self.name} needs")
        return columns // self.numbers * self.nbytes

    def columns(self, row_bytes: int) -> int:
        """The inverse of `row_bytes`."""
        return row_bytes // self.nbytes * self.numbers

    def unpack(self, packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [out, in] of bytes [out, bytes of a row], on their device."""
        return self.unpack_blocks(packed.reshape(-1, self.nbytes)).to(dtype).reshape(packed.shape[0], -1)

    def linear(
        self, x: Tensor, packed: Tensor, bias: Tensor | None, change: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """x [..., in] times the matrix, plus a bias, [..., out]; `change` gets the unpacked matrix before."""
        matrix = self.unpack(packed, x.dtype)
        return nn.functional.linear(x, matrix if change is None else change(matrix), bias)

    def is_finite(self, packed: Tensor) -> bool:
        """Whether no number is NaN or infinite, by its factors alone."""
        return bool(torch.isfinite(_half(packed.reshape(-1, self.nbytes), *self.halves)).all())


def _half(blocks: Tensor, start: int, end: int) -> Tensor:
    """Bytes start..end of each block as float16, in float32."""
    return blocks[:, start:end].contiguous().view(torch.float16).float()


def _nibbles(part: Tensor, group: int) -> Tensor:
    """Four-bit numbers of bytes [N, M]: of each `group` bytes first the low halves, then the high, [N, 2 M]."""
    part = part.reshape(len(part), -1, 1, group)
    return torch.cat((part & 15, part >> 4), dim=2).flatten(1)


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """The 32 bits of four bytes, the lowest first, as 0 and 16; [N, 32]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return ((blocks[:, start : start + 4, None] >> shifts & 1) << 4).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    return (_nibbles(blocks[:, 2:], 16).float() - 8) * _half(blocks, 0, 2)


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:], 16) * _half(blocks, 0, 2) + _half(blocks, 2, 4)


def _q5_0(blocks: Tensor) -> Tensor:
    return ((_nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks, 2)).float() - 16) * _half(blocks, 0, 2)


def _q5_1(blocks: Tensor) -> Tensor:
    return (_nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks, 4)) * _half(blocks, 0, 2) + _half(blocks, 2, 4)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8) * _half(blocks, 0, 2)


def _scaled_groups(blocks: Tensor, numbers: Tensor) -> Tensor:
    """Numbers [N, 256] of Q4_K and Q5_K times a scale, less a minimum: six bits each for every 32, in 12 bytes."""
    low, middle, high = blocks[:, 4:16].reshape(-1, 3, 4).unbind(dim=1)
    scales = torch.cat((low & 63, (high & 15) | (low >> 2 & 48)), dim=1)
    minima = torch.cat((middle & 63, (high >> 4) | (middle >> 2 & 48)), dim=1)
    scales, minima = _half(blocks, 0, 2) * scales, _half(blocks, 2, 4) * minima  # [N, 8]
    return (scales[:, :, None] * numbers.reshape(-1, 8, 32) - minima[:, :, None]).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    return _scaled_groups(blocks, _nibbles(blocks[:, 16:], 32))


def _q5_k(blocks: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = (blocks[:, 16:48, None].transpose(1, 2) >> shifts & 1) << 4  # [N, 8, 32]
    return _scaled_groups(blocks, _nibbles(blocks[:, 48:], 32) | fifth.flatten(1))


def _q6_k(blocks: Tensor) -> Tensor:
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3) << 4  # [N, 2, 4, 32]
    numbers = (_nibbles(blocks[:, :128], 64) | high.flatten(1)).float() - 32
    scales = _half(blocks, 208, 210) * blocks[:, 192:208].contiguous().view(torch.int8)  # [N, 16]
    return (scales[:, :, None] * numbers.reshape(-1, 16, 16)).flatten(1)


PACKINGS = {
    packing.number: packing
    for packing in (
        Packing("Q4_0", 2, 32, 18, (0, 2), _q4_0),
        Packing("Q4_1", 3, 32, 20, (0, 4), _q4_1),
        Packing("Q5_0", 6, 32, 22, (0, 2), _q5_0),
        Packing("Q5_1", 7, 32, 24, (0, 4), _q5_1),
        Packing("Q8_0", 8, 32, 34, (0, 2), _q8_0),
        Packing("Q4_K", 12, _LONG, 144, (0, 4), _q4_k),
        Packing("Q5_K", 13, _LONG, 176, (0, 4), _q5_k),
        Packing("Q6_K", 14, _LONG, 210, (208, 210), _q6_k),
    )
}
