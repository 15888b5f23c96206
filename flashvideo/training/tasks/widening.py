"""A wider VAE that begins as a narrower one: same pictures, more channels, other norm groups.

Net2Net (arXiv 1511.05641): every channel is repeated within its norm group, and what reads it shares its weight among
the copies, so that the wide network computes what the narrow one did. A little noise that cancels over the copies lets
them learn different things. Other norm groups change what is computed: each norm's weight and bias are fitted to what
it gave before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from ...config import VAEConfig
from ...vae import VideoVAE
from ...vae.layers import NORM_EPS
from ..errors import TrainingError
from ..randomness import generator_for, normal_like

NOISE = 0.03  # of copied weights, relative to a layer's mean absolute weight
_SHORTCUT = ".conv_shortcut."


def widened(vae: VideoVAE, config: VAEConfig, clips: Iterable[Tensor], seed: int) -> VideoVAE:
    """A VAE of the sizes in `config` that gives the pictures that `vae` gives.

    Widths must be multiples of the narrow one's, blocks the same. Where `config.norm_groups` differs, the norms are
    fitted on `clips`, each [B, 3, T, H, W] in [-1, 1], and the pictures are alike but not equal. Raises TrainingError
    for sizes that can't begin so.
    """
    narrow = vae.config
    _check(narrow, config)
    wide = VideoVAE(dataclasses.replace(config, norm_groups=narrow.norm_groups))
    weights, shapes = vae.state_dict(), {name: tensor.shape for name, tensor in wide.state_dict().items()}
    if lost := sorted(weights.keys() - shapes.keys()):
        raise TrainingError(
            f"A VAE whose levels become equally wide can't begin as the narrower one: {lost[0]} would be lost. "
            "Choose other channel multipliers."
        )
    generator = generator_for(seed, "widening")
    state = {
        name: _repeated(weights[name], shape, generator) if name in weights else _identity(name, shape)
        for name, shape in shapes.items()
    }
    wide.load_state_dict(state)
    return wide if config.norm_groups == narrow.norm_groups else _regrouped(wide, config, clips)


def _check(narrow: VAEConfig, config: VAEConfig) -> None:
    widths = [[numbers.base_channels * m for m in numbers.channel_multipliers] for numbers in (narrow, config)]
    fixed = ("encoder_blocks", "decoder_blocks", "latent_channels", "image_channels")
    fits = len(widths[0]) == len(widths[1]) and all(new % old == 0 for old, new in zip(*widths, strict=True))
    if not fits or any(getattr(narrow, name) != getattr(config, name) for name in fixed):
        raise TrainingError(
            f"A VAE with levels of {widths[0]} channels can only begin one with the same blocks and multiples of these "
            f"widths; got {widths[1]} channels, {config.encoder_blocks} and {config.decoder_blocks} blocks."
        )


def _repeated(weight: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Outputs repeated, and inputs repeated at a share of their weight."""
    weight = repeat(weight.float(), "out ... -> (out copies) ...", copies=shape[0] // weight.shape[0])
    if weight.ndim == 1 or weight.shape[1] == shape[1]:
        return weight.clone()
    copies = shape[1] // weight.shape[1]
    noise = NOISE * weight.abs().mean() * normal_like(weight.new_empty(shape), generator)
    groups = rearrange(noise, "out (inputs copies) ... -> out inputs copies ...", copies=copies)
    noise = (groups - groups.mean(dim=2, keepdim=True)).reshape(shape)
    return repeat(weight, "out inputs ... -> out (inputs copies) ...", copies=copies) / copies + noise


def _identity(name: str, shape: torch.Size) -> Tensor:
    """A shortcut where the narrow network had none, because its block kept the width."""
    if _SHORTCUT not in name:
        raise TrainingError(f"The narrower VAE has no {name}.")
    if len(shape) == 1:
        return torch.zeros(shape)
    channels = min(shape[:2])
    eye = repeat(torch.eye(channels), "o i -> (o a) (i b)", a=shape[0] // channels, b=shape[1] // channels)
    return (eye * channels / shape[1]).reshape(shape)


@dataclass(frozen=True)
class _Moments:
    """Mean and mean square of each channel of norms' inputs, both [clips, C]."""

    mean: Tensor
    square: Tensor

    def of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation by which each channel is normalised, [clips, C] both."""
        mean, square = (reduce(x, "n (g c) -> n g", "mean", g=groups) for x in (self.mean, self.square))
        deviation = (square - mean**2 + NORM_EPS).sqrt()
        size = self.mean.shape[1] // groups
        return repeat(mean, "n g -> n (g c)", c=size), repeat(deviation, "n g -> n (g c)", c=size)


@torch.no_grad()
def _regrouped(vae: VideoVAE, config: VAEConfig, clips: Iterable[Tensor]) -> VideoVAE:
    """The same weights with other norm groups; weight and bias of every norm are least-squares fits on the clips."""
    other = VideoVAE(config)
    other.load_state_dict(vae.state_dict())
    moments = _measure(vae, clips)
    for name, norm in other.named_modules():
        if not isinstance(norm, nn.GroupNorm):
            continue
        measured = moments[name]
        before, spread = measured.of_groups(vae.config.norm_groups)
        after, new_spread = measured.of_groups(config.norm_groups)
        # Of each channel: u, what the old norm gives, and w, what the new one gives, over all positions of all clips.
        u, w = ((measured.mean - at) / size for at, size in ((before, spread), (after, new_spread)))
        ww = (measured.square - 2 * measured.mean * after + after**2) / new_spread**2
        uw = (measured.square - measured.mean * (before + after) + before * after) / (spread * new_spread)
        u, w, ww, uw = (x.mean(dim=0) for x in (u, w, ww, uw))
        scale = (uw - u * w) / (ww - w**2 + NORM_EPS)
        norm.bias += norm.weight * (u - scale * w)
        norm.weight *= scale
    return other


def _measure(vae: VideoVAE, clips: Iterable[Tensor]) -> dict[str, _Moments]:
    """Moments of the input of every norm, by its name, over encoding and decoding the clips."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def remember(name: str, x: Tensor) -> None:
        x = x.float()
        pair = (reduce(x, "b c t h w -> b c", "mean"), reduce(x.square(), "b c t h w -> b c", "mean"))
        found.setdefault(name, []).append(pair)

    norms = {name: module for name, module in vae.named_modules() if isinstance(module, nn.GroupNorm)}
    hooks = [
        norm.register_forward_pre_hook(lambda _, inputs, name=name: remember(name, inputs[0]))
        for name, norm in norms.items()
    ]
    try:
        for clip in clips:
            vae.decode(vae.encode(clip).mode())
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _Moments(*(torch.cat(each) for each in zip(*pairs, strict=True))) for name, pairs in found.items()}
