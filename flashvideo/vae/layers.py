"""Layers of the causal 3D VAE: convolutions that look back in time, the norms, residual blocks and resampling.

The VAE is CogVideoX's (arXiv 2408.06072, section 2.1). Tensors are [B, C, T, H, W] throughout. A video may pass
through in chunks of time; what one chunk leaves for the next travels in a `ChunkContext`, never on a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from .moments import by_moments, overruns

NORM_EPS = 1e-6
KERNEL_SIZE = 3  # of every convolution that mixes positions, in time and in space
# A convolution bigger than this runs a few frames at a time: kernels count elements in 32 bits, and the padded copy
# of a whole 1080p chunk would not fit beside the chunk itself.
WINDOW_ELEMENTS = 2**29
# PyTorch (2.4 to 2.13 at least) gives a convolution on the CPU to oneDNN only if the batch is larger than 1 or
# channels x frames x rows is larger than this.
SMALL_ELEMENTS = 20480


class Statistics(NamedTuple):
    """Mean and (biased) variance of each norm group, both [B, groups] in float32."""

    mean: Tensor
    variance: Tensor


@dataclass
class ChunkContext:
    """What the chunks of one encode or decode share; a local of that call.

    `first`: the chunk starts the video. `last`: no chunk follows. `statistics(norm layer, its input)`, if given, gives
    the statistics to normalise by, so that spatial tiles share those of the whole picture; without it every norm
    measures its own input. `past`: the frames that each layer keeps for the next chunk.
    """

    first: bool = True
    last: bool = False
    statistics: Callable[[nn.Module, Tensor], Statistics] | None = None
    past: dict[nn.Module, Tensor] = field(default_factory=dict)

    def look_back(self, layer: nn.Module, x: Tensor, frames: int) -> Tensor:
        """Return the `frames` frames before x [B, C, T, H, W] and keep x's last ones for the next chunk.

        Before a video's first frame they are copies of it.
        """
        before = self.past.pop(layer, None)
        if before is None:
            before = x[:, :, :1].expand(-1, -1, frames, -1, -1)
        if not self.last:
            # A copy, so that a view of two frames doesn't hold the whole chunk in memory.
            self.past[layer] = torch.cat((before[:, :, x.shape[2] :], x[:, :, -frames:]), dim=2)
        return before


@dataclass(frozen=True)
class LayerFactory:
    """Builds every layer that has weights, from `operations` (torch.nn or anything with the same layers)."""

    operations: ModuleType | type
    device: torch.device | str | None
    dtype: torch.dtype | None
    norm_groups: int
    latent_channels: int | None = None  # given in the decoder, whose norms look at the latent

    def conv3d(self, in_channels: int, out_channels: int, kernel_size: int) -> nn.Module:
        """Build a convolution that pads space but not time."""
        padding = (0, kernel_size // 2, kernel_size // 2)
        return self.operations.Conv3d(
            in_channels, out_channels, kernel_size, padding=padding, device=self.device, dtype=self.dtype
        )

    def conv2d(self, channels: int, *, stride: int, padding: int) -> nn.Module:
        """Build a convolution of single frames."""
        return self.operations.Conv2d(
            channels, channels, KERNEL_SIZE, stride=stride, padding=padding, device=self.device, dtype=self.dtype
        )

    def group_norm(self, channels: int) -> nn.Module:
        """Build a GroupNorm with weight and bias."""
        if channels % self.norm_groups:
            raise ValueError(f"VAE channels must divide by the norm groups; got {channels} and {self.norm_groups}.")
        return self.operations.GroupNorm(self.norm_groups, channels, eps=NORM_EPS, device=self.device, dtype=self.dtype)

    def norm(self, channels: int) -> nn.Module:
        """Build the norm of this side of the VAE: plain in the encoder, latent-conditioned in the decoder."""
        return self.group_norm(channels) if self.latent_channels is None else SpatialNorm(channels, self)


def _free(*tensors: Tensor) -> bool:
    """Whether these temporaries may be overwritten: autograd doesn't need them."""
    return not any(tensor.requires_grad for tensor in tensors)


def activate(x: Tensor) -> Tensor:
    """SiLU of a temporary, in place where autograd allows."""
    return functional.silu(x, inplace=_free(x))


