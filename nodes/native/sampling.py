"""FlashVideo's two noise laws as ComfyUI model samplings.

ComfyUI's samplers know the noise level as sigma. Stage I is v-prediction, so sigma = sqrt(1 - s^2) / s with
s = sqrt(alpha-bar). Stage II is a flow whose start is the degraded latent; in the same way its sigma is the weight of
the noise divided by that of the latent.
"""

from __future__ import annotations

import comfy.model_sampling
import torch
from torch import Tensor

from ...flashvideo.config import DEGRADATION_STEP, SPATIAL_FACTOR, STAGE2_SHIFT, TRAIN_STEPS
from ...flashvideo.degradation import AutoStrength, degradation_weights
from ...flashvideo.samplers import v_to_clean
from ...flashvideo.schedule import Stage1Schedule, stage1_schedule, zero_snr_signal

# The smallest signal that keeps sigma finite; ComfyUI's own zero-terminal-SNR tables end at its square.
SMALLEST_SIGNAL = 4.8973451890853435e-08**0.5


def signal_to_sigma(signal: Tensor) -> Tensor:
    """sigma = sqrt(1 - s^2) / s, with s clamped above zero."""
    signal = signal.clamp(min=SMALLEST_SIGNAL)
    return (1 - signal**2).clamp(min=0).sqrt() / signal


def stage1_sigmas(steps: int, denoise: float = 1.0) -> Tensor:
    """Stage I's official steps as sigmas [steps + 1], down to 0; `denoise` below 1 is the end of a longer run.

    Empty at `denoise` 0.
    """
    if denoise <= 0:
        return torch.empty(0)
    whole = min(TRAIN_STEPS, max(steps, int(steps / denoise)))
    return signal_to_sigma(stage1_schedule(whole).signal)[-(steps + 1) :]


def per_sample(value: Tensor, ndim: int) -> Tensor:
    """[B] or [] to a shape that broadcasts against a latent of `ndim` dimensions."""
    return value.reshape(value.shape[:1] + (1,) * (ndim - 1)) if value.ndim else value


class Stage1Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
    """Stage I for ComfyUI's own samplers: FlashVideo's zero-terminal-SNR table in sigmas."""

    def __init__(self) -> None:
        super().__init__()
        self.set_sigmas(signal_to_sigma(zero_snr_signal()))


class Stage1ExactSampling(torch.nn.Module):
    """Stage I as the official sampler runs it: the latent stays variance preserving.

    The first step's signal is exactly zero, which no finite sigma can express, so the official trajectory is computed
    in its own variables. A sigma only selects the nearest step. The sigmas are those of `Stage1Sampling`, so that
    conditioning, and patches that were made for it, apply to the right part of the run.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        schedule = stage1_schedule(steps)
        self.schedule: Stage1Schedule = schedule
        self.register_buffer("sigmas", signal_to_sigma(schedule.signal[:-1]).flip(0))
        self.register_buffer("timesteps", schedule.timesteps.flip(0).float())
        self.register_buffer("quantized_signal", schedule.quantized_signal.flip(0))

    @property
    def sigma_min(self) -> Tensor:
        """The last step's."""
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        """The first step's."""
        return self.sigmas[-1]

    def timestep(self, sigma: Tensor) -> Tensor:
        """The network's timestep."""
        return self.timesteps.to(sigma.device)[self._step(sigma)].view(sigma.shape)

    def sigma(self, timestep: Tensor) -> Tensor:
        """The inverse of `timestep`, for any of the 1000."""
        return Stage1Sampling().sigma(timestep)

    def percent_to_sigma(self, percent: float) -> float:
        """Sigma after a share of the run, for conditioning that holds for a part of it."""
        return Stage1Sampling().percent_to_sigma(percent)

    def _step(self, sigma: Tensor) -> Tensor:
        """Which of the schedule's steps, counted from the last, each sigma is."""
        return (self.sigmas.to(sigma.device)[:, None] - sigma.flatten()).abs().argmin(dim=0)

    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        """The network sees the latent unchanged; a copy, since other nodes may write to their input."""
        return noise.clone()

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        """The clean latent that v-prediction implies, with the quantised signal of the step."""
        signal = self.quantized_signal.to(sigma.device)[self._step(sigma)].to(model_input.dtype)
        return v_to_clean(model_input, model_output, per_sample(signal, model_input.ndim))

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        """Stage I starts from noise alone."""
        return noise.clone()

    def inverse_noise_scaling(self, sigma: Tensor, latent: Tensor) -> Tensor:
        """The result is the clean latent."""
        return latent.clone()


def refiner_weights(strength: int) -> tuple[float, float]:
    """Weights of signal and noise where stage II begins; the signal's is clamped above zero at strength 999."""
    signal, noise = degradation_weights(strength)
    return max(signal, SMALLEST_SIGNAL), noise


