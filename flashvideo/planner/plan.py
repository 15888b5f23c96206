"""Estimates for a video before it is made: tokens, operations and memory of every phase.

The phases are those of the whole pipeline: text, draft (stage I), its decoding, encoding at the final size, stage II,
decoding. They run one after another and networks not in use leave the device, so the peak is that of the largest
phase. Sizes are pixels, lengths frames, memory bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..config import (
    NANO_STAGE1,
    NANO_STAGE2,
    NANO_TEXT_ENCODER,
    NANO_VAE,
    OVERLAP_FRAMES,
    PIXEL_MULTIPLE,
    SPATIAL_FACTOR,
    STAGE1,
    STAGE2,
    STAGE2_SCALE,
    TEXT_TOKENS,
    VAE,
    WINDOW,
    DiTConfig,
    T5Config,
    VAEConfig,
    latent_shape,
)
from ..devices import GIB
from ..dit import dit_tokens
from ..frames import MAX_SIDE, padded_shape
from ..guidance import MAX_SCALE
from ..memory import dit_bytes, parameters, sampler_bytes, t5_bytes, vae_outline
from ..refiner import tiles
from ..refiner.windows import plan_windows
from ..schedule import stage2_times
from ..vae.memory import decode_bytes, encode_bytes, plan_within
from .flops import Flops, decode_flops, dit_flops, encode_flops, t5_flops, tiling_factor

T5_XXL = T5Config(num_layers=24, d_model=4096, d_ff=10240, d_kv=64, num_heads=64)
DRAFT_PIXELS = 480 * 256  # of the official draft
# Phases that several cards share.
STAGE_1, STAGE_2, VAE_ENCODE, VAE_DECODE = "stage I", "stage II", "VAE encode", "VAE decode"
MAX_STEPS = 1000
MAX_FRAMES = 10_000_000  # five days at 24 a second
STORE = 16 * GIB  # of main memory, for what the VAE's tiles store between them


@dataclass(frozen=True)
class NetworkConfigs:
    """The four networks that make a video. `name` is their name in reports."""

    name: str
    text: T5Config
    stage1: DiTConfig
    stage2: DiTConfig
    vae: VAEConfig


OFFICIAL = NetworkConfigs("official", T5_XXL, STAGE1, STAGE2, VAE)
NANO = NetworkConfigs("Nano", NANO_TEXT_ENCODER, NANO_STAGE1, NANO_STAGE2, NANO_VAE)


@dataclass(frozen=True)
class Precision:
    """How weights are stored, and the data type of the computation. With fp8 the VAE is stored in `compute`."""

    name: str
    weight_bytes: int
    compute: torch.dtype


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", 4, torch.float32),
        Precision("bf16", 2, torch.bfloat16),
        Precision("fp8", 1, torch.bfloat16),
    )
}


@dataclass(frozen=True)
class Setting:
    """Size and length of the final video, steps of both stages, networks and their precision.

    `stage1_steps` 0 leaves the draft out: an existing clip is refined. `tile` is the side in pixels of the tiles that
    stage II sees (`tiles`), 0 for whole frames. `device` is the type of the device. With
    `memory`, a limit in bytes, the VAE runs in tiles where it has to; `store` is their limit in main memory. `window`
    and `overlap` are stage II's in frames. Raises ValueError for invalid values.
    """

    width: int = 1920
    height: int = 1080
    frames: int = 49
    stage1_steps: int = 50
    stage2_steps: int = 4
    cfg: float = STAGE2_SCALE
    tile: int = 0
    precision: str = "bf16"
    networks: NetworkConfigs = OFFICIAL
    device: str = "cuda"
    memory: float | None = None
    store: float = STORE
    window: int = WINDOW
    overlap: int = OVERLAP_FRAMES

    def __post_init__(self) -> None:
        limits = {
            "width": (1, MAX_SIDE),
            "height": (1, MAX_SIDE),
            "frames": (1, math.inf),
            "stage1_steps": (0, MAX_STEPS),
            "stage2_steps": (1, MAX_STEPS),
            "cfg": (0, MAX_SCALE),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                limit = f"{low} to {high:g}" if math.isfinite(high) else f"at least {low}"
                raise ValueError(f"{name.replace('_', ' ')} must be {limit}; got {getattr(self, name)}.")
        if self.frames > MAX_FRAMES:
            raise ValueError(f"frames must be at most {MAX_FRAMES}; got {self.frames}.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {self.precision!r}.")
        if self.tile:
            tiles.plan_tiles(2, 2, self.tile)
        plan_windows(1, self.window, self.overlap)

    @property
    def padded(self) -> tuple[int, int, int]:
        """(frames, height, width) as the networks see them."""
        return padded_shape(self.frames, self.height, self.width)

    @property
    def draft(self) -> tuple[int, int, int]:
        """(frames, height, width) of the draft: the official draft's area in the video's aspect ratio."""
        blocks = math.sqrt(DRAFT_PIXELS / (self.width * self.height)) / PIXEL_MULTIPLE
        # The longer side rounded up: 16:9 makes the official 480x256.
        long, short = math.ceil(blocks * max(self.width, self.height)), round(blocks * min(self.width, self.height))
        short = max(1, short)
        rows, columns = (short, long) if self.height <= self.width else (long, short)
        height, width = rows * PIXEL_MULTIPLE, columns * PIXEL_MULTIPLE
        return self.padded[0], height, width

    @property
    def numerics(self) -> Precision:
        """The precision by its name."""
        return PRECISIONS[self.precision]


@dataclass(frozen=True)
class Phase:
    """One phase. `tokens`: sequence length of its transformer, 0 for the VAE.

    `tile`: longest side of its tiles in pixels, None without tiles.
    """

    name: str
    tokens: int
    flops: Flops
    weights: float
    activations: float
    tile: int | None = None

    @property
    def memory(self) -> float:
        """Peak in bytes, with all weights on the device."""
        return self.weights + self.activations


@dataclass(frozen=True)
class Plan:
    """A setting and its phases."""

    setting: Setting
    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        """The phase that needs the most memory."""
        return max(self.phases, key=lambda phase: phase.memory)

    @property
    def memory(self) -> float:
        """Peak in bytes over all phases."""
        return self.peak.memory

    @property
    def activations(self) -> float:
        """Peak in bytes with all weights offloaded."""
        return max(phase.activations for phase in self.phases)

    @property
    def flops(self) -> Flops:
        """Operations of all phases."""
        return sum((phase.flops for phase in self.phases), Flops())


def make_plan(setting: Setting) -> Plan:
    """Estimate every phase of a setting."""
    return Plan(setting, tuple(_phases(setting)))


def _phases(setting: Setting) -> Iterator[Phase]:
    networks, numerics = setting.networks, setting.numerics
    dtype = numerics.compute
    yield Phase(
        "text",
        TEXT_TOKENS,
        t5_flops(networks.text),  # of the prompt; no prompt at all is zeros
        parameters(networks.text) * numerics.weight_bytes,
        t5_bytes(networks.text, dtype),
    )
    if setting.stage1_steps:
        # Stage I's guidance changes from step to step and never leaves the second evaluation out.
        yield _dit_phase(STAGE_1, networks.stage1, setting.draft, 2 * setting.stage1_steps, setting)
        yield _vae_phase("draft decode", setting.draft, setting, encode=False)
    yield _vae_phase(VAE_ENCODE, setting.padded, setting, encode=True)
    frames, height, width = setting.padded
    windows = plan_windows(latent_shape(setting.padded)[0], setting.window, setting.overlap)
    times = stage2_times(setting.stage2_steps).tolist()[:-1]
    evaluations = (1 if setting.cfg == 1 else 2) * sum(len(windows.at(time).starts) for time in times)
    window = (min(frames, setting.window), height, width)
    yield _refining_phase(STAGE_2, networks.stage2, window, evaluations, setting)
    yield _vae_phase(VAE_DECODE, setting.padded, setting, encode=False)


def _dit_phase(name: str, config: DiTConfig, video: tuple[int, int, int], evaluations: int, setting: Setting) -> Phase:
    shape, numerics = latent_shape(video), setting.numerics
    return Phase(
        name,
        dit_tokens(config, shape) + TEXT_TOKENS,
        dit_flops(config, shape) * evaluations,
        parameters(config) * numerics.weight_bytes,
        dit_bytes(config, shape, numerics.compute, setting.device) + sampler_bytes(config, shape),
    )


def _refining_phase(
    name: str, config: DiTConfig, video: tuple[int, int, int], evaluations: int, setting: Setting
) -> Phase:
    """Stage II; if the setting has tiles, the operations of all tiles and the memory of one."""
    whole = _dit_phase(name, config, video, evaluations, setting)
    frames, *sides = latent_shape(video)
    cut = [tuple(piece.weight.shape) for piece in tiles.plan_tiles(*sides, setting.tile)] if setting.tile else []
    if len(cut) < 2:
        return whole
    rows, columns = cut[0]
    one = _dit_phase(name, config, (video[0], rows * SPATIAL_FACTOR, columns * SPATIAL_FACTOR), evaluations, setting)
    flops = sum((dit_flops(config, (frames, *sides)) for sides in cut), Flops()) * evaluations
    held = one.activations + sampler_bytes(config, latent_shape(video)) - sampler_bytes(config, (frames, rows, columns))
    return replace(one, flops=flops, activations=held, tile=max(rows, columns) * SPATIAL_FACTOR)


def _vae_phase(name: str, video: tuple[int, int, int], setting: Setting, *, encode: bool) -> Phase:
    config, dtype, latent = setting.networks.vae, setting.numerics.compute, latent_shape(video)
    outline, weights = vae_outline(config), parameters(config) * dtype.itemsize
    if encode:
        flops, held = encode_flops(config, *video), encode_bytes(outline, (1, config.image_channels, *video), dtype)
    else:
        flops, held = decode_flops(config, *video), decode_bytes(outline, (1, config.latent_channels, *latent), dtype)
    half = outline.encoder if encode else outline.decoder
    budget = None if setting.memory is None else setting.memory - weights
    cut = plan_within(half, latent, dtype, budget, setting.store, needed=held, on_card=setting.device != "cpu")
    if cut is None:
        return Phase(name, 0, flops, weights, held)
    side = cut.side * SPATIAL_FACTOR
    return Phase(name, 0, flops * tiling_factor(cut, *latent), weights, cut.device_bytes, side)
