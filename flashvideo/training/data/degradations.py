"""Degradations of clean clips, which make them as poor as drafts: stage II learns from these (FlashVideo section 3.3).

A transform takes a clip [3, T, H, W] in [-1, 1], float32, and a CPU generator for all its random numbers. It returns a
new clip in [-1, 1] on the same device and doesn't change its input. Its parameters are drawn once per clip, so that no
degradation flickers except noise. Transforms are settings as well: frozen dataclasses whose ranges (low, high) a config
can set.

The weak pixel degradation is the official code's. It left the strong one out; ours follows the practice of
Real-ESRGAN (arXiv 2107.10833) and RealBasicVSR (arXiv 2111.12704): blur, resizing, noise and compression in random
order, twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...degradation import degrade_latent
from ..randomness import randint
from .video_compression import compress_h264, compress_jpeg, compress_mpeg4

KERNEL_REACH = 3  # a Gaussian's kernel ends at so many standard deviations
SINC_RADIUS = 10  # pixels, as in Real-ESRGAN
SMALLEST_SIDE = 16  # resizing stops there, in pixels
RESAMPLERS = ("bilinear", "bicubic", "area")
ENLARGERS = ("bilinear", "bicubic")  # "area" would make blocks, which no player shows
WHITE = 2.0  # from black to white in [-1, 1]
LUMA = (0.299, 0.587, 0.114)  # BT.601


class Transform(Protocol):
    """A degradation of one clip."""

    def __call__(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """[3, T, H, W] -> [3, T, H, W]; only `Resize` changes height and width."""
        ...


# Random numbers


def _uniform(generator: torch.Generator, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def _log_uniform(generator: torch.Generator, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return math.exp(_uniform(generator, (math.log(low), math.log(high))))


def _happens(generator: torch.Generator, probability: float) -> bool:
    return float(torch.rand((), generator=generator)) < probability


def _one_of(generator: torch.Generator, choices: Sequence[str]) -> str:
    return choices[randint(generator, 0, len(choices) - 1)]


# Resizing


def resize_frames(video: Tensor, height: int, width: int, resampler: str) -> Tensor:
    """[3, T, H, W] -> [3, T, height, width] by one of RESAMPLERS, antialiased, clamped to [-1, 1]."""
    if resampler not in RESAMPLERS:
        raise ValueError(f"resampler must be one of {', '.join(RESAMPLERS)}; got {resampler!r}")
    options = {} if resampler == "area" else {"antialias": True, "align_corners": False}
    resized = F.interpolate(rearrange(video, "c t h w -> t c h w"), (height, width), mode=resampler, **options)
    return rearrange(resized, "t c h w -> c t h w").clamp(-1, 1)


def shrink_and_enlarge(video: Tensor, factor: float) -> Tensor:
    """Remove the detail that a `factor` times smaller clip [3, T, H, W] can't hold: the official weak degradation.

    Bilinear and antialiased, down to floor(side / factor) and back up. On the way down the coordinates follow
    `factor` itself, not the quotient of the whole sides, so a factor that doesn't divide them stretches the clip, by
    less than `factor` pixels at its end. Raises ValueError if no pixel would be left or factor < 1.
    """
    height, width = video.shape[-2:]
    if not 1 <= factor <= min(height, width):
        raise ValueError(f"factor must be from 1 to the shorter side of {height}x{width} pixels; got {factor}")
    options = {"mode": "bilinear", "antialias": True, "align_corners": False}
    frames = rearrange(video, "c t h w -> t c h w")
    small = F.interpolate(frames, scale_factor=1 / factor, recompute_scale_factor=False, **options)
    return rearrange(F.interpolate(small, (height, width), **options), "t c h w -> c t h w")


@dataclass(frozen=True)
class WeakDegradation:
    """`shrink_and_enlarge` by a factor from a range: the official code has 4, and 4 to 8 in a comment."""

    factor: tuple[float, float] = (4.0, 4.0)

    def __call__(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """[3, T, H, W] -> the same shape."""
        return shrink_and_enlarge(video, _uniform(generator, self.factor))


@dataclass(frozen=True)
class Resize:
    """Resize by a random scale with a random kernel, and leave it so: `StrongDegradation` restores the size."""

    scale: tuple[float, float] = (0.35, 1.2)

    def __call__(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """[3, T, H, W] -> [3, T, H', W'], no side below SMALLEST_SIDE unless it was."""
        scale = _log_uniform(generator, self.scale)
        height, width = (max(round(side * scale), min(side, SMALLEST_SIDE)) for side in video.shape[-2:])
        return resize_frames(video, height, width, _one_of(generator, RESAMPLERS if scale < 1 else ENLARGERS))


# Blur


def gaussian_kernel(along: float, across: float, angle: float = 0.0) -> Tensor:
    """Gaussian of standard deviations `along` and `across`, in pixels, turned by `angle` radians: [K, K], sum 1."""
    if min(along, across) <= 0:
        raise ValueError(f"a blur's standard deviations must be above 0 pixels; got {along} and {across}")
    radius = math.ceil(KERNEL_REACH * max(along, across))
    x, y = _grid(radius)
    u = x * math.cos(angle) + y * math.sin(angle)
    v = y * math.cos(angle) - x * math.sin(angle)
    kernel = torch.exp(-0.5 * ((u / along) ** 2 + (v / across) ** 2))
    return kernel / kernel.sum()


def sinc_kernel(cutoff: float) -> Tensor:
    """Round low-pass filter that ends at `cutoff`, 0 to pi radians a pixel, and rings: [21, 21], sum 1."""
    x, y = _grid(SINC_RADIUS)
    distance = (x**2 + y**2).sqrt()
    distance[SINC_RADIUS, SINC_RADIUS] = 1  # replaced by the formula's limit below
    kernel = cutoff * torch.special.bessel_j1(cutoff * distance) / (2 * math.pi * distance)
    kernel[SINC_RADIUS, SINC_RADIUS] = cutoff**2 / (4 * math.pi)
    return kernel / kernel.sum()


def _grid(radius: int) -> tuple[Tensor, Tensor]:
    steps = torch.arange(-radius, radius + 1, dtype=torch.float64)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return x, y


def filter_frames(video: Tensor, kernel: Tensor) -> Tensor:
    """Convolve every frame of [3, T, H, W] with [K, K], K odd; borders repeat the last pixel; clamped to [-1, 1]."""
    reach = kernel.shape[0] // 2
    padded = F.pad(video, (reach, reach, reach, reach), mode="replicate")
    padded = rearrange(padded, "c t h w -> (c t) h w")
    # As channels of one picture frames go through several times faster on a CPU than as a batch of one channel.
    kernels = kernel.to(video).repeat(len(padded), 1, 1, 1)
    return F.conv2d(padded[None], kernels, groups=len(padded)).view(video.shape).clamp(-1, 1)


@dataclass(frozen=True)
class Blur:
    """A Gaussian, round or oblong, or sometimes a sinc filter, which rings at edges as sharpened videos do."""

    sigma: tuple[float, float] = (0.3, 2.0)  # pixels
    oblong: float = 0.5  # probability that the two directions' sigmas differ
    sinc: float = 0.1  # probability of the sinc filter
    cutoff: tuple[float, float] = (math.pi / 3, math.pi)  # radians a pixel

    def __call__(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """[3, T, H, W] -> the same shape."""
        if _happens(generator, self.sinc):
            return filter_frames(video, sinc_kernel(_uniform(generator, self.cutoff)))
        along = across = _uniform(generator, self.sigma)
        if _happens(generator, self.oblong):
            across = _uniform(generator, self.sigma)
        return filter_frames(video, gaussian_kernel(along, across, _uniform(generator, (0, math.pi))))


# Noise


def add_gaussian_noise(
    video: Tensor, sigma: float, generator: torch.Generator, *, grey: bool = False, still: bool = False
) -> Tensor:
    """Add normal noise to [3, T, H, W] with standard deviation `sigma` in levels of 255, clamped to [-1, 1].

    `grey` is the same noise in the three colours, `still` the same in all frames.
    """
    channels, frames, height, width = video.shape
    shape = (1 if grey else channels, 1 if still else frames, height, width)
    noise = torch.randn(shape, generator=generator).to(video)
    return (video + noise * (sigma / 255 * WHITE)).clamp(-1, 1)


def add_photon_noise(
    video: Tensor, photons: float, generator: torch.Generator, *, grey: bool = False, still: bool = False
) -> Tensor:
    """Add Poisson noise to [3, T, H, W], that of `photons` counted photons at white; clamped to [-1, 1].

    With x the brightness in [0, 1], the variance is x / photons. `grey` counts the luma's and adds their noise to the
    three colours, `still` adds the first frame's noise to all.
    """
    bright = (video.cpu() + 1) / WHITE
    if grey:
        bright = torch.einsum("c,cthw->thw", torch.tensor(LUMA), bright)[None]
    if still:
        bright = bright[:, :1]
    bright = bright.clamp(0, 1)
    noise = torch.poisson(bright * photons, generator=generator) / photons - bright
    return (video + WHITE * noise.to(video)).clamp(-1, 1)


@dataclass(frozen=True)
class Noise:
    """Gaussian noise (sensors when it's dark) or Poisson noise (light itself)."""

    sigma: tuple[float, float] = (1.0, 12.0)  # Gaussian's, in levels of 255
    photons: tuple[float, float] = (150.0, 10000.0)  # Poisson's, at white
    poisson: float = 0.5  # probability of Poisson
    grey: float = 0.4  # probability that the colours share it
    still: float = 0.2  # probability that the frames share it, like that of a dirty lens

    def __call__(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """[3, T, H, W] -> the same shape."""
        kind = {"grey": _happens(generator, self.grey), "still": _happens(generator, self.still)}
        if _happens(generator, self.poisson):
            return add_photon_noise(video, _log_uniform(generator, self.photons), generator, **kind)
        return add_gaussian_noise(video, _uniform(generator, self.sigma), generator, **kind)


# Compression


@dataclass(frozen=True)
class JPEG:
    """Every frame through JPEG at one quality."""

    quality: tuple[int, int] = (40, 95)

    def __call__(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """[3, T, H, W] -> the same shape."""
        return compress_jpeg(video, randint(generator, *self.quality))


@dataclass(frozen=True)
class VideoCompression:
    """H.264 at a constant rate factor, or MPEG-4 at a constant quantiser. Needs PyAV."""

    crf: tuple[int, int] = (20, 36)
    quantiser: tuple[int, int] = (2, 12)
    mpeg4: float = 0.3  # probability of MPEG-4

    def __call__(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """[3, T, H, W] -> the same shape."""
        if _happens(generator, self.mpeg4):
            return compress_mpeg4(video, randint(generator, *self.quantiser))
        return compress_h264(video, randint(generator, *self.crf))


# Chains


@dataclass(frozen=True)
class Sometimes:
    """A transform that is applied with a probability."""

    transform: Transform
    probability: float

    def __call__(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """[3, T, H, W] -> what the transform makes of it, or itself."""
        return self.transform(video, generator) if _happens(generator, self.probability) else video


@dataclass(frozen=True)
class RandomOrder:
    """Several transforms, one after the other, in an order that is drawn for each clip."""

    transforms: tuple[Transform, ...]

    def __call__(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """[3, T, H, W] -> what the last transform makes of it."""
        for index in torch.randperm(len(self.transforms), generator=generator).tolist():
            video = self.transforms[index](video, generator)
        return video


@dataclass(frozen=True)
class StrongDegradation:
    """Rounds of blur, resizing, noise, JPEG and video compression, each round in its own random order.

    Each is applied with its own probability; at the end the clip is resized to the size it had.
    """

    rounds: int = 2
    blur: Blur = Blur()
    blur_probability: float = 0.7
    resize: Resize = Resize()
    resize_probability: float = 0.8
    noise: Noise = Noise()
    noise_probability: float = 0.5
    jpeg: JPEG = JPEG()
    jpeg_probability: float = 0.3
    compression: VideoCompression = VideoCompression()
    compression_probability: float = 0.5

    def __call__(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """[3, T, H, W] -> the same shape."""
        one_round = RandomOrder((
            Sometimes(self.blur, self.blur_probability),
            Sometimes(self.resize, self.resize_probability),
            Sometimes(self.noise, self.noise_probability),
            Sometimes(self.jpeg, self.jpeg_probability),
            Sometimes(self.compression, self.compression_probability),
        ))  # fmt: skip
        degraded = video
        for _ in range(self.rounds):
            degraded = one_round(degraded, generator)
        return resize_frames(degraded, *video.shape[-2:], _one_of(generator, ENLARGERS))


@dataclass(frozen=True)
class PixelDegradation:
    """The strong degradation with a probability, else the weak one, as the official code trains stage II."""

    strong_probability: float = 0.5
    weak: WeakDegradation = WeakDegradation()
    strong: StrongDegradation = StrongDegradation()

    def __call__(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """[3, T, H, W] -> the same shape."""
        strong = _happens(generator, self.strong_probability)
        return (self.strong if strong else self.weak)(video, generator)


# Latents


@dataclass(frozen=True)
class LatentDegradation:
    """Noise of a random strength on each latent of a batch; the strength is an input of the network."""

    steps: tuple[int, int] = (600, 750)  # both included; the official code's later range
    power: float = 1.0  # of the uniform number that picks the step; above 1, weak noise is drawn more often

    def __call__(self, latent: Tensor, uniform: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, T, H, W] in the model's scaled space -> the degraded latents, and the steps of each, [B] int64.

        `uniform` [B] on the CPU, drawn evenly from [0, 1], picks the steps; `noise` has the latent's shape.
        """
        low, high = self.steps
        steps = (low + (high + 1 - low) * uniform**self.power).long().clamp(max=high)
        return degrade_latents(latent, noise, steps), steps.to(latent.device)


def degrade_latents(latent: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
    """Degrade each latent of [B, C, T, H, W] with its noise, at its own step, [B] whole numbers from 0 to 999."""
    return torch.stack([degrade_latent(*each) for each in zip(latent, noise, steps.tolist(), strict=True)])
