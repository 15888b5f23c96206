"""Encode and decode with a VideoVAE's own weights, in bfloat16 with channels last; gradients reach the weights.

Chunks, norms and convolutions are those of `flashvideo.vae`: 17, 16, ... frames and 3, 2, ... latent frames, each norm
measuring its chunk of each clip. Convolutions over time run as convolutions of pictures, on PyTorch's kernels.
Activations are [B, T, H, W, C], or [N, H, W, C] where frames don't matter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ....config import SPATIAL_FACTOR
from ....vae import VideoVAE
from ....vae.layers import CausalConv3d, Downsample, ResnetBlock, SpatialNorm, Upsample
from ....vae.network import Decoder, Encoder, Posterior, decode_chunks, encode_chunks
from .kernels import LANES, Modulation, doubled, kernels_problem, norm_silu_stack

_log = logging.getLogger(__name__)


def fused_or_plain(vae: VideoVAE) -> FusedVAE | VideoVAE:
    """What trains the VAE's weights fastest here. Where that is the VAE itself, the log says why, in one sentence."""
    problem = _problem(vae)
    if problem is None:
        return FusedVAE(vae)
    _log.warning("fused = true has no effect: %s.", problem)
    return vae


def _problem(vae: VideoVAE) -> str | None:
    """Why the fused network can't have these weights; None if it can."""
    config, weight = vae.config, vae.encoder.conv_in.conv.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return "it is for float32 weights on the CPU"
    if any(config.base_channels * each % LANES for each in config.channel_multipliers):
        return f"every level's channels must be a multiple of {LANES}"
    return kernels_problem()


@dataclass
class _Chunks:
    """What the chunks of one encode or decode share; `first`: this one starts the video."""

    first: bool = True
    kept: dict[nn.Module, Tensor] = field(default_factory=dict)  # of a layer: the last two frames that it saw
    kernels: dict[nn.Module, Tensor] = field(default_factory=dict)  # of a layer: its weight for pictures, bfloat16


class FusedVAE:
    """A VideoVAE's encode and decode; see the module. Both run in bfloat16 whatever autocast says."""

    def __init__(self, vae: VideoVAE) -> None:
        """Take a VAE that `fused_or_plain` finds fit; its weights are read at each call."""
        self.vae = vae

    def encode(self, video: Tensor) -> Posterior:
        """As `VideoVAE.encode`; the posterior is float32."""
        if video.shape[3] % SPATIAL_FACTOR or video.shape[4] % SPATIAL_FACTOR:
            raise ValueError(f"Width and height of a video must be multiples of 8; got {list(video.shape[3:])}.")
        moments = _run(lambda x, chunks: _encode(self.vae.encoder, x, chunks), video, encode_chunks(video.shape[2]))
        return Posterior(*moments.chunk(2, dim=1))

    def decode(self, latent: Tensor) -> Tensor:
        """As `VideoVAE.decode`; the video is float32."""
        return _run(lambda x, chunks: _decode(self.vae.decoder, x, chunks), latent, decode_chunks(latent.shape[2]))


def _run(network: Callable[[Tensor, _Chunks], Tensor], x: Tensor, sizes: list[int]) -> Tensor:
    """Run over x [B, C, T, H, W] in chunks of these sizes; both ends are float32."""
    chunks, pieces = _Chunks(), []
    with torch.autocast(x.device.type, enabled=False):
        for piece in rearrange(x.float(), "b c t h w -> b t h w c").split(sizes, dim=1):
            pieces.append(network(piece.contiguous(), chunks).float())
            chunks.first = False
        return rearrange(torch.cat(pieces, dim=1), "b t h w c -> b c t h w")


def _encode(encoder: Encoder, x: Tensor, chunks: _Chunks) -> Tensor:
    x = _causal(encoder.conv_in, x.bfloat16(), chunks)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x, None, chunks)
        for sampler in block.downsamplers:
            x = _halve(sampler, x, chunks)
    for resnet in encoder.mid_block.resnets:
        x = _resnet(resnet, x, None, chunks)
    return _norm_and_conv(encoder.norm_out, encoder.conv_out, x, None, chunks)


def _decode(decoder: Decoder, latent: Tensor, chunks: _Chunks) -> Tensor:
    x = _causal(decoder.conv_in, latent.bfloat16(), chunks)
    for resnet in decoder.mid_block.resnets:
        x = _resnet(resnet, x, latent, chunks)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x, latent, chunks)
        for sampler in block.upsamplers:
            x = _double(sampler, x, chunks)
    return _norm_and_conv(decoder.norm_out, decoder.conv_out, x, latent, chunks)