def flow_to_sigma(place: Tensor, strength: int) -> Tensor:
    """ComfyUI's sigma for a place on stage II's flow, 1 where it begins and 0 where it ends."""
    signal, noise = refiner_weights(strength)
    return place * noise / (1 - place + place * signal)


def sigma_to_flow(sigma: Tensor, strength: int) -> Tensor:
    """The inverse of `flow_to_sigma`."""
    signal, noise = refiner_weights(strength)
    return sigma / (noise + sigma * (1 - signal))


LOWEST_STEP, LAST_STEPS = 10, 20  # of the flow's 1000: the smallest, and up to which the table is squeezed


class RefinerSampling(comfy.model_sampling.ModelSamplingDiscreteFlow):
    """Stage II: a flow that starts at the degraded latent.

    With a, b the weights of signal and noise at the degradation strength, the path is
    x(p) = (1 - p (1 - a)) latent + p b noise: the latent itself at p = 0, the official start at p = 1, in between for
    a lower refine strength. ComfyUI's samplers take a sample for latent + sigma noise, and those that add noise at
    every step rely on it; so they get x(p) divided by the weight of its latent. Euler's steps don't change by that.
    """

    def __init__(self, degradation_step: int = DEGRADATION_STEP, shift: float = STAGE2_SHIFT) -> None:
        torch.nn.Module.__init__(self)  # not the parent's, whose table of sigmas would need the strength before
        self.degradation_step = int(degradation_step)
        self.signal_weight, self.noise_weight = refiner_weights(self.degradation_step)
        self.set_parameters(shift=shift)
        # Schedulers that end at the smallest sigma jump to it from the step before, and multistep samplers fail when
        # the jump is too large. So the table's end is moved up, but not where 50 steps of `simple` would notice.
        steps = torch.arange(1, LAST_STEPS + 1) * (1 - LOWEST_STEP / LAST_STEPS) + LOWEST_STEP
        self.sigmas[:LAST_STEPS] = self.sigma(steps)

    def timestep(self, sigma: Tensor) -> Tensor:
        """The network's timestep, 1000 where the flow begins."""
        return sigma_to_flow(sigma, self.degradation_step) * self.multiplier

    def sigma(self, timestep: Tensor) -> Tensor:
        """The sigma of a timestep, after the shift."""
        return flow_to_sigma(super().sigma(timestep), self.degradation_step)

    def percent_to_sigma(self, percent: float) -> float:
        """Sigma after a share of the run, for conditioning that holds for a part of it."""
        return flow_to_sigma(super().percent_to_sigma(percent), self.degradation_step)

    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        """The sample as it is on the flow."""
        sigma = per_sample(sigma, noise.ndim)
        return noise * self.noise_weight / (self.noise_weight + sigma * (1 - self.signal_weight))

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        """Where the flow would end if it went on straight."""
        place = sigma_to_flow(per_sample(sigma, model_input.ndim), self.degradation_step)
        return self.calculate_input(sigma, model_input) + place * model_output

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        """The latent degradation."""
        return latent_image + per_sample(sigma, noise.ndim) * noise

    def inverse_noise_scaling(self, sigma: Tensor, latent: Tensor) -> Tensor:
        """A run that continues another one without new noise."""
        return latent.clone()


class AutoRefinerSampling(RefinerSampling):
    """Stage II at the strength that suits the picture's size, which is not known before a sampler starts.

    Schedulers make their sigmas from this one, at the official strength. They name places on the flow, so that they
    can be moved to the sigmas of another strength. `guard_degradation` does that when the latent is there.
    """

    def __init__(self, shift: float = STAGE2_SHIFT, strength: int | AutoStrength | None = None) -> None:
        super().__init__(DEGRADATION_STEP, shift)
        self._strength = strength

    def strength_for(self, latent: Tensor) -> int:
        """The strength that suits a latent [B, C, T, H, W]."""
        return auto_latent_strength(latent, self._strength)

    def at(self, strength: int) -> RefinerSampling:
        """The sampling for a known strength."""
        return RefinerSampling(strength, self.shift)

    def moved(self, sigmas: Tensor, strength: int) -> Tensor:
        """Sigmas of this sampling as those of `strength`, at the same places on the flow."""
        return flow_to_sigma(sigma_to_flow(sigmas, self.degradation_step), strength)

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        """The latent degradation outside of a run, as AddNoise does it."""
        strength = self.strength_for(latent_image)
        return self.at(strength).noise_scaling(self.moved(sigma, strength), noise, latent_image, max_denoise)


def auto_latent_strength(latent: Tensor, strength: int | AutoStrength | None = None) -> int:
    """A strength for a latent [B, C, T, H, W]: a number stays, others follow from its size; None is the official's."""
    if isinstance(strength, int):
        return strength
    height, width = (SPATIAL_FACTOR * side for side in latent.shape[-2:])
    return (strength or AutoStrength())(height, width)