def time_windows(x: Tensor, scale: int = 1) -> Iterator[tuple[int, int]]:
    """Split x's frames so that `scale` times a window stays near WINDOW_ELEMENTS; yields (start, stop)."""
    frames = x.shape[2]
    step = max(1, WINDOW_ELEMENTS * frames // (x.numel() * scale))
    for start in range(0, frames, step):
        yield start, min(start + step, frames)


def _is_slow(x: Tensor) -> bool:
    """Whether PyTorch would run a 3D convolution of x without oneDNN, several times slower."""
    return x.device.type == "cpu" and x.shape[0] == 1 and x.shape[1:4].numel() <= SMALL_ELEMENTS


def _halved(conv: nn.Module, x: Tensor, lead: int) -> Tensor:
    """Run a Conv3d over one clip as a batch of two halves of its time; their overlap is computed twice."""
    frames = x.shape[2] - lead
    half = (frames + 1) // 2
    first, second = conv(torch.cat((x[:, :, : half + lead], x[:, :, frames - half :]))).unbind()
    return torch.cat((first, second[:, 2 * half - frames :]), dim=1)[None]


def _run(conv: nn.Module, window: Tensor, lead: int) -> Tensor:
    """Run a Conv3d over a window whose first `lead` frames are the ones before it."""
    if overruns(conv, window):
        return by_moments(conv, window)
    return _halved(conv, window, lead) if _is_slow(window) else conv(window)


def convolve(conv: nn.Module, x: Tensor, before: Tensor | None = None) -> Tensor:
    """Run a Conv3d over x [B, C, T, H, W] with the frames `before` it, one window of time after another."""
    lead = 0 if before is None else before.shape[2]
    out = None
    for start, stop in time_windows(x):
        window = x[:, :, max(0, start - lead) : stop]
        if start < lead:
            window = torch.cat((before[:, :, start:], window), dim=2)
        piece = _run(conv, window, lead)
        if piece.shape[2] == x.shape[2]:
            return piece
        if out is None:
            out = piece.new_empty((*piece.shape[:2], x.shape[2], *piece.shape[3:]))
        out[:, :, start:stop] = piece
    return out


class CausalConv3d(nn.Module):
    """3D convolution that sees the frames before, never those after; zero padding in space."""

    def __init__(self, in_channels: int, out_channels: int, make: LayerFactory, kernel_size: int = KERNEL_SIZE) -> None:
        super().__init__()
        self.lead = kernel_size - 1
        self.conv = make.conv3d(in_channels, out_channels, kernel_size)

    def forward(self, x: Tensor, context: ChunkContext) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T, H, W]."""
        return convolve(self.conv, x, context.look_back(self, x, self.lead) if self.lead else None)


def group_statistics(x: Tensor, groups: int) -> Statistics:
    """The statistics by which GroupNorm would normalise x [B, C, T, H, W]."""
    means, variances, weights = [], [], []
    for start, stop in time_windows(x):
        window = rearrange(x[:, :, start:stop].float(), "b (groups c) t h w -> b groups (c t h w)", groups=groups)
        variance, mean = torch.var_mean(window, dim=-1, correction=0)
        means.append(mean)
        variances.append(variance)
        weights.append((stop - start) / x.shape[2])
    weight = torch.tensor(weights, device=x.device)
    means, variances = torch.stack(means, dim=-1), torch.stack(variances, dim=-1)  # [B, groups, windows]
    mean = (means * weight).sum(dim=-1)
    return Statistics(mean, ((variances + (means - mean[..., None]) ** 2) * weight).sum(dim=-1))


def group_norm(layer: nn.Module, x: Tensor, statistics: Statistics) -> Tensor:
    """GroupNorm of x [B, C, T, H, W] with the layer's weights and the given statistics instead of x's own."""
    repeats = x.shape[1] // layer.num_groups
    scale = torch.rsqrt(statistics.variance + layer.eps).repeat_interleave(repeats, dim=1)
    scale = scale * layer.weight.to(scale)
    shift = layer.bias.to(scale) - statistics.mean.repeat_interleave(repeats, dim=1) * scale
    scale, shift = scale[:, :, None, None, None], shift[:, :, None, None, None]
    out = torch.empty_like(x)
    for start, stop in time_windows(x):
        out[:, :, start:stop] = torch.addcmul(shift, x[:, :, start:stop], scale)
    return out


def normalise(layer: nn.Module, x: Tensor, context: ChunkContext) -> Tensor:
    """GroupNorm of x [B, C, T, H, W] by the context's statistics if it has any, else by x's own."""
    if context.statistics is None:
        return layer(x)
    return group_norm(layer, x, context.statistics(layer, x))


class SpatialNorm(nn.Module):
    """The decoder's norm: GroupNorm, then a scale and a shift read from the latent at each position.

    The latent is meant to be resized (nearest) to x first. Both convolutions are pointwise, so they run on the
    latent grid and their results are spread over x, which gives the same numbers for a fraction of the work.
    """

    def __init__(self, channels: int, make: LayerFactory) -> None:
        super().__init__()
        self.norm_layer = make.group_norm(channels)
        self.conv_y = CausalConv3d(make.latent_channels, channels, make, kernel_size=1)
        self.conv_b = CausalConv3d(make.latent_channels, channels, make, kernel_size=1)

    def forward(self, x: Tensor, context: ChunkContext, latent: Tensor) -> Tensor:
        """Normalise x [B, C, T, H, W]; the sizes of the latent [B, z, t, h, w] divide x's."""
        x = normalise(self.norm_layer, x, context)
        scale, shift = self.conv_y(latent, context), self.conv_b(latent, context)  # [B, C, t, h, w]
        if not (context.first and x.shape[2] > latent.shape[2]):
            return _modulate(x, scale, shift)
        # The video's first latent frame is one frame, the others were stretched in time.
        parts = [_modulate(x[:, :, at], scale[:, :, at], shift[:, :, at]) for at in (slice(1), slice(1, None))]
        return x if _free(*parts) else torch.cat(parts, dim=2)


