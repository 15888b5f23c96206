"""The diffusion transformer that both stages share (FlashVideo section 3; the network is CogVideoX's).

Text and video tokens stand in one sequence, text first, and attend to each other without a mask. Each layer
modulates the two kinds with their own shifts, scales and gates. Stage II adds two embeddings to the timestep's:
how far its input was degraded, and how many latent frames there are. Parameter names are those of ComfyUI
core's CogVideoX.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DiTConfig
from .rope import rope_table, rotate, rotate_

BLOCK_EPS = 1e-5  # norms of the residual stream
HEAD_EPS = 1e-6  # norms of queries and keys, and the last norm
SINUSOID_BASE = 10000.0

# Without autograd a layer goes over the sequence in pieces, so that its activations take memory for keys, values and
# one piece. A piece's largest tensor has batch * tokens * ff_dim elements:
PIECE_ELEMENTS = 2**26  # 8,738 tokens of stage II, enough to fill any card's matrix units
PIECE_BYTES_CPU = 2**24  # of that tensor: enough rows for the matrix products' speed, and near the caches
PIECE_MULTIPLE = 128  # tokens; attention kernels and matrix products work in such tiles

# attention(q, k, v, heads, start) on [B, heads, n, head_dim] and twice [B, heads, N, head_dim] -> [B, n, heads *
# head_dim]; the queries may be a piece of the sequence, whose first token is number `start`.
Attention = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]
# around_block(index, block, tokens) -> tokens: runs block(tokens), or something in its place. Without autograd
# block(tokens) overwrites its argument.
AroundBlock = Callable[[int, Callable[[Tensor], Tensor], Tensor], Tensor]


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int, start: int = 0) -> Tensor:
    """PyTorch's scaled dot product attention: [B, heads, n or N, head_dim] -> [B, n, heads * head_dim].

    It is exact and so the same wherever the queries `start`.
    """
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


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
        patches = self.proj(latent.transpose(1, 2).flatten(0, 1)).flatten(2)  # [B * T, hidden, H/2 * W/2]
        tokens = text.new_empty(batch, text.shape[1] + frames * patches.shape[2], text.shape[2])
        tokens[:, : text.shape[1]] = text
        tokens[:, text.shape[1] :].unflatten(1, (frames, -1))[:] = patches.transpose(1, 2).unflatten(0, (batch, frames))
        return tokens


def may_overwrite() -> bool:
    """Whether temporaries and the residual stream may be overwritten: autograd would need them; a compiler knows."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


class Stretch(NamedTuple):
    """A piece of the sequence: where it stands, how many of its tokens, the first ones, are text, and its positions."""

    tokens: slice
    text: int
    rope: tuple[Tensor, Tensor]  # of its video tokens


