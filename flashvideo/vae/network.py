"""The causal 3D VAE: video to latent and back, 8x smaller in space and 4x in time, the first frame by itself.

CogVideoX's network (arXiv 2408.06072, section 2.1), which both FlashVideo stages share; parameters have the names
diffusers gives them. Videos are [B, 3, T, H, W] in [-1, 1] with T = 4n + 1 frames, latents [B, 16, n + 1, H/8, W/8]
in raw scale: a stage multiplies them by its own latent scale.

A video passes in chunks of time. The convolutions carry on across chunks as if there were none, but each norm
measures its own chunk, so the chunk sizes are part of what the model computes, not just a way to save memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from ..config import SPATIAL_FACTOR, TEMPORAL_FACTOR, VAEConfig, is_video_length, video_shape
from .layers import (
    KERNEL_SIZE,
    CausalConv3d,
    ChunkContext,
    DownBlock,
    Downsample,
    LayerFactory,
    ResnetBlock,
    ResnetStack,
    UpBlock,
    Upsample,
    activate,
    norm_groups,
    normalise,
)

ENCODE_CHUNK = 16  # frames; the first chunk has one more
DECODE_CHUNK = 2  # latent frames; the first chunk has one more
LEVELS = SPATIAL_FACTOR.bit_length()  # resolutions, 1 to 1/8
TIME_LEVELS = TEMPORAL_FACTOR.bit_length() - 1  # how many of the steps between them also change time
MID_BLOCKS = 2
LOGVAR_RANGE = (-30.0, 20.0)
VOLUME, AREA = KERNEL_SIZE**3, KERNEL_SIZE**2
DOUBLED = 16  # of the convolution that doubles a picture, for a pixel of the small one: four kernels of 2 x 2
HALF_OVERLAP = 16  # latent columns by which each half reaches over the cut in `decode_in_halves`

OnChunk = Callable[[int, int], None]


def encode_chunks(frames: int, chunk: int = ENCODE_CHUNK) -> list[int]:
    """Sizes of the chunks that a video is encoded in: chunk + 1, chunk, chunk, ... and what remains.

    Raises ValueError unless `frames` is 4n + 1.
    """
    if not is_video_length(frames):
        raise ValueError(f"The VAE encodes videos of 4n+1 frames (1, 5, 9, ...); got {frames}.")
    if chunk < TEMPORAL_FACTOR or chunk % TEMPORAL_FACTOR:
        raise ValueError(f"A chunk of the VAE must be a multiple of {TEMPORAL_FACTOR} frames; got {chunk}.")
    return _chunks(frames, chunk)


def decode_chunks(latents: int) -> list[int]:
    """Sizes of the chunks that a latent is decoded in: 3, 2, 2, ... and 1 for a remainder, in latent frames."""
    if latents < 1:
        raise ValueError(f"The VAE decodes latents of at least one frame; got {latents}.")
    return _chunks(latents, DECODE_CHUNK)


def _chunks(total: int, chunk: int) -> list[int]:
    starts = [0, *range(chunk + 1, total, chunk)]
    return [stop - start for start, stop in zip(starts, [*starts[1:], total], strict=True)]


@dataclass(frozen=True)
class Posterior:
    """The encoder's result for a video: a normal distribution of latents, [B, 16, T, h, w] each.

    `logvar` is as the network gives it; sampling clamps it.
    """

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Draw a latent with standard normal noise [B, 16, T, h, w]. The official encoder always samples."""
        return self.mean + torch.exp(0.5 * self.logvar.clamp(*LOGVAR_RANGE)) * noise

    def mode(self) -> Tensor:
        """Return the likeliest latent, the mean."""
        return self.mean


@dataclass(frozen=True)
class Unit:
    """A step of the encoder or decoder that can run by itself: a norm, if any, and the convolution behind it.

    `run(held, beside, latent, context)` takes what the unit before gave out of the list `held`, so that its memory can
    be freed early; in the decoder also the latent; and where it `joins`, the input of the unit before, to be added up.
    A position of the input stands for 1/scale of a latent pixel a side, and a frame for 1/time of a latent frame;
    `out_scale` and `out_time` are the same for the result.
    """

    run: Callable[[list[Tensor], Tensor | None, Tensor | None, ChunkContext], Tensor]
    inputs: int  # channels
    channels: int  # of the result
    groups: int  # of the norm at its beginning; 0: there is none
    joins: int  # channels of the input of the unit before, which is added up; 0 where nothing is
    reach: int  # video pixels by which the result looks beyond its own place
    keeps: int  # channels of the frames that it keeps for the next chunk
    holds: int  # channels that are in memory at its peak, at the input's scale
    work: float  # multiplications for a position of the input
    scale: int
    time: int
    out_scale: int
    out_time: int

    @property
    def norms(self) -> int:
        """How many norms are in it: one or none."""
        return int(self.groups > 0)


