"""The sequence of tokens in chunks, so that a layer's activations take memory for one chunk at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Without autograd a layer runs over the sequence in chunks of tokens, so that its activations take memory for keys,
# values and one chunk. A chunk's largest tensor has batch * tokens * ff_dim elements:
CHUNK_ELEMENTS = 2**26  # 8,738 tokens of stage II, enough to fill any card's matrix units
CHUNK_BYTES_CPU = 2**24  # of that tensor: enough rows for the matrix products' speed, and near the caches
CHUNK_MULTIPLE = 128  # tokens; attention kernels and matrix products work in such tiles


def may_overwrite() -> bool:
    """Whether temporaries and the residual stream may be overwritten: not with autograd; a compiler decides itself."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


class TokenChunk(NamedTuple):
    """A chunk of the sequence: its place, how many of its tokens (the first ones) are text, and its positions."""

    tokens: slice
    text_tokens: int
    rope: tuple[Tensor, Tensor]  # of its video tokens


def tokens_per_chunk(count: int, elements_per_token: int, itemsize: int, device: str) -> int:
    """Tokens in each of the equal chunks that `count` tokens are split into, at most `count`.

    `elements_per_token`: size of the widest activation per token, in elements of `itemsize` bytes. `device`: a device's
    type.
    """
    on_cpu, on_card = CHUNK_BYTES_CPU // (elements_per_token * itemsize), CHUNK_ELEMENTS // elements_per_token
    limit = max(1, on_cpu if device == "cpu" else on_card)
    return min(count, math.ceil(count / math.ceil(count / limit) / CHUNK_MULTIPLE) * CHUNK_MULTIPLE)


def token_chunks(tokens: Tensor, rope: tuple[Tensor, Tensor], ff_dim: int) -> list[TokenChunk]:
    """Split a sequence [B, N, hidden] into chunks of equal size; with autograd, into one."""
    batch, count = tokens.shape[:2]
    text_tokens = count - rope[0].shape[0]
    if not may_overwrite():
        return [TokenChunk(slice(None), text_tokens, rope)]
    step = tokens_per_chunk(count, batch * ff_dim, tokens.element_size(), tokens.device.type)
    chunks = []
    for start in range(0, count, step):
        stop = min(start + step, count)
        text_here = min(max(text_tokens - start, 0), stop - start)
        video = slice(start + text_here - text_tokens, stop - text_tokens) if text_here < stop - start else slice(0)
        chunks.append(TokenChunk(slice(start, stop), text_here, (rope[0][video], rope[1][video])))
    return chunks


def split_text(tokens: Tensor, text_tokens: int) -> tuple[Tensor, Tensor]:
    """Views of the text tokens and of the video tokens of [B, N, ...]."""
    return tokens[:, :text_tokens], tokens[:, text_tokens:]