def norm_groups(norm: nn.Module) -> int:
    """How many groups a norm of either side of the VAE has."""
    return norm.norm_layer.num_groups if isinstance(norm, SpatialNorm) else norm.num_groups


def _modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Scale and shift x, each number standing for a box of x; in place where autograd allows."""
    frames, rows, columns = scale.shape[2:]
    spread = x.shape[4] // columns
    # Only columns are really repeated (rows of memory stay long for the kernel); frames and rows are broadcast.
    scale, shift = (
        rearrange(each.repeat_interleave(spread, dim=4), "b c t h w -> b c t 1 h 1 w") for each in (scale, shift)
    )
    grid = rearrange(x, "b c (t frame) (h row) w -> b c t frame h row w", t=frames, h=rows)  # a view of x
    if _free(x, scale, shift):
        torch.addcmul(shift, grid, scale, out=grid)
        return x
    return torch.addcmul(shift, grid, scale).reshape(x.shape)


class ResnetBlock(nn.Module):
    """Two norm-SiLU-convolution steps around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, make: LayerFactory) -> None:
        super().__init__()
        self.norm1 = make.norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, make)
        self.norm2 = make.norm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, make)
        self.conv_shortcut = make.conv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def opening(self, x: Tensor, context: ChunkContext, latent: Tensor | None) -> Tensor:
        """The first step, [B, C, T, H, W] -> [B, C', T, H, W]."""
        return self.conv1(activate(self._norm(self.norm1, x, context, latent)), context)

    def closing(self, held: list[Tensor], x: Tensor, context: ChunkContext, latent: Tensor | None) -> Tensor:
        """The second step and the sum with the block's input x, [B, C, T, H, W] -> [B, C', T, H, W].

        The first step's result is taken out of the list `held`: its memory is free as soon as it is normed.
        """
        h = activate(self._norm(self.norm2, held.pop(), context, latent))
        h = self.conv2(h, context)
        if self.conv_shortcut is not None:
            x = convolve(self.conv_shortcut, x)
        return h.add_(x) if _free(h, x) else h + x

    @staticmethod
    def _norm(norm: nn.Module, x: Tensor, context: ChunkContext, latent: Tensor | None) -> Tensor:
        return normalise(norm, x, context) if latent is None else norm(x, context, latent)


class Downsample(nn.Module):
    """Halves height and width, and in the upper levels time: frame pairs are averaged, a video's first stays."""

    def __init__(self, channels: int, make: LayerFactory, *, in_time: bool) -> None:
        super().__init__()
        self.in_time = in_time
        self.conv = make.conv2d(channels, stride=2, padding=0)

    def forward(self, x: Tensor, context: ChunkContext) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T/2, H/2, W/2], (T + 1) / 2 frames in a video's first chunk."""
        if self.in_time:
            x = self._halve_time(x, first_alone=context.first)
        # Padding only at the right and bottom is what the weights were trained with.
        return _by_frames(lambda frames: self.conv(functional.pad(frames, (0, 1, 0, 1))), x)

    @staticmethod
    def _halve_time(x: Tensor, *, first_alone: bool) -> Tensor:
        rest = x[:, :, 1:] if first_alone else x
        pairs = torch.lerp(rest[:, :, 0::2], rest[:, :, 1::2], 0.5)
        return torch.cat((x[:, :, :1], pairs), dim=2) if first_alone else pairs


