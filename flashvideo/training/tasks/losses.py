"""Training losses: the VAE's loss, stage I's v-prediction and stage II's flow matching (FlashVideo section 3).

Losses are means in float32 over everything, whatever the network computes in. All randomness (noise, timesteps, the
place on the flow, which captions are dropped) is an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...config import STAGE2_SHIFT, TRAIN_STEPS
from ...schedule import shift_times, zero_snr_signal
from ...vae.network import LOGVAR_RANGE
from ..rows import Rows

CAPTION_DROPOUT = 0.1  # FlashVideo's training setting
TEXTURE_PATCH = 8  # pixels, those of one latent pixel
TEXTURE_FLOOR = 1e-5  # of mean squares: below it, differences are nothing, and the root stays smooth

# dit(latent, timestep[B], context, *, degradation_step=None) -> [B, C, T, H, W]
Network = Callable[..., Tensor]


@dataclass(frozen=True)
class PixelWeights:
    """Weights of the terms of `pixel_loss`."""

    gradient: float = 0.5
    texture: float = 0.0
    motion: float = 0.0
    square: float = 0.0


def pixel_loss(
    prediction: Tensor,
    video: Tensor,
    *,
    gradient: float = 0.5,
    texture: float = 0.0,
    motion: float = 0.0,
    square: float = 0.0,
) -> dict[str, Tensor]:
    """Distance of a video [B, 3, T, H, W] from what it should be.

    "loss" is "reconstruction", the mean absolute error, and the sum of the others by their weights: "gradient", that
    of the differences between neighbouring frames, rows and columns, which keeps edges sharp and stills steady;
    "texture", see `texture_distance`; "motion", the frames' part of "gradient" once more; "square", the mean squared
    error, which counts large errors most. All values are scalars; terms without a weight are left out if they cost
    time.
    """
    error = prediction.float() - video.float()
    terms = {"reconstruction": error.abs().mean(), "gradient": _gradient(error)}
    loss = terms["reconstruction"] + gradient * terms["gradient"]
    if texture:
        terms["texture"] = texture_distance(prediction.float(), video.float())
        loss = loss + texture * terms["texture"]
    if motion:
        terms["motion"] = error.diff(dim=2).abs().mean() if error.shape[2] > 1 else error.new_zeros(())
        loss = loss + motion * terms["motion"]
    if square:
        terms["square"] = error.square().mean()
        loss = loss + square * terms["square"]
    return {"loss": loss, **terms}


def vae_loss(
    reconstruction: Tensor, video: Tensor, mean: Tensor, logvar: Tensor, *, kl: float = 1e-6, **weights: float
) -> dict[str, Tensor]:
    """`pixel_loss` of a reconstruction [B, 3, T, H, W], with `weights`, and the posterior's distance from a normal.

    "loss" has `kl` * "kl" more, the mean over the posterior's elements, `mean` and `logvar` [B, 16, T', h, w].
    """
    logvar = logvar.float().clamp(*LOGVAR_RANGE)
    divergence = 0.5 * (mean.float().square() + logvar.exp() - 1 - logvar).mean()
    terms = pixel_loss(reconstruction, video, **weights)
    return {**terms, "loss": terms["loss"] + kl * divergence, "kl": divergence}


def texture_distance(reconstruction: Tensor, video: Tensor) -> Tensor:
    """By how much the strength of detail differs between two videos [B, 3, T, H, W], wherever exactly it is: a scalar.

    Compares the root mean square of pixel differences in patches of 8 x 8: grass may be other grass, but not a blur.
    Without this loss, detail that a latent can't hold is best painted as its mean.
    """
    return (_roughness(reconstruction) - _roughness(video)).abs().mean()


def _roughness(video: Tensor) -> Tensor:
    """Root mean square of the differences between neighbouring pixels, over patches: [B, 3 T, H / 8, W / 8]."""
    frames = rearrange(video, "b c t h w -> b (c t) h w")
    down, right = F.pad(frames.diff(dim=-2), (0, 0, 0, 1)), F.pad(frames.diff(dim=-1), (0, 1))
    return (F.avg_pool2d(down.square() + right.square(), TEXTURE_PATCH, ceil_mode=True) + TEXTURE_FLOOR).sqrt()


def _gradient(error: Tensor) -> Tensor:
    """Mean absolute difference of neighbours in time, height and width, over the axes that have neighbours."""
    axes = [axis for axis in (2, 3, 4) if error.shape[axis] > 1]
    if not axes:
        return error.new_zeros(())
    return torch.stack([error.diff(dim=axis).abs().mean() for axis in axes]).mean()


def stage1_loss(dit: Network, latent: Tensor, context: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Stage I's mean squared error of v on the zero-SNR table, a scalar.

    `latent` and `noise` are [B, C, T, H, W] in the model's scaled space, `timestep` [B] whole numbers from 0 to 999.
    Raises ValueError for other timesteps.
    """
    _check_timestep(timestep, len(latent))
    signal = _over_latent(zero_snr_signal().to(latent.device)[timestep])
    spread = (1 - signal**2).sqrt()
    clean, noise = latent.float(), noise.float()
    v = dit((signal * clean + spread * noise).to(latent.dtype), timestep, context)
    return F.mse_loss(v.float(), signal * noise - spread * clean)


