"""Speed of this device: the networks' own layers, run on noise for about a second.

The rates include the layers' other work (norms, activations, rotations, copies) in its usual proportion, so that
operations divided by a rate give a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor, nn

from ..config import DiTConfig, VAEConfig, video_shape
from ..dit import FlashVideoDiT, attention_sdpa
from ..vae import VideoVAE
from .flops import Flops, decode_flops, dit_flops
from .plan import Setting

CALIBRATION_SECONDS = 1.0
CALIBRATION_LAYERS = 2
TEXT = 16  # tokens; few beside the video's
# A CPU takes seconds to fill wide layers with noise, and has the same rate with narrower ones.
CPU_WIDTH = 768
CPU_CHANNELS = 64
# Smallest and largest side of the square test latent, doubled until a run is long enough to time.
DIT_SIDES = (8, 128)
ATTENTION_TOKENS = (256, 32768)
VAE_SIDES = (2, 32)
LATENT_FRAMES = 2
CALIBRATION_BYTES = 4 * 2**30  # peak memory of a calibration


@dataclass(frozen=True)
class Rates:
    """Operations per second by kind of work, and the device they were measured on, or estimated for."""

    device: str
    matmul: float
    attention: float
    convolution: float
    measured: bool = True

    def seconds(self, flops: Flops) -> float:
        """Time in seconds for an amount of work."""
        return flops.matmul / self.matmul + flops.attention / self.attention + flops.convolution / self.convolution


# (size) -> (a run that returns its result, its number of operations)
Work = Callable[[int], tuple[Callable[[], Tensor], float]]


class CalibratedRates:
    """The rates of a device for a setting; each kind of network and data type is measured once."""

    def __init__(self, device: torch.device | str, seconds: float = CALIBRATION_SECONDS) -> None:
        self.device, self.seconds = torch.device(device), seconds
        self._known: dict[tuple[torch.dtype, DiTConfig, VAEConfig], Rates] = {}

    def __call__(self, setting: Setting) -> Rates:
        """The rates for a setting, measured on the first call."""
        networks = setting.networks
        key = setting.numerics.compute, networks.stage2, networks.vae
        if key not in self._known:
            self._known[key] = calibrate(self.device, *key, seconds=self.seconds)
        return self._known[key]


@torch.inference_mode()
def calibrate(
    device: torch.device | str,
    dtype: torch.dtype,
    dit: DiTConfig,
    vae: VAEConfig,
    *,
    seconds: float = CALIBRATION_SECONDS,
) -> Rates:
    """Measure a device with layers like those of `dit` and `vae`, in about `seconds`."""
    device = torch.device(device)
    share = seconds / 3
    return Rates(
        device_name(device),
        matmul=_rate(_linear_layers(dit, device, dtype), DIT_SIDES, share),
        attention=_rate(_attention(dit, device, dtype), ATTENTION_TOKENS, share),
        convolution=_rate(_decoder(vae, device, dtype), VAE_SIDES, share),
    )


def device_name(device: torch.device) -> str:
    """Name of a device: "NVIDIA H100", "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _rate(work: Work, sizes: tuple[int, int], seconds: float) -> float:
    """Operations per second at the largest size that fits the time, the best of several runs."""
    size, largest = sizes
    end = time.perf_counter() + seconds
    while True:
        run, operations = work(size)
        _time(run)  # to warm up
        taken = _time(run)
        # The next size takes at least four times as long, and runs twice.
        if time.perf_counter() + 8 * taken > end or size >= largest:
            break
        size *= 2
    while time.perf_counter() + taken < end:
        taken = min(taken, _time(run))
    return operations / taken


def _time(run: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    run().flatten()[0].item()  # waits for the device
    return time.perf_counter() - started


def _linear_layers(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> Work:
    heads = config.num_heads
    if device.type == "cpu":
        heads = max(1, min(heads, CPU_WIDTH // config.head_dim))
    width = heads * config.head_dim
    config = replace(
        config,
        num_layers=CALIBRATION_LAYERS,
        hidden_size=width,
        num_heads=heads,
        ff_dim=config.ff_dim * width // config.hidden_size,
    )
    network = _noise(FlashVideoDiT(config, device="meta", dtype=dtype), device)
    step = torch.zeros(1, device=device) if config.degradation_embedding else None

    def skip(q: Tensor, _k: Tensor, _v: Tensor, _heads: int, _start: int) -> Tensor:
        return rearrange(q, "b heads n width -> b n (heads width)")

    def work(side: int) -> tuple[Callable[[], Tensor], float]:
        latent = torch.randn(1, config.in_channels, LATENT_FRAMES, side, side, device=device, dtype=dtype)
        context = torch.randn(1, TEXT, config.text_dim, device=device, dtype=dtype)
        timestep = torch.zeros(1, device=device)
        flops = dit_flops(config, (LATENT_FRAMES, side, side), TEXT).matmul
        return lambda: network(latent, timestep, context, degradation_step=step, attention=skip), flops

    return work


def _attention(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> Work:
    def work(tokens: int) -> tuple[Callable[[], Tensor], float]:
        q, k, v = torch.randn(3, 1, config.num_heads, tokens, config.head_dim, device=device, dtype=dtype)
        return lambda: attention_sdpa(q, k, v, config.num_heads), 4 * tokens**2 * config.hidden_size

    return work


def _decoder(config: VAEConfig, device: torch.device, dtype: torch.dtype) -> Work:
    if device.type == "cpu":
        config = replace(config, base_channels=min(config.base_channels, CPU_CHANNELS))
    config = replace(config, encoder_blocks=1)
    network = _noise(VideoVAE(config, device="meta", dtype=dtype), device)

    def work(side: int) -> tuple[Callable[[], Tensor], float]:
        latent = torch.randn(1, config.latent_channels, LATENT_FRAMES, side, side, device=device, dtype=dtype)
        flops = decode_flops(config, *video_shape((LATENT_FRAMES, side, side))).total
        return lambda: network.decode(latent), flops

    return work


def _noise(network: nn.Module, device: torch.device) -> nn.Module:
    """Weights that are not zero: some devices are faster with zeros."""
    network.to_empty(device=device)
    for weight in network.parameters():
        weight.uniform_(-0.03, 0.03)
    return network.eval()