def run_units(units: Sequence[Unit], x: Tensor, latent: Tensor | None, context: ChunkContext) -> Tensor:
    """Run units one after the other over one chunk."""
    beside = None
    for unit, follower in zip(units, [*units[1:], None], strict=True):
        held = [x]
        kept = x if follower is not None and follower.joins else None
        del x
        x = unit.run(held, beside, latent, context)
        beside = kept
    return x


def _resnet_units(resnet: ResnetBlock, scale: int, time: int) -> list[Unit]:
    """The two halves of a residual block."""

    def opening(held: list[Tensor], _: Tensor | None, latent: Tensor | None, context: ChunkContext) -> Tensor:
        return resnet.opening(held.pop(), context, latent)

    def closing(held: list[Tensor], x: Tensor | None, latent: Tensor | None, context: ChunkContext) -> Tensor:
        return resnet.closing(held, x, context, latent)

    inputs, channels = resnet.conv1.conv.in_channels, resnet.conv1.conv.out_channels
    groups = norm_groups(resnet.norm1)
    place = {"reach": SPATIAL_FACTOR // scale, "scale": scale, "time": time, "out_scale": scale, "out_time": time}
    first = {"joins": 0, "keeps": inputs, "holds": 2 * inputs + channels, "work": VOLUME * inputs * channels}
    shortcut = inputs * channels if resnet.conv_shortcut is not None else 0
    second = {"joins": inputs, "keeps": channels, "holds": inputs + 2 * channels}
    return [
        Unit(opening, inputs, channels, groups, **first, **place),
        Unit(closing, channels, channels, groups, **second, work=VOLUME * channels**2 + shortcut, **place),
    ]


def _first_unit(layer: CausalConv3d, scale: int, time: int) -> Unit:
    def run(held: list[Tensor], _: Tensor | None, _latent: Tensor | None, context: ChunkContext) -> Tensor:
        return layer(held.pop(), context)

    inputs, channels, reach = layer.conv.in_channels, layer.conv.out_channels, SPATIAL_FACTOR // scale
    work, holds = VOLUME * inputs * channels, inputs + channels
    return Unit(run, inputs, channels, 0, 0, reach, inputs, holds, work, scale, time, scale, time)


def _last_unit(
    finish: Callable[[Tensor, Tensor | None, ChunkContext], Tensor],
    norm: nn.Module,
    layer: CausalConv3d,
    scale: int,
    time: int,
) -> Unit:
    def run(held: list[Tensor], _: Tensor | None, latent: Tensor | None, context: ChunkContext) -> Tensor:
        return finish(held.pop(), latent, context)

    inputs, channels, reach = layer.conv.in_channels, layer.conv.out_channels, SPATIAL_FACTOR // scale
    work, holds = VOLUME * inputs * channels, 2 * inputs + channels
    return Unit(run, inputs, channels, norm_groups(norm), 0, reach, inputs, holds, work, scale, time, scale, time)


def _step_unit(layer: Downsample | Upsample, scale: int, time: int) -> Unit:
    """The step from one resolution to the next."""

    def run(held: list[Tensor], _: Tensor | None, _latent: Tensor | None, context: ChunkContext) -> Tensor:
        return layer(held.pop(), context)

    width = layer.conv.out_channels
    same = {"inputs": width, "channels": width, "groups": 0, "joins": 0, "keeps": 0, "scale": scale, "time": time}
    same["reach"] = SPATIAL_FACTOR // scale
    if isinstance(layer, Upsample):
        out_scale, out_time = 2 * scale, time * (2 if layer.in_time else 1)
        growth = (out_scale // scale) ** 2 * (out_time // time)
        holds = (1 + 4 + growth) * width  # its input, the four pictures of the quarters, and the result
        work = DOUBLED * width**2
    else:
        out_scale, out_time = scale // 2, time // 2 if layer.in_time else time
        holds, work = 3 * width, AREA * width**2 / (4 * (time // out_time))
    return Unit(run, holds=holds, work=work, out_scale=out_scale, out_time=out_time, **same)


class Encoder(nn.Module):
    """[B, 3, T, H, W] -> mean and log variance side by side, [B, 2 * 16, T', H/8, W/8]."""

    def __init__(self, config: VAEConfig, make: LayerFactory) -> None:
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = CausalConv3d(config.image_channels, config.base_channels, make)
        self.down_blocks = nn.ModuleList()
        before = config.base_channels
        for level, width in enumerate(widths):
            sampler = Downsample(width, make, in_time=level < TIME_LEVELS) if level < LEVELS - 1 else None
            self.down_blocks.append(DownBlock(before, width, config.encoder_blocks, make, sampler))
            before = width
        self.mid_block = ResnetStack(before, before, MID_BLOCKS, make)
        self.norm_out = make.norm(before)
        self.conv_out = CausalConv3d(before, 2 * config.latent_channels, make)

    def forward(self, x: Tensor, context: ChunkContext) -> Tensor:
        """Encode one chunk; see the class."""
        return run_units(self.units(), x, None, context)

    def units(self) -> list[Unit]:
        """The network in pieces, to be run one after the other."""
        units = [_first_unit(self.conv_in, SPATIAL_FACTOR, TEMPORAL_FACTOR)]
        for level, block in enumerate(self.down_blocks):
            place = SPATIAL_FACTOR >> level, max(1, TEMPORAL_FACTOR >> level)
            for resnet in block.resnets:
                units += _resnet_units(resnet, *place)
            units += [_step_unit(sampler, *place) for sampler in block.downsamplers]
        for resnet in self.mid_block.resnets:
            units += _resnet_units(resnet, 1, 1)
        return [*units, _last_unit(self._finish, self.norm_out, self.conv_out, 1, 1)]

    def _finish(self, x: Tensor, _latent: Tensor | None, context: ChunkContext) -> Tensor:
        return self.conv_out(activate(normalise(self.norm_out, x, context)), context)


class Decoder(nn.Module):
    """[B, 16, T', h, w] -> [B, 3, T, 8h, 8w]. Its first level is the smallest picture."""

    def __init__(self, config: VAEConfig, make: LayerFactory) -> None:
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in reversed(config.channel_multipliers)]
        before = widths[0]
        self.conv_in = CausalConv3d(config.latent_channels, before, make)
        self.mid_block = ResnetStack(before, before, MID_BLOCKS, make)
        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            sampler = Upsample(width, make, in_time=level < TIME_LEVELS) if level < LEVELS - 1 else None
            self.up_blocks.append(UpBlock(before, width, config.decoder_blocks, make, sampler))
            before = width
        self.norm_out = make.norm(before)
        self.conv_out = CausalConv3d(before, config.image_channels, make)

    def forward(self, latent: Tensor, context: ChunkContext) -> Tensor:
        """Decode one chunk; see the class."""
        return run_units(self.units(), latent, latent, context)

    def units(self) -> list[Unit]:
        """The network in pieces, to be run one after the other."""
        units = [_first_unit(self.conv_in, 1, 1)]
        for resnet in self.mid_block.resnets:
            units += _resnet_units(resnet, 1, 1)
        for level, block in enumerate(self.up_blocks):
            place = 1 << level, min(TEMPORAL_FACTOR, 1 << level)
            for resnet in block.resnets:
                units += _resnet_units(resnet, *place)
            units += [_step_unit(sampler, *place) for sampler in block.upsamplers]
        return [*units, _last_unit(self._finish, self.norm_out, self.conv_out, SPATIAL_FACTOR, TEMPORAL_FACTOR)]

    def _finish(self, x: Tensor, latent: Tensor | None, context: ChunkContext) -> Tensor:
        return self.conv_out(activate(self.norm_out(x, context, latent)), context)


class VideoVAE(nn.Module):
    """Encoder and decoder. Holds weights only; every call is independent of the calls before it."""

    def __init__(
        self,
        config: VAEConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        operations: ModuleType | type = nn,
    ) -> None:
        """Build from `operations`' Conv2d, Conv3d and GroupNorm. Raises ValueError for numbers that don't fit."""
        super().__init__()
        levels = len(config.channel_multipliers)
        if levels != LEVELS:
            raise ValueError(f"The VAE must have {LEVELS} channel multipliers, one a level; got {levels}.")
        self.config = config
        factory = {"operations": operations, "device": device, "dtype": dtype, "norm_groups": config.norm_groups}
        self.encoder = Encoder(config, LayerFactory(**factory))
        self.decoder = Decoder(config, LayerFactory(**factory, latent_channels=config.latent_channels))

    @property
    def dtype(self) -> torch.dtype:
        """The data type that the weights are kept in."""
        return self.encoder.conv_in.conv.weight.dtype

    def encode(
        self, video: Tensor, *, chunked: bool = True, on_chunk: OnChunk | None = None, chunk: int = ENCODE_CHUNK
    ) -> Posterior:
        """Encode a video [B, 3, 4n + 1, H, W] in [-1, 1]; H and W are multiples of 8.

        In chunks of 17, 16, 16, ... frames as the official code does, or of another multiple of 4 with `chunk`, or
        in one piece. `on_chunk(done, total)` runs after each chunk and may raise to stop. Raises ValueError for a
        video of another shape.
        """
        _check_shape("A video for the VAE", video, self.config.image_channels)
        sizes = encode_chunks(video.shape[2], chunk)
        if video.shape[3] % SPATIAL_FACTOR or video.shape[4] % SPATIAL_FACTOR:
            size = f"{video.shape[4]}x{video.shape[3]}"
            raise ValueError(f"Width and height of a video must be multiples of {SPATIAL_FACTOR}; got {size}.")
        moments = list(_run(self.encoder, video, sizes if chunked else [video.shape[2]], on_chunk))
        return Posterior(*torch.cat(moments, dim=2).chunk(2, dim=1))

    def decode(
        self,
        latent: Tensor,
        *,
        chunked: bool = True,
        on_chunk: OnChunk | None = None,
        into: Callable[[torch.Size], Tensor] | None = None,
    ) -> Tensor:
        """Decode a latent [B, 16, n + 1, h, w] in raw scale to a video [B, 3, 4n + 1, 8h, 8w], not clamped.

        In chunks of 3, 2, 2, ... latent frames as the official code does (which drops the last of an even count;
        here it is decoded as one more chunk), or in one piece. `on_chunk(done, total)` runs after each chunk and
        may raise to stop. Finished frames go into a tensor on the latent's device, or into the one that `into` makes
        of the video's shape, on any device. Raises ValueError for a latent of another shape.
        """
        _check_shape("A latent for the VAE", latent, self.config.latent_channels)
        frames = latent.shape[2]
        sizes = decode_chunks(frames)
        video, done = None, 0
        for piece in _run(self.decoder, latent, sizes if chunked else [frames], on_chunk):
            if video is None:
                shape = torch.Size((*piece.shape[:2], *video_shape(latent.shape[2:])))
                video = into(shape) if into is not None else piece.new_empty(shape)
            video[:, :, done : done + piece.shape[2]] = piece
            done += piece.shape[2]
            del piece  # not kept while the next chunk is worked on
        return video


def decode_in_halves(vae: VideoVAE, latent: Tensor) -> Tensor:
    """Decode as the official stage II does: left and right half by themselves, put side by side.

    For parity with the official code only. The halves reach 16 latent columns over the cut where they are wide
    enough (w >= 32), else not at all, and nothing is blended, so a seam may show; `VideoVAE.decode` has none.
    [B, 16, T, h, w] -> [B, 3, 4T - 3, 8h, 8w].
    """
    _check_shape("A latent for the VAE", latent, vae.config.latent_channels)
    width = latent.shape[4]
    cut = width // 2
    overlap = HALF_OVERLAP if width >= 2 * HALF_OVERLAP else 0
    left = vae.decode(latent[..., : cut + overlap])[..., : SPATIAL_FACTOR * cut]
    right = vae.decode(latent[..., cut - overlap :])[..., SPATIAL_FACTOR * overlap :]
    return torch.cat((left, right), dim=-1)


def _run(network: Encoder | Decoder, x: Tensor, sizes: list[int], on_chunk: OnChunk | None) -> Iterator[Tensor]:
    """Yield the network's output for each chunk of x; `on_chunk` runs when the caller has dealt with it."""
    context = ChunkContext()
    start = 0
    for index, size in enumerate(sizes, start=1):
        context.last = index == len(sizes)
        yield network(x[:, :, start : start + size], context)
        context.first = False
        start += size
        if on_chunk is not None:
            on_chunk(index, len(sizes))


def _check_shape(name: str, x: Tensor, channels: int) -> None:
    if x.ndim != 5 or x.shape[1] != channels or not x.numel():
        expected = f"[batch, {channels}, frames, height, width]"
        raise ValueError(f"{name} must be {expected}; got {list(x.shape)}.")