class Upsample(nn.Module):
    """Doubles height and width, and in the lower levels time: frames are repeated, a video's first is not.

    The weights are those of a 3 x 3 convolution of the doubled picture. There every pixel has equal neighbours, so each
    of the four pixels that come from one sees 2 x 2 different ones, through sums of weights: four ninths of the work.
    """

    def __init__(self, channels: int, make: LayerFactory, *, in_time: bool) -> None:
        super().__init__()
        self.in_time = in_time
        self.conv = make.conv2d(channels, stride=1, padding=1)

    def forward(self, x: Tensor, context: ChunkContext) -> Tensor:
        """[B, C, T, H, W] -> [B, C, 2T, 2H, 2W], 2T - 1 frames in a video's first chunk."""
        # ComfyUI may keep weights in main memory and fetch them for each call.
        kernels, bias = quarter_kernels(self.conv.weight.to(x.device)).to(x.dtype), self.conv.bias.to(x).repeat(4)
        # Time is doubled after the convolution: it works frame by frame, so the copies would come out equal anyway.
        repeat = 2 if self.in_time else 1
        drop = 1 if self.in_time and context.first else 0
        return _by_frames(partial(_doubled, kernels, bias), x, scale=4, repeat=repeat, drop=drop)


def quarter_kernels(weight: Tensor) -> Tensor:
    """Kernels [4 C', C, 2, 2] in float32 that give each quarter of what `weight` [C', C, 3, 3] gives of a doubled
    picture: the upper left pixels of all 2 x 2, the upper right, the lower left and the lower right ones."""
    above, middle, below = weight.float().unbind(2)
    upper, lower = torch.stack((above, middle + below), 2), torch.stack((above + middle, below), 2)
    quarters = []
    for half in (upper, lower):
        left, centre, right = half.unbind(3)
        quarters += [torch.stack((left, centre + right), 3), torch.stack((left + centre, right), 3)]
    return torch.cat(quarters)


def _doubled(kernels: Tensor, bias: Tensor, pictures: Tensor) -> Tensor:
    """Pictures [N, C, H, W] doubled and convolved, [N, C', 2H, 2W]."""
    height, width = pictures.shape[2:]
    quarters = functional.conv2d(pictures, kernels, bias, padding=1)
    quarters = rearrange(quarters, "n (down across c) h w -> n down across c h w", down=2, across=2)
    out = pictures.new_empty(len(pictures), quarters.shape[3], height, 2, width, 2)
    for down in (0, 1):
        for across in (0, 1):
            seen = quarters[:, down, across, :, down : down + height, across : across + width]
            out[:, :, :, down, :, across] = seen
    return rearrange(out, "n c h down w across -> n c (h down) (w across)")


def _by_frames(step: Callable[[Tensor], Tensor], x: Tensor, scale: int = 1, repeat: int = 1, drop: int = 0) -> Tensor:
    """Run `step`, for pictures [N, C, H, W], over the frames of x [B, C, T, H, W], one window of time after another.

    `scale`: by how much it enlarges a frame's area. Each result is repeated `repeat` times, without the first `drop`.
    """
    out, done = None, 0
    for start, stop in time_windows(x, scale * repeat):
        pictures = step(rearrange(x[:, :, start:stop], "b c t h w -> (b t) c h w"))
        piece = rearrange(pictures, "(b t) c h w -> b c t h w", b=x.shape[0])
        if repeat > 1:
            piece = piece.repeat_interleave(repeat, dim=2)
        if start == 0:
            piece = piece[:, :, drop:]
            out = piece.new_empty((*piece.shape[:2], x.shape[2] * repeat - drop, *piece.shape[3:]))
        out[:, :, done : done + piece.shape[2]] = piece
        done += piece.shape[2]
    return out


class ResnetStack(nn.Module):
    """Residual blocks of one resolution; the networks' units run them (see `vae.Unit`)."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, make: LayerFactory) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.resnets = nn.ModuleList(ResnetBlock(*pair, make) for pair in pairwise(widths))


class DownBlock(ResnetStack):
    """One level of the encoder, and the step to the next; the lowest has none."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, make: LayerFactory, sampler: Downsample | None
    ) -> None:
        super().__init__(in_channels, out_channels, blocks, make)
        self.downsamplers = nn.ModuleList([] if sampler is None else [sampler])


class UpBlock(ResnetStack):
    """One level of the decoder, and the step to the next; the highest has none."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, make: LayerFactory, sampler: Upsample | None
    ) -> None:
        super().__init__(in_channels, out_channels, blocks, make)
        self.upsamplers = nn.ModuleList([] if sampler is None else [sampler])
