"""The diffusion transformer that both stages share (FlashVideo section 3; the network is CogVideoX's).

Text and video tokens stand in one sequence, text first, and attend to each other without a mask. Each layer
modulates the two kinds with their own shifts, scales and gates. Stage II adds two embeddings to the timestep's:
how far its input was degraded, and how many latent frames there are. Parameter names are those of ComfyUI
core's CogVideoX.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DiTConfig
from .rope import rope_table, rotate

BLOCK_EPS = 1e-5  # norms of the residual stream
HEAD_EPS = 1e-6  # norms of queries and keys, and the last norm
SINUSOID_BASE = 10000.0

# attention(q, k, v, heads) on [B, heads, N, head_dim] -> [B, N, heads * head_dim]
Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]
# around_block(index, block, tokens) -> tokens: runs block(tokens), or something in its place
AroundBlock = Callable[[int, Callable[[Tensor], Tensor], Tensor], Tensor]


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """PyTorch's scaled dot product attention: [B, heads, N, head_dim] three times -> [B, N, heads * head_dim]."""
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
        patches = self.proj(latent.transpose(1, 2).flatten(0, 1))  # [B * T, hidden, H/2, W/2]
        video = patches.flatten(2).transpose(1, 2).reshape(batch, frames * patches[0, 0].numel(), -1)
        return torch.cat((self.text_proj(context), video), dim=1)


class Modulation(nn.Module):
    """LayerNorm, then shift and scale from the timestep's embedding, with separate numbers for text and video."""

    def __init__(self, config: DiTConfig, **factory: Any) -> None:
        super().__init__()
        operations = factory.pop("operations")
        self.linear = operations.Linear(config.time_embed_dim, 6 * config.hidden_size, **factory)
        self.norm = operations.LayerNorm(config.hidden_size, eps=BLOCK_EPS, **factory)

    def forward(self, tokens: Tensor, embedding: Tensor, text_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Modulated tokens [B, N, hidden], and the gates of video and of text, both [B, 1, hidden]."""
        numbers = self.linear(F.silu(embedding))[:, None].chunk(6, dim=-1)
        shift, scale, gate, text_shift, text_scale, text_gate = numbers
        text, video = self.norm(tokens).tensor_split((text_tokens,), dim=1)
        text = torch.addcmul(text_shift, text, 1 + text_scale)
        video = torch.addcmul(shift, video, 1 + scale)
        return torch.cat((text, video), dim=1), gate, text_gate


def add_gated(tokens: Tensor, update: Tensor, gate: Tensor, text_gate: Tensor, text_tokens: int) -> Tensor:
    """`tokens` + gate * `update`, text and video tokens with their own gate."""
    text, video = tokens.tensor_split((text_tokens,), dim=1)
    text_update, video_update = update.tensor_split((text_tokens,), dim=1)
    return torch.cat((text + text_gate * text_update, video + gate * video_update), dim=1)


class Block(nn.Module):
    """One transformer layer: joint attention over text and video, then a feed-forward network."""

    def __init__(self, config: DiTConfig, **factory: Any) -> None:
        super().__init__()
        operations = factory["operations"]
        layer = {name: value for name, value in factory.items() if name != "operations"}
        hidden, self.heads = config.hidden_size, config.num_heads
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
        self, tokens: Tensor, embedding: Tensor, rope: tuple[Tensor, Tensor], attention: Attention
    ) -> Tensor:
        """[B, N, hidden] -> [B, N, hidden]; the tokens that `rope` has no row for, the first ones, are text."""
        text_tokens = tokens.shape[1] - rope[0].shape[0]
        normed, gate, text_gate = self.norm1(tokens, embedding, text_tokens)
        q = self._turn(self.norm_q(self._heads(self.q(normed))), rope, text_tokens)
        k = self._turn(self.norm_k(self._heads(self.k(normed))), rope, text_tokens)
        v = self._heads(self.v(normed)).transpose(1, 2)
        attended = self.attn_out(attention(q, k, v, self.heads))
        tokens = add_gated(tokens, attended, gate, text_gate, text_tokens)

        normed, gate, text_gate = self.norm2(tokens, embedding, text_tokens)
        expanded = F.gelu(self.ff_proj(normed), approximate="tanh")
        return add_gated(tokens, self.ff_out(expanded), gate, text_gate, text_tokens)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))  # [B, N, heads, head_dim]

    @staticmethod
    def _turn(x: Tensor, rope: tuple[Tensor, Tensor], text_tokens: int) -> Tensor:
        text, video = x.tensor_split((text_tokens,), dim=1)
        return torch.cat((text, rotate(video, *rope)), dim=1).transpose(1, 2)  # [B, heads, N, head_dim]


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
        around_block: AroundBlock | None = None,
    ) -> Tensor:
        """Predict v (stage I) or the velocity (stage II).

        `latent` [B, C, T, H, W] in the model's scaled space, H and W even; `timestep` [B] in 0..1000, fractions
        allowed; `context` [B, L, text_dim]; `degradation_step` 0..999, needed by stage II and refused by stage I.
        Returns [B, out_channels, T, H, W]. Raises ValueError on any other shape.
        """
        self._check(latent, context, degradation_step)
        _, _, frames, height, width = latent.shape
        rows, columns = height // self.config.patch_size, width // self.config.patch_size
        embedding = self._embed(timestep, frames, degradation_step, latent.dtype)
        rope = rope_table(frames, rows, columns, self.config.head_dim, latent.device)
        tokens = self.patch_embed(latent, context)
        for index, block in enumerate(self.blocks):
            if around_block is None:
                tokens = block(tokens, embedding, rope, attention)
            else:
                tokens = around_block(index, lambda x, block=block: block(x, embedding, rope, attention), tokens)
        # Each token is normed by itself, so the text is dropped first.
        video = self.norm_final(tokens[:, context.shape[1] :])
        return self._unpatchify(self.proj_out(self.norm_out(video, embedding)), frames, rows, columns)

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
