"""Latent degradation: noise that hides a draft's flaws and leaves its layout (FlashVideo section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .config import DEGRADATION_STEP, NANO_REFINERS, NANO_STRENGTH, TRAIN_STEPS, DiTConfig
from .schedule import zero_snr_signal

OFFICIAL_SHORT_SIDE = 1072  # pixels: 1920x1072, the size that FlashVideo's strengths belong to
OFFICIAL_LATENT_FRAMES = 13  # 49 frames


def degradation_weights(step: int = DEGRADATION_STEP) -> tuple[float, float]:
    """Weights of signal and noise at a degradation step: (a, b) with a^2 + b^2 = 1; 675 gives 0.264 and 0.965.

    `step` is 0 (almost clean) to 999 (noise alone). Raises ValueError outside.
    """
    if not 0 <= step < TRAIN_STEPS:
        raise ValueError(f"the degradation strength must be 0 to {TRAIN_STEPS - 1}; got {step}")
    signal = zero_snr_signal()[int(step)]
    return float(signal), float((1 - signal**2).sqrt())


def auto_strength(
    height: int, width: int, latent_frames: int | None = None, *, strength: int = DEGRADATION_STEP
) -> int:
    """The strength, 0 to 999, that does to a picture of `height` x `width` pixels what `strength` does to 1920x1072.

    The same share of the picture gets the same signal-to-noise ratio. A thing that fills a tenth of the height covers
    (1072 / S)^2 times fewer pixels at a short side of S, and noise averages out over pixels, so that

        SNR(result) = SNR(strength) * (1072 / S)^2,   SNR(k) = s_k^2 / (1 - s_k^2),

    with s_k the 1000-entry table and the nearest entry as the result. `latent_frames` counts time in the same way,
    with a factor of 13 / latent_frames; None leaves time out. 448x256 gives 298, with its 17 frames 177. FlashVideo's
    authors lower the strength for smaller pictures, too, by hand. Raises ValueError for a size below 1 pixel, fewer
    than 1 frame, or a strength that `degradation_weights` refuses.
    """
    if min(height, width) < 1 or (latent_frames is not None and latent_frames < 1):
        raise ValueError(f"auto strength needs at least 1 pixel and 1 frame; got {width}x{height}, {latent_frames}")
    degradation_weights(strength)
    power = zero_snr_signal().double() ** 2
    ratio = power / (1 - power)  # [1000], descending
    wanted = ratio[strength] * (OFFICIAL_SHORT_SIDE / min(height, width)) ** 2
    if latent_frames is not None:
        wanted = wanted * OFFICIAL_LATENT_FRAMES / latent_frames
    return int((ratio - wanted).abs().argmin())


@dataclass(frozen=True)
class AutoStrength:
    """The strength that does to another size what `official` does to 1920x1072. Raises ValueError beyond 0 to 999."""

    official: int = DEGRADATION_STEP

    def __post_init__(self) -> None:
        degradation_weights(self.official)

    def __call__(self, height: int, width: int) -> int:
        """The strength for a picture of this size in pixels; see `auto_strength`."""
        return auto_strength(height, width, strength=self.official)

    def __str__(self) -> str:
        return f"auto, from {self.official} at 1080p"


def suited_strength(strength: int | AutoStrength | None, config: DiTConfig | None) -> int | AutoStrength | None:
    """What an automatic strength means for a stage II of this form; a number stays.

    The official form's follows from the size; None is the official 675's. FlashVideo-Nano has one of its own at every
    size and for every preset: it is best with little noise (docs/nano_footage.md, "Without weak strengths").
    """
    return NANO_STRENGTH if config in NANO_REFINERS and not isinstance(strength, int) else strength


def strength_in_words(strength: int, config: DiTConfig | None, size: object) -> str:
    """A strength that was chosen automatically, and for what: FlashVideo-Nano, or a picture's size."""
    return f"strength {strength} (auto, for {'FlashVideo-Nano' if config in NANO_REFINERS else size})"


def degrade_latent(latent: Tensor, noise: Tensor, step: int = DEGRADATION_STEP) -> Tensor:
    """Degrade a latent [B, C, T, H, W] of the model's scaled space with `noise` of the same shape."""
    signal_weight, noise_weight = degradation_weights(step)
    return latent * signal_weight + noise * noise_weight