def dit_tokens(config: DiTConfig, shape: tuple[int, int, int]) -> int:
    """Video tokens of a latent of `shape` (T, H, W)."""
    frames, rows, columns = shape
    return frames * (rows // config.patch_size) * (columns // config.patch_size)


def piece_tokens(count: int, row: int, itemsize: int, device: str) -> int:
    """Tokens of each of the equal pieces that `count` tokens are cut into, at most `count`.

    `row` is how many elements of `itemsize` bytes their largest tensor has a token, `device` a device's type.
    """
    limit = max(1, PIECE_BYTES_CPU // (row * itemsize) if device == "cpu" else PIECE_ELEMENTS // row)
    return min(count, math.ceil(count / math.ceil(count / limit) / PIECE_MULTIPLE) * PIECE_MULTIPLE)


def stretches(tokens: Tensor, rope: tuple[Tensor, Tensor], expanded: int) -> list[Stretch]:
    """Cut a sequence [B, N, hidden] into pieces of equal size. `expanded` is the feed-forward network's width."""
    batch, count = tokens.shape[:2]
    text = count - rope[0].shape[0]
    if not may_overwrite():
        return [Stretch(slice(None), text, rope)]
    step = piece_tokens(count, batch * expanded, tokens.element_size(), tokens.device.type)
    cut = []
    for start in range(0, count, step):
        stop = min(start + step, count)
        text_here = min(max(text - start, 0), stop - start)
        turned = slice(start + text_here - text, stop - text) if text_here < stop - start else slice(0)
        cut.append(Stretch(slice(start, stop), text_here, (rope[0][turned], rope[1][turned])))
    return cut


class Modulators(NamedTuple):
    """What the timestep makes of half a layer, for text and for video: each number is [B, 1, hidden]."""

    shift: tuple[Tensor, Tensor]
    scale: tuple[Tensor, Tensor]
    gate: tuple[Tensor, Tensor]


def by_kind(tokens: Tensor, text: int) -> tuple[Tensor, Tensor]:
    """Views of the text tokens and of the video tokens of [B, N, ...]."""
    return tokens[:, :text], tokens[:, text:]


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

    def forward(self, tokens: Tensor, numbers: Modulators, text: int) -> Tensor:
        """[B, N, hidden], of which `text` tokens are text -> the same, normed and modulated."""
        normed = self.norm(tokens)
        kinds = list(zip(numbers.shift, by_kind(normed, text), numbers.scale, strict=True))
        if not may_overwrite():
            return torch.cat([torch.addcmul(shift, x, scale) for shift, x, scale in kinds], dim=1)
        for shift, x, scale in kinds:
            torch.addcmul(shift, x, scale, out=x)
        return normed


def add_gated(tokens: Tensor, update: Tensor, numbers: Modulators, text: int) -> Tensor:
    """`tokens` + gate * `update`, text and video tokens with their own gate; in place where that is allowed."""
    kinds = list(zip(by_kind(tokens, text), numbers.gate, by_kind(update, text), strict=True))
    if not may_overwrite():
        return torch.cat([torch.addcmul(x, gate, change) for x, gate, change in kinds], dim=1)
    for x, gate, change in kinds:
        x.addcmul_(gate, change)
    return tokens


def activate(expanded: Tensor) -> Tensor:
    """GELU (tanh form) of a temporary, in place where that is allowed."""
    return (torch.ops.aten.gelu_ if may_overwrite() else F.gelu)(expanded, approximate="tanh")


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

    def forward(self, tokens: Tensor, embedding: Tensor, rope: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        """[B, N, hidden] -> [B, N, hidden]; the tokens that `rope` has no row for, the first ones, are text.

        Without autograd the result overwrites `tokens`.
        """
        first, second = self.norm1.modulators(embedding), self.norm2.modulators(embedding)
        pieces = stretches(tokens, rope, self.ff_dim)
        if len(pieces) == 1:
            piece = pieces[0]
            normed = self.norm1(tokens, first, piece.text)
            k, v = self._keys(normed, piece), self._heads(self.v(normed))
            return self._advance(tokens, self._attend(normed, k, v, piece, attention), first, second, piece)

        # Keys and values of the whole sequence stand before the first token changes; then each piece runs through
        # the rest of the layer by itself.
        k, v = self._heads(torch.empty_like(tokens)), self._heads(torch.empty_like(tokens))
        for piece in pieces:
            normed = self.norm1(tokens[:, piece.tokens], first, piece.text)
            k[:, piece.tokens], v[:, piece.tokens] = self._keys(normed, piece), self._heads(self.v(normed))
        for piece in pieces:
            normed = self.norm1(tokens[:, piece.tokens], first, piece.text)
            attended = self._attend(normed, k, v, piece, attention)
            self._advance(tokens[:, piece.tokens], attended, first, second, piece)
        return tokens

    def _attend(self, normed: Tensor, k: Tensor, v: Tensor, piece: Stretch, attention: Attention) -> Tensor:
        """Attention of a piece's tokens [B, n, hidden] to keys and values [B, N, heads, head_dim]: [B, n, hidden]."""
        q = self._turn(self.norm_q(self._heads(self.q(normed))), piece)
        start = piece.tokens.start or 0
        return self.attn_out(attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.heads, start))

    def _advance(
        self, tokens: Tensor, attended: Tensor, first: Modulators, second: Modulators, piece: Stretch
    ) -> Tensor:
        """Add attention's result, then the feed-forward network's."""
        tokens = add_gated(tokens, attended, first, piece.text)
        expanded = activate(self.ff_proj(self.norm2(tokens, second, piece.text)))
        return add_gated(tokens, self.ff_out(expanded), second, piece.text)

    def _keys(self, normed: Tensor, piece: Stretch) -> Tensor:
        return self._turn(self.norm_k(self._heads(self.k(normed))), piece)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))  # [B, N, heads, head_dim]

    @staticmethod
    def _turn(x: Tensor, piece: Stretch) -> Tensor:
        text, video = by_kind(x, piece.text)
        if not may_overwrite():
            return torch.cat((text, rotate(video, *piece.rope)), dim=1)
        rotate_(video, *piece.rope)
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
    ) -> Tensor:
        """Predict v (stage I) or the velocity (stage II).

        `latent` [B, C, T, H, W] in the model's scaled space, H and W even; `timestep` [B] in 0..1000, fractions
        allowed; `context` [B, L, text_dim]; `degradation_step` 0..999, needed by stage II and refused by stage I.
        `order` [T * H/2 * W/2] numbers the patches as the layers shall see them, for an `attention` that goes by their
        places; else they stand by frame, row and column. Returns [B, out_channels, T, H, W]. Raises ValueError on any
        other shape.
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
        for index, block in enumerate(self.blocks):
            if around_block is None:
                tokens = block(tokens, embedding, rope, attention)
            else:
                tokens = around_block(index, lambda x, block=block: block(x, embedding, rope, attention), tokens)
        # Each token is normed by itself, so the text is dropped first.
        video = tokens[:, context.shape[1] :]
        patches = [
            self.proj_out(self.norm_out(self.norm_final(video[:, piece.tokens]), embedding))
            for piece in stretches(video, rope, self.config.ff_dim)
        ]
        patches = torch.cat(patches, dim=1)
        if order is not None:
            patches = patches[:, order.argsort()]
        return self._unpatchify(patches, frames, rows, columns)

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

    def _unpatchify(self, patches: Tensor, frames: int, rows: int, columns: int) -> Tensor:
        size, batch = self.config.patch_size, patches.shape[0]
        patches = patches.view(batch, frames, rows, columns, self.config.out_channels, size, size)
        return patches.permute(0, 4, 1, 2, 5, 3, 6).reshape(batch, -1, frames, rows * size, columns * size)
