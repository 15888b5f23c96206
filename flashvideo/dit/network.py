"""The diffusion transformer that both stages share (FlashVideo section 3; the network is CogVideoX's).

Text and video tokens form one sequence, text first, and attend to each other without a mask. Each layer modulates the
two kinds with their own shifts, scales and gates. Stage II adds two embeddings to the timestep's: the degradation step
of its input, and the number of latent frames. Parameter names are those of ComfyUI core's CogVideoX.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import DiTConfig
from ..parallel import Ranks, SequencePiece, sequence_piece
from .rope import rope_table, rotate, rotate_
from .token_chunks import TokenChunk, may_overwrite, split_text, token_chunks

BLOCK_EPS = 1e-5  # norms of the residual stream
HEAD_EPS = 1e-6  # norms of queries and keys, and the last norm
SINUSOID_BASE = 10000.0

# attention(q, k, v, heads, start) on [B, heads, n, head_dim] and twice [B, heads, N, head_dim] -> [B, n, heads *
# head_dim]; the queries may be a chunk of the sequence, whose first token is number `start`.
Attention = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]
# around_block(index, block, tokens) -> tokens: runs block(tokens), or something in its place. Without autograd
# block(tokens) overwrites its argument.
AroundBlock = Callable[[int, Callable[[Tensor], Tensor], Tensor], Tensor]
# Keys or values of all tokens, once they are needed: other ranks' may still be on their way.
Pending = Callable[[], Tensor]


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int, start: int = 0) -> Tensor:
    """PyTorch's scaled dot product attention: [B, heads, n or N, head_dim] -> [B, n, heads * head_dim].

    It is exact and so the same wherever the queries `start`.
    """
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n width -> b n (heads width)")


def sinusoid(values: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of [B] numbers, cosines first: [B, width] in float32."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    angles = values.float()[:, None] * torch.exp(-math.log(SINUSOID_BASE) / half * steps)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class SinusoidEmbedding(nn.Module):
    """A number -> its sinusoid -> two linear layers. Stage II has one for degradation and one for frame count."""

    def __init__(self, config: DiTConfig, **factory: Any) -> None:
        super().__init__()
        operations = factory.pop("operations")
        self.width = config.hidden_size
        self.linear_1 = operations.Linear(config.hidden_size, config.time_embed_dim, **factory)
        self.linear_2 = operations.Linear(config.time_embed_dim, config.time_embed_dim, **factory)

    def forward(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """[B] -> [B, time_embed_dim]."""
        return self.linear_2(F.silu(self.linear_1(sinusoid(values, self.width).to(dtype))))


class PatchEmbed(nn.Module):
    """Latent patches and text vectors to one sequence of tokens, text first."""

    def __init__(self, config: DiTConfig, **factory: Any) -> None:
        super().__init__()
        operations = factory.pop("operations")
        patch = config.patch_size
        self.proj = operations.Conv2d(config.in_channels, config.hidden_size, patch, stride=patch, **factory)
        self.text_proj = operations.Linear(config.text_dim, config.hidden_size, **factory)

    def forward(self, latent: Tensor, context: Tensor) -> Tensor:
        """[B, C, T, H, W] and [B, L, text_dim] -> [B, L + T * H/2 * W/2, hidden]."""
        batch, frames = latent.shape[0], latent.shape[2]
        text = self.text_proj(context)
        patches = self.proj(rearrange(latent, "b c t h w -> (b t) c h w"))  # [B * T, hidden, H/2, W/2]
        patches = rearrange(patches, "(b t) c h w -> b t (h w) c", b=batch)
        tokens = text.new_empty(batch, text.shape[1] + frames * patches.shape[2], text.shape[2])
        tokens[:, : text.shape[1]] = text
        # Both sides are views: the patches are copied once.
        rearrange(tokens[:, text.shape[1] :], "b (t n) c -> b t n c", t=frames).copy_(patches)
        return tokens


def dit_tokens(config: DiTConfig, shape: tuple[int, int, int]) -> int:
    """Video tokens of a latent of `shape` (T, H, W)."""
    frames, rows, columns = shape
    return frames * (rows // config.patch_size) * (columns // config.patch_size)


class Modulators(NamedTuple):
    """Shift, scale and gate of half a layer, from the timestep; for text and for video, each [B, 1, hidden]."""

    shift: tuple[Tensor, Tensor]
    scale: tuple[Tensor, Tensor]
    gate: tuple[Tensor, Tensor]


class Modulation(nn.Module):
    """LayerNorm, then shift and scale from the timestep's embedding, with separate numbers for text and video."""

    def __init__(self, config: DiTConfig, **factory: Any) -> None:
        super().__init__()
        operations = factory.pop("operations")
        self.linear = operations.Linear(config.time_embed_dim, 6 * config.hidden_size, **factory)
        self.norm = operations.LayerNorm(config.hidden_size, eps=BLOCK_EPS, **factory)

    def modulators(self, embedding: Tensor) -> Modulators:
        """Numbers for an embedding [B, time_embed_dim]."""
        numbers = self.linear(F.silu(embedding))[:, None].chunk(6, dim=-1)
        shift, scale, gate, text_shift, text_scale, text_gate = numbers
        return Modulators((text_shift, shift), (1 + text_scale, 1 + scale), (text_gate, gate))

    def forward(self, tokens: Tensor, numbers: Modulators, text_tokens: int) -> Tensor:
        """[B, N, hidden], of which the first `text_tokens` are text -> the same, normed and modulated."""
        normed = self.norm(tokens)
        kinds = list(zip(numbers.shift, split_text(normed, text_tokens), numbers.scale, strict=True))
        if not may_overwrite():
            return torch.cat([torch.addcmul(shift, x, scale) for shift, x, scale in kinds], dim=1)
        for shift, x, scale in kinds:
            torch.addcmul(shift, x, scale, out=x)
        return normed


