"""The scale of a VAE's latents: nothing that it shows depends on it, but stage II does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from ...vae import VideoVAE
from ...vae.layers import SpatialNorm
from ..errors import TrainingError


@torch.no_grad()
def fold_latent_scale(vae: VideoVAE, deviation: Tensor) -> None:
    """Divide the latent's channels by `deviation` [C], exactly: the encoder's last and the decoder's first layers.

    Only a scale can be folded: a shift would meet the zeros around the picture in the decoder's first convolution.
    """
    if not bool((deviation > 0).all()):
        raise TrainingError("A latent channel of the VAE is constant; it isn't trained enough to be exported.")
    channels = len(deviation)
    last = vae.encoder.conv_out.conv
    last.weight[:channels] /= deviation[:, None, None, None, None]
    last.bias[:channels] /= deviation
    last.bias[channels:] -= 2 * deviation.log()
    readers = [vae.decoder.conv_in.conv]
    for module in vae.decoder.modules():
        if isinstance(module, SpatialNorm):
            readers += [module.conv_y.conv, module.conv_b.conv]
    for conv in readers:
        conv.weight *= deviation[None, :, None, None, None]


@torch.no_grad()
def scale_towards(vae: VideoVAE, known: VideoVAE, clips: Sequence[Tensor]) -> Tensor:
    """What to divide each channel of the VAE's latents by, so that they come nearest to another's: [C].

    Least squares over clips [1, 3, T, H, W]. Raises TrainingError for VAEs whose latents don't have these channels in
    common.
    """
    device = next(vae.parameters()).device
    if vae.config.latent_channels != known.config.latent_channels:
        raise TrainingError("latents_like must have as many latent channels as the VAE.")
    ours, theirs = (
        torch.cat([rearrange(each.encode(clip.to(device)).mode()[0], "c t h w -> c (t h w)") for clip in clips], dim=1)
        for each in (vae, known.to(device))
    )
    alike = (ours * theirs).sum(dim=1)
    if not bool((alike > 0).all()):
        raise TrainingError("latents_like is no relative of this VAE: a latent channel has nothing in common.")
    return ours.square().sum(dim=1) / alike