def _resnet(resnet: ResnetBlock, x: Tensor, latent: Tensor | None, chunks: _Chunks) -> Tensor:
    h = _norm_and_conv(resnet.norm1, resnet.conv1, x, latent, chunks)
    h = _norm_and_conv(resnet.norm2, resnet.conv2, h, latent, chunks)
    if resnet.conv_shortcut is not None:
        weight, bias = resnet.conv_shortcut.weight, resnet.conv_shortcut.bias
        x = _pictures(x.flatten(0, 1), weight.flatten(2)[..., None], bias).view(h.shape)
    return x + h


def _norm_and_conv(
    norm: nn.GroupNorm | SpatialNorm, layer: CausalConv3d, x: Tensor, latent: Tensor | None, chunks: _Chunks
) -> Tensor:
    """Norm, SiLU and a convolution over time; the latent [B, t, h, w, z] is float32."""
    if latent is None:
        one = x.new_ones(len(x), 1, 1, 1, x.shape[4], dtype=torch.float32)
        modulation = Modulation(one, torch.zeros_like(one), [0] * x.shape[1])
    else:
        scale, shift = (
            F.linear(latent, each.conv.weight.flatten(1), each.conv.bias) for each in (norm.conv_y, norm.conv_b)
        )
        modulation = Modulation(scale, shift, _latent_frames(x.shape[1], latent.shape[1], chunks))
        norm = norm.norm_layer
    moments, chunks.kept[layer] = norm_silu_stack(x, norm, modulation, chunks.kept.get(layer))
    return _moments(layer, moments, chunks).view(*x.shape[:4], -1)


def _latent_frames(frames: int, latents: int, chunks: _Chunks) -> list[int]:
    """For each frame of a chunk its latent frame; a video's first stands alone."""
    alone = 1 if chunks.first and frames > latents else 0
    spread = (frames - alone) // (latents - alone)
    return [*range(alone), *(alone + frame // spread for frame in range(frames - alone))]


def _causal(layer: CausalConv3d, x: Tensor, chunks: _Chunks) -> Tensor:
    """A convolution over time without a norm before it."""
    before = chunks.kept.get(layer)
    if before is None:
        before = x[:, :1].expand(-1, layer.lead, -1, -1, -1)
    seen = torch.cat((before, x), dim=1)
    chunks.kept[layer] = seen[:, -layer.lead :]
    moments = torch.cat([seen[:, at : at + x.shape[1]] for at in range(layer.lead + 1)], dim=4)
    return _moments(layer, moments.flatten(0, 1), chunks).view(*x.shape[:4], -1)


def _moments(layer: CausalConv3d, moments: Tensor, chunks: _Chunks) -> Tensor:
    """A convolution over time, of frames that are side by side as channels: [N, H, W, 3 * C] -> [N, H, W, C']."""
    if layer not in chunks.kernels:
        kernel = rearrange(layer.conv.weight.bfloat16(), "out c t h w -> out (t c) h w")
        chunks.kernels[layer] = kernel.contiguous(memory_format=torch.channels_last)
    return _pictures(moments, chunks.kernels[layer], layer.conv.bias, padding=1)


def _pictures(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    """A convolution of pictures, [N, H, W, C] -> [N, H', W', C']."""
    weight = weight.bfloat16().contiguous(memory_format=torch.channels_last)
    x = F.conv2d(rearrange(x, "n h w c -> n c h w"), weight, bias.bfloat16(), stride=stride, padding=padding)
    return rearrange(x, "n c h w -> n h w c").contiguous()


def _halve(sampler: Downsample, x: Tensor, chunks: _Chunks) -> Tensor:
    if sampler.in_time:
        alone = 1 if chunks.first else 0
        pairs = rearrange(x[:, alone:], "b (t pair) h w c -> b t pair h w c", pair=2)
        x = torch.cat((x[:, :alone], (pairs[:, :, 0] + pairs[:, :, 1]) * 0.5), dim=1)
    padded = F.pad(x, (0, 0, 0, 1, 0, 1)).flatten(0, 1)
    halved = _pictures(padded, sampler.conv.weight, sampler.conv.bias, stride=2)
    return rearrange(halved, "(b t) h w c -> b t h w c", b=len(x))


def _double(sampler: Upsample, x: Tensor, chunks: _Chunks) -> Tensor:
    pictures = _pictures(doubled(x.flatten(0, 1)), sampler.conv.weight, sampler.conv.bias, padding=1)
    x = rearrange(pictures, "(b t) h w c -> b t h w c", b=len(x))
    if not sampler.in_time:
        return x
    alone = 1 if chunks.first else 0
    rest = x[:, alone:, None].expand(-1, -1, 2, -1, -1, -1).flatten(1, 2)
    return torch.cat((x[:, :alone], rest), dim=1)