def gated_residual(tokens: Tensor, update: Tensor, numbers: Modulators, text_tokens: int) -> Tensor:
    """`tokens` + gate * `update`, text and video tokens with their own gate; in place where that is allowed."""
    kinds = list(zip(split_text(tokens, text_tokens), numbers.gate, split_text(update, text_tokens), strict=True))
    if not may_overwrite():
        return torch.cat([torch.addcmul(x, gate, change) for x, gate, change in kinds], dim=1)
    for x, gate, change in kinds:
        x.addcmul_(gate, change)
    return tokens


def activate(expanded: Tensor) -> Tensor:
    """GELU (tanh form) of a temporary, in place where that is allowed."""
    return (torch.ops.aten.gelu_ if may_overwrite() else F.gelu)(expanded, approximate="tanh")


def _own(x: Tensor) -> Pending:
    return lambda: x


class Block(nn.Module):
    """One transformer layer: joint attention over text and video, then a feed-forward network."""

    def __init__(self, config: DiTConfig, **factory: Any) -> None:
        super().__init__()
        operations = factory["operations"]
        layer = {name: value for name, value in factory.items() if name != "operations"}
        hidden, self.heads, self.ff_dim = config.hidden_size, config.num_heads, config.ff_dim
        self.norm1 = Modulation(config, **factory)
        self.q = operations.Linear(hidden, hidden, **layer)
        self.k = operations.Linear(hidden, hidden, **layer)
        self.v = operations.Linear(hidden, hidden, **layer)
        self.norm_q = operations.LayerNorm(config.head_dim, eps=HEAD_EPS, **layer)
        self.norm_k = operations.LayerNorm(config.head_dim, eps=HEAD_EPS, **layer)
        self.attn_out = operations.Linear(hidden, hidden, **layer)
        self.norm2 = Modulation(config, **factory)
        self.ff_proj = operations.Linear(hidden, config.ff_dim, **layer)
        self.ff_out = operations.Linear(config.ff_dim, hidden, **layer)

    def forward(
        self,
        tokens: Tensor,
        embedding: Tensor,
        rope: tuple[Tensor, Tensor],
        attention: Attention,
        piece: SequencePiece | None = None,
    ) -> Tensor:
        """[B, N, hidden] -> [B, N, hidden]; the tokens that `rope` has no row for, the first ones, are text.

        Without autograd the result overwrites `tokens`. If they are this rank's `piece` of a longer sequence, they
        attend to the other ranks' keys and values as well.
        """
        first, second = self.norm1.modulators(embedding), self.norm2.modulators(embedding)
        chunks = token_chunks(tokens, rope, self.ff_dim)
        share, start = (_own, 0) if piece is None else (piece.gather, piece.start)
        if len(chunks) == 1:
            chunk = chunks[0]
            normed = self.norm1(tokens, first, chunk.text_tokens)
            k, v = share(self._keys(normed, chunk)), share(self._heads(self.v(normed)))
            attended = self._attend(normed, (k, v), chunk, attention, start)
            return self._finish_layer(tokens, attended, first, second, chunk)

        # Keys and values of the whole sequence are made before the first token changes; then each chunk runs through
        # the rest of the layer by itself.
        k, v = self._heads(torch.empty_like(tokens)), self._heads(torch.empty_like(tokens))
        for chunk in chunks:
            normed = self.norm1(tokens[:, chunk.tokens], first, chunk.text_tokens)
            k[:, chunk.tokens], v[:, chunk.tokens] = self._keys(normed, chunk), self._heads(self.v(normed))
        shared = share(k), share(v)
        for chunk in chunks:
            normed = self.norm1(tokens[:, chunk.tokens], first, chunk.text_tokens)
            attended = self._attend(normed, shared, chunk, attention, start + chunk.tokens.start)
            self._finish_layer(tokens[:, chunk.tokens], attended, first, second, chunk)
        return tokens

    def _attend(
        self, normed: Tensor, shared: tuple[Pending, Pending], chunk: TokenChunk, attention: Attention, start: int
    ) -> Tensor:
        """Attention of a chunk's tokens [B, n, hidden] to keys and values [B, N, heads, head_dim]: [B, n, hidden]."""
        q = self._apply_rope(self.norm_q(self._heads(self.q(normed))), chunk)
        q, k, v = (rearrange(each, "b n heads width -> b heads n width") for each in (q, *(get() for get in shared)))
        return self.attn_out(attention(q, k, v, self.heads, start))

    def _finish_layer(
        self, tokens: Tensor, attended: Tensor, first: Modulators, second: Modulators, chunk: TokenChunk
    ) -> Tensor:
        """Add attention's result, then the feed-forward network's."""
        tokens = gated_residual(tokens, attended, first, chunk.text_tokens)
        expanded = activate(self.ff_proj(self.norm2(tokens, second, chunk.text_tokens)))
        return gated_residual(tokens, self.ff_out(expanded), second, chunk.text_tokens)

    def _keys(self, normed: Tensor, chunk: TokenChunk) -> Tensor:
        return self._apply_rope(self.norm_k(self._heads(self.k(normed))), chunk)

    def _heads(self, x: Tensor) -> Tensor:
        """A view of [B, N, hidden] as [B, N, heads, head_dim]."""
        return rearrange(x, "b n (heads width) -> b n heads width", heads=self.heads)

    @staticmethod
    def _apply_rope(x: Tensor, chunk: TokenChunk) -> Tensor:
        text, video = split_text(x, chunk.text_tokens)
        if not may_overwrite():
            return torch.cat((text, rotate(video, *chunk.rope)), dim=1)
        rotate_(video, *chunk.rope)
        return x


