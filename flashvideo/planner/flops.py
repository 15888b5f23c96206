"""Floating-point operations of the networks, from their configuration and the size of the video.

Multiplications and additions of matrix products, attention and convolutions count one each, as in PyTorch's counter.
Norms, activations and rotations are left out; they take time but hardly any operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from ..config import TEXT_TOKENS, DiTConfig, T5Config, VAEConfig, latent_shape
from ..dit import dit_tokens
from ..vae.memory import TilePlan, passes, reaches
from ..vae.network import AREA, DOUBLED, LEVELS, MID_BLOCKS, TIME_LEVELS, VOLUME
from ..vae.tiles import Tile


@dataclass(frozen=True)
class Flops:
    """Operations by kind of work; on one device each kind has its own speed."""

    matmul: float = 0.0
    attention: float = 0.0
    convolution: float = 0.0

    @property
    def total(self) -> float:
        """Operations of all kinds."""
        return self.matmul + self.attention + self.convolution

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.matmul + other.matmul, self.attention + other.attention, self.convolution + other.convolution)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.matmul * times, self.attention * times, self.convolution * times)


def t5_flops(config: T5Config, tokens: int = TEXT_TOKENS) -> Flops:
    """One prompt of `tokens` through T5's encoder."""
    inner = config.d_kv * config.num_heads
    linear = 2 * tokens * (4 * config.d_model * inner + 3 * config.d_model * config.d_ff)
    attention = 4 * tokens**2 * inner
    return Flops(matmul=linear, attention=attention) * config.num_layers


def dit_flops(config: DiTConfig, shape: tuple[int, int, int], text_tokens: int = TEXT_TOKENS) -> Flops:
    """One evaluation of the diffusion transformer on one latent of `shape` (T, H, W)."""
    width, embed, patch = config.hidden_size, config.time_embed_dim, config.patch_size**2
    video = dit_tokens(config, shape)
    tokens = video + text_tokens
    sinusoids = 1 + config.degradation_embedding + config.frame_count_embedding
    once = (
        video * width * patch * (config.in_channels + config.out_channels)
        + text_tokens * config.text_dim * width
        + sinusoids * (width * embed + embed**2)
        + 2 * embed * width  # the last norm's shift and scale
    )
    layer = tokens * (4 * width**2 + 2 * width * config.ff_dim) + 2 * 6 * embed * width
    attention = 4 * tokens**2 * width
    return Flops(matmul=2 * (once + config.num_layers * layer), attention=config.num_layers * attention)


def encode_flops(config: VAEConfig, frames: int, height: int, width: int) -> Flops:
    """Encoding a video of 4n + 1 frames; height and width in pixels, multiples of 8."""
    channels = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
    total = VOLUME * config.image_channels * channels[0] * frames * height * width
    positions = 0
    before = channels[0]
    for level, after in enumerate(channels):
        positions = frames * height * width
        total += _stack(before, after, config.encoder_blocks, positions)
        if level < LEVELS - 1:
            frames = (frames + 1) // 2 if level < TIME_LEVELS else frames
            height, width = height // 2, width // 2
            total += AREA * after**2 * frames * height * width
        before = after
    total += _stack(before, before, MID_BLOCKS, positions)
    total += VOLUME * before * 2 * config.latent_channels * positions
    return Flops(convolution=2 * total)


def decode_flops(config: VAEConfig, frames: int, height: int, width: int) -> Flops:
    """Decoding to a video of 4n + 1 frames; height and width in pixels, multiples of 8."""
    channels = [config.base_channels * multiplier for multiplier in reversed(config.channel_multipliers)]
    frames, height, width = latent_shape((frames, height, width))
    latent = config.latent_channels * frames * height * width
    positions = frames * height * width
    before = channels[0]
    total = VOLUME * latent * before
    total += _stack(before, before, MID_BLOCKS, positions) + _norms(before, before, MID_BLOCKS, latent)
    for level, after in enumerate(channels):
        positions = frames * height * width
        total += _stack(before, after, config.decoder_blocks, positions)
        total += _norms(before, after, config.decoder_blocks, latent)
        if level < LEVELS - 1:
            total += DOUBLED * after**2 * frames * (height + 1) * (width + 1)  # before time is doubled
            height, width = height * 2, width * 2
            frames = 2 * frames - 1 if level < TIME_LEVELS else frames
        before = after
    total += 2 * latent * before + VOLUME * before * config.image_channels * positions
    return Flops(convolution=2 * total)


def tiling_factor(plan: TilePlan, latents: int, rows: int, columns: int) -> float:
    """Work of a plan of tiles relative to the untiled network, for a latent of that size.

    For each of its norms a group of units runs up to that norm, then once as a whole; and tiles overlap.
    """
    down, across = (Tile(0, rows, 0, 1).split(plan.side), Tile(0, 1, 0, columns).split(plan.side))
    work = untiled = 0.0
    for group in plan.groups:
        runs = passes(group) if len(down) * len(across) > 1 else [1] * len(group)
        for unit, reach, times in zip(group, reaches(group), runs, strict=True):
            # The tiles form a grid: the sum of their areas is that of their heights times that of their widths.
            height = sum(min(tile.bottom + reach, rows) - max(tile.top - reach, 0) for tile in down)
            width = sum(min(tile.right + reach, columns) - max(tile.left - reach, 0) for tile in across)
            cost = unit.work * unit.scale**2 * ((latents - 1) * unit.time + 1)
            untiled += cost
            work += cost * times * (height / rows) * (width / columns)
    return work / untiled


def _blocks(before: int, after: int, blocks: int) -> Iterator[tuple[int, int]]:
    """Channels into and out of each residual block of a stack."""
    return pairwise([before] + [after] * blocks)


def _stack(before: int, after: int, blocks: int, positions: int) -> int:
    """Multiplications of a stack of residual blocks."""
    return positions * sum(
        VOLUME * (wide_in * wide_out + wide_out**2) + (wide_in * wide_out if wide_in != wide_out else 0)
        for wide_in, wide_out in _blocks(before, after, blocks)
    )


def _norms(before: int, after: int, blocks: int, latent: int) -> int:
    """Multiplications of the decoder's norms with the latent (number of elements): a scale and a shift, twice."""
    return 2 * latent * sum(wide_in + wide_out for wide_in, wide_out in _blocks(before, after, blocks))