def _check_timestep(timestep: Tensor, batch: int) -> None:
    if timestep.shape != (batch,) or timestep.is_floating_point():
        raise ValueError(
            f"timestep must hold one whole number for each of {batch} latents; got {timestep.dtype} "
            f"{list(timestep.shape)}"
        )
    if int(timestep.min()) < 0 or int(timestep.max()) >= TRAIN_STEPS:
        raise ValueError(f"timesteps are 0 to {TRAIN_STEPS - 1}; got {timestep.tolist()}")


class FlowPoint(NamedTuple):
    """A point on the straight line from degraded to clean, and the velocity that the network should predict there."""

    latent: Tensor  # [B, C, T, H, W]
    timestep: Tensor  # [B], 1000 at the degraded end and 0 at the clean one
    velocity: Tensor  # [B, C, T, H, W], clean - degraded

    def end(self, velocity: Tensor) -> Tensor:
        """The clean latent that a velocity leads to from here, in one straight step."""
        return self.latent + _over_latent(self.timestep / TRAIN_STEPS) * velocity


class FlowStep(NamedTuple):
    """What the network predicts at a point of the flow."""

    loss: Tensor  # mean squared error of the velocity, a scalar
    clean: Tensor  # where that velocity leads, [B, C, T, H, W]


def flow_point(degraded: Tensor, clean: Tensor, uniform: Tensor, shift: float = STAGE2_SHIFT) -> FlowPoint:
    """Points between `degraded` and `clean` [B, C, T, H, W], at the shifted times of `uniform` [B] in [0, 1]."""
    if uniform.shape != (len(clean),):
        raise ValueError(f"uniform must hold one number for each of {len(clean)} latents; got {list(uniform.shape)}")
    times = shift_times(uniform.float(), shift)
    degraded, clean = degraded.float(), clean.float()
    t = _over_latent(times)
    return FlowPoint((1 - t) * degraded + t * clean, TRAIN_STEPS - TRAIN_STEPS * times, clean - degraded)


def flow_step(
    dit: Network,
    degraded: Tensor,
    clean: Tensor,
    context: Tensor,
    uniform: Tensor,
    degradation_step: Tensor,
    *,
    shift: float = STAGE2_SHIFT,
) -> FlowStep:
    """Run stage II's network at one point of the flow from `degraded` to `clean`.

    Both are latents [B, C, T, H, W] in the model's scaled space, `degradation_step` [B] is how far each was degraded,
    `uniform` [B] drawn evenly from [0, 1].
    """
    point = flow_point(degraded, clean, uniform, shift)
    v = dit(point.latent.to(clean.dtype), point.timestep, context, degradation_step=degradation_step).float()
    return FlowStep(F.mse_loss(v, point.velocity), point.end(v))


def own_flow_step(
    dit: Network,
    degraded: Tensor,
    clean: Tensor,
    context: Tensor,
    uniform: Tensor,
    degradation_step: Tensor,
    *,
    shift: float = STAGE2_SHIFT,
) -> FlowStep:
    """Run stage II's network at a point that it has come to by itself, as a sampler's later steps do.

    From `degraded` it leads straight to a first guess; the point lies on that line, at the shifted time of `uniform`.
    In `flow_step` a late point shows most of the clean latent, and the network learns to trust the detail there: what
    it then makes of a guess is sharper than what is true (scheduled sampling, arXiv 1506.03099, is the same for
    words). The arguments are `flow_step`'s; the loss is the mean squared error of where the velocity leads to.
    """
    start = flow_point(degraded, degraded, torch.zeros_like(uniform))
    with torch.no_grad():
        guess = start.end(dit(degraded.to(clean.dtype), start.timestep, context, degradation_step=degradation_step))
    point = flow_point(degraded, guess, uniform, shift)
    v = dit(point.latent.to(clean.dtype), point.timestep, context, degradation_step=degradation_step).float()
    end = point.end(v)
    return FlowStep(F.mse_loss(end, clean.float()), end)


def drop_captions(
    context: Tensor, generator: torch.Generator, probability: float = CAPTION_DROPOUT, rows: Rows | None = None
) -> Tensor:
    """Zero whole captions of [B, tokens, width], each with `probability`: from these the network learns guidance.

    `rows` says which part of its batch `context` is; None: all of it.
    """
    rows = rows or Rows.whole(0, len(context))
    kept = rows.of(torch.rand(rows.count, generator=generator, device=generator.device) >= probability)
    return torch.where(kept.to(context.device)[:, None, None], context, 0)


def _over_latent(values: Tensor) -> Tensor:
    return values[:, None, None, None, None]