class FinalModulation(nn.Module):
    """The last norm, shifted and scaled by the timestep's embedding; video tokens only."""

    def __init__(self, config: DiTConfig, **factory: Any) -> None:
        super().__init__()
        operations = factory.pop("operations")
        self.linear = operations.Linear(config.time_embed_dim, 2 * config.hidden_size, **factory)
        self.norm = operations.LayerNorm(config.hidden_size, eps=HEAD_EPS, **factory)

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """[B, N, hidden] -> [B, N, hidden]."""
        shift, scale = self.linear(F.silu(embedding))[:, None].chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm(tokens), 1 + scale)


class FlashVideoDiT(nn.Module):
    """The denoiser of stage I (predicts v) and of stage II (predicts the flow's velocity).

    `operations` names the module that layers come from, `torch.nn` or ComfyUI's; weights are left as its layers
    make them.
    """

    def __init__(
        self,
        config: DiTConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        operations: Any = None,
    ) -> None:
        super().__init__()
        if config.hidden_size % config.num_heads:
            raise ValueError(
                f"hidden size {config.hidden_size} must be a multiple of the number of heads, {config.num_heads}"
            )
        self.config = config
        operations = operations or nn
        layer = {"device": device, "dtype": dtype}
        factory = {**layer, "operations": operations}
        width, patch_area = config.time_embed_dim, config.patch_size**2
        self.patch_embed = PatchEmbed(config, **factory)
        self.time_embedding_linear_1 = operations.Linear(config.hidden_size, width, **layer)
        self.time_embedding_linear_2 = operations.Linear(width, width, **layer)
        self.degradation_embedding = SinusoidEmbedding(config, **factory) if config.degradation_embedding else None
        self.frame_count_embedding = SinusoidEmbedding(config, **factory) if config.frame_count_embedding else None
        self.blocks = nn.ModuleList(Block(config, **factory) for _ in range(config.num_layers))
        self.norm_final = operations.LayerNorm(config.hidden_size, eps=BLOCK_EPS, **layer)
        self.norm_out = FinalModulation(config, **factory)
        self.proj_out = operations.Linear(config.hidden_size, patch_area * config.out_channels, **layer)

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        context: Tensor,
        *,
        degradation_step: float | Tensor | None = None,
        attention: Attention = attention_sdpa,
        order: Tensor | None = None,
        around_block: AroundBlock | None = None,
        ranks: Ranks | None = None,
    ) -> Tensor:
        """Predict v (stage I) or the velocity (stage II).

        `latent` [B, C, T, H, W] in the model's scaled space, H and W even; `timestep` [B] in 0..1000, fractions
        allowed; `context` [B, L, text_dim]; `degradation_step` 0..999, needed by stage II and refused by stage I.
        `order` [T * H/2 * W/2] numbers the patches in the order in which the layers see them, for an `attention` that
        depends on their places; the default order is frame, row, column. With `ranks` each of them computes one piece
        of the sequence, all give the same arguments, and all get the whole result; without autograd only. Returns
        [B, out_channels, T, H, W]. Raises ValueError on any other shape.
        """
        self._check(latent, context, degradation_step)
        _, _, frames, height, width = latent.shape
        rows, columns = height // self.config.patch_size, width // self.config.patch_size
        embedding = self._embed(timestep, frames, degradation_step, latent.dtype)
        rope = self.rope(frames, rows, columns, latent.device)
        tokens = self.patch_embed(latent, context)
        if order is not None:
            rope = (rope[0][order], rope[1][order])
            tokens = torch.cat((tokens[:, : context.shape[1]], tokens[:, context.shape[1] :][:, order]), dim=1)
        piece = None if ranks is None else sequence_piece(ranks, context.shape[1], rope[0].shape[0])
        if piece is not None:
            tokens, rope = piece.cut(tokens, rope)
        for index, block in enumerate(self.blocks):
            if around_block is None:
                tokens = block(tokens, embedding, rope, attention, piece)
            else:
                tokens = around_block(index, lambda x, block=block: block(x, embedding, rope, attention, piece), tokens)
        # Each token is normed by itself, so the text is dropped first.
        video = tokens[:, tokens.shape[1] - rope[0].shape[0] :]
        patches = [
            self.proj_out(self.norm_out(self.norm_final(video[:, chunk.tokens]), embedding))
            for chunk in token_chunks(video, rope, self.config.ff_dim)
        ]
        patches = torch.cat(patches, dim=1)
        if piece is not None:
            patches = piece.gather_video(patches)
        if order is not None:
            patches = patches[:, order.argsort()]
        return self._unpatchify(patches, frames, rows)

    def rope(self, frames: int, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the video tokens' positions; a variant with other positions overrides this."""
        return rope_table(frames, rows, columns, self.config.head_dim, device)

    def _check(self, latent: Tensor, context: Tensor, degradation_step: float | Tensor | None) -> None:
        config = self.config
        if latent.ndim != 5 or latent.shape[1] != config.in_channels:
            raise ValueError(f"latent must be [B, {config.in_channels}, T, H, W]; got {list(latent.shape)}")
        if latent.shape[3] % config.patch_size or latent.shape[4] % config.patch_size:
            raise ValueError(
                f"latent height and width must be multiples of {config.patch_size} (videos of 16 pixels); "
                f"got {latent.shape[3]}x{latent.shape[4]}"
            )
        if context.ndim != 3 or context.shape[2] != config.text_dim:
            raise ValueError(f"text must be [B, tokens, {config.text_dim}]; got {list(context.shape)}")
        if (degradation_step is None) == config.degradation_embedding:
            raise ValueError(
                "stage II needs the degradation step of its latent"
                if config.degradation_embedding
                else "stage I takes no degradation step; this is the draft model, not the refiner"
            )

    def _embed(
        self, timestep: Tensor, frames: int, degradation_step: float | Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        wave = sinusoid(timestep, self.config.hidden_size).to(dtype)
        embedding = self.time_embedding_linear_2(F.silu(self.time_embedding_linear_1(wave)))
        if self.frame_count_embedding is not None:
            embedding = embedding + self.frame_count_embedding(torch.full_like(timestep, frames), dtype)
        if self.degradation_embedding is not None:
            step = torch.as_tensor(degradation_step, dtype=torch.float32, device=timestep.device)
            embedding = embedding + self.degradation_embedding(step.expand(timestep.shape), dtype)
        return embedding  # [B, time_embed_dim]

    def _unpatchify(self, patches: Tensor, frames: int, rows: int) -> Tensor:
        """[B, T * rows * columns, C * patch area] -> [B, C, T, H, W]."""
        size = self.config.patch_size
        shape = {"t": frames, "h": rows, "p": size, "q": size}
        return rearrange(patches, "b (t h w) (c p q) -> b c t (h p) (w q)", **shape)
