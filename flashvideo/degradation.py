"""Latent degradation: noise that hides a draft's flaws and leaves its layout (FlashVideo section 3.3)."""

from __future__ import annotations

from torch import Tensor

from .schedule import TRAIN_STEPS, zero_snr_signal

DEGRADATION_STEP = 675  # 650 to 750 is useful


def degradation_weights(step: int = DEGRADATION_STEP) -> tuple[float, float]:
    """Weights of signal and noise at a degradation step: (a, b) with a^2 + b^2 = 1; 675 gives 0.264 and 0.965.

    `step` is 0 (almost clean) to 999 (noise alone). Raises ValueError outside.
    """
    if not 0 <= step < TRAIN_STEPS:
        raise ValueError(f"the degradation strength must be 0 to {TRAIN_STEPS - 1}; got {step}")
    signal = zero_snr_signal()[int(step)]
    return float(signal), float((1 - signal**2).sqrt())


def degrade_latent(latent: Tensor, noise: Tensor, step: int = DEGRADATION_STEP) -> Tensor:
    """Degrade a latent [B, C, T, H, W] of the model's scaled space with `noise` of the same shape."""
    signal_weight, noise_weight = degradation_weights(step)
    return latent * signal_weight + noise * noise_weight
