"""FlashVideo's VAE as a native ComfyUI VAE, for the stock encode and decode nodes, tiled or not."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...flashvideo.checkpoints import read_vae
from ...flashvideo.checkpoints.architecture import default_norm_groups
from ...flashvideo.checkpoints.keymaps import NORM_GROUPS_METADATA
from ...flashvideo.config import (
    SPATIAL_FACTOR,
    TEMPORAL_FACTOR,
    VAEConfig,
    is_video_length,
    latent_frames,
    latent_shape,
    next_video_length,
    video_frames,
    video_shape,
)
from ...flashvideo.devices import GIB
from ...flashvideo.nano import latent_family, nano_state
from ...flashvideo.vae import Decoder, Encoder, OnChunk, VideoVAE
from ...flashvideo.vae.memory import STORE_SHARE, TilePlan, decode_bytes, encode_bytes, plan_within
from ...flashvideo.vae.tiles import decode_in_tiles, encode_in_tiles
from .host import ModelPatcher, remember_loader, when_on_another_device
from .latent_origin import check_origin, remember_origin

# The official code decodes in float16, which keeps 8 times finer steps than bfloat16.
WORKING_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
USED_SHARE = 0.9  # of free memory: what the formulas and the allocator miss by
_NO_WEIGHTS = "No VAE weights detected"  # part of comfy.sd.VAE's warning about an empty state dict


class NativeVideoVAE(VideoVAE):
    """The network as ComfyUI calls it: within a memory budget, with progress and cancel at every chunk of a tile.

    Whole pictures where they fit, else tiles, which give the same numbers to rounding. `budget` is in bytes; None
    means the free memory that ComfyUI reports.
    """

    def __init__(self, config: VAEConfig, *, device: torch.device, budget: float | None, **factory: Any) -> None:
        super().__init__(config, **factory)
        self.device, self.budget = device, budget
        self.output_device = comfy.model_management.intermediate_device()

    def encode(self, video: Tensor, side: int | None = None) -> Tensor:
        """[B, 3, 4n + 1, H, W] in [-1, 1] to the mean latent [B, 16, n + 1, H/8, W/8]; see `decode` for `side`.

        The mean and not a sample as in the official code: the same clip gives the same latent every time, and the
        degradation that follows adds far more noise than the sample would have.
        """
        on_step = report_steps()

        def whole() -> Tensor:
            return VideoVAE.encode(self, video.to(self.device), on_chunk=on_step).mode()

        def tiled(plan: TilePlan) -> Tensor:
            steps = {"on_step": on_step, "is_out_of_memory": is_out_of_memory}
            return encode_in_tiles(self, video, plan, self.device, **steps).mode()

        size = latent_shape(video.shape[2:])
        needed = len(video) * encode_bytes(self, video.shape, self.dtype)
        return self._within_memory(self.encoder, size, needed, side, whole, tiled)  # tiles take clips one by one

    def decode(self, latent: Tensor, side: int | None = None) -> Tensor:
        """[B, 16, n + 1, h, w] in raw scale to [B, 3, 4n + 1, 8h, 8w], about [-1, 1], on ComfyUI's result device.

        `side` limits tiles to so many latent pixels a side.
        """
        on_step = report_steps()

        def room(shape: torch.Size) -> Tensor:
            return torch.empty(shape, device=self.output_device)

        def whole() -> Tensor:
            return VideoVAE.decode(self, latent.to(self.device), on_chunk=on_step, into=room)

        def tiled(plan: TilePlan) -> Tensor:
            steps = {"on_step": on_step, "is_out_of_memory": is_out_of_memory}
            video = room(torch.Size((len(latent), self.config.image_channels, *video_shape(latent.shape[2:]))))
            return decode_in_tiles(self, latent, plan, video, self.device, **steps)

        needed = len(latent) * decode_bytes(self, latent.shape, self.dtype)
        return self._within_memory(self.decoder, tuple(latent.shape[2:]), needed, side, whole, tiled)

    def _within_memory(
        self,
        network: Encoder | Decoder,
        size: tuple[int, int, int],
        needed: float,
        side: int | None,
        whole: Callable[[], Tensor],
        tiled: Callable[[TilePlan], Tensor],
    ) -> Tensor:
        budget, store = self._room()
        on_card = not comfy.model_management.is_device_cpu(self.device)
        limits = {"budget": budget, "store": store, "needed": needed, "on_card": on_card}
        plan = plan_within(network, size, self.dtype, **limits, side=side)
        if plan is None:
            try:
                return whole()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                side = max(1, max(size[1:]) // 2)
            # Outside of the except block, or the exception would keep the tensors of the first try alive.
            logging.warning("The VAE ran out of memory and continues in smaller tiles; the result is the same.")
            comfy.model_management.soft_empty_cache()
            plan = plan_within(network, size, self.dtype, **limits, side=side)
        if plan.device_bytes > budget:
            logging.warning(
                "The VAE's smallest tiles need %.1f GiB, more than the %.1f GiB that it may use.",
                plan.device_bytes / GIB,
                budget / GIB,
            )
        return tiled(plan)

    def _room(self) -> tuple[float, float | None]:
        """Bytes for the work on the device, and for what tiles store in main memory; None where it is the same."""
        management = comfy.model_management
        budget = management.get_free_memory(self.device) * USED_SHARE
        budget = budget if self.budget is None else min(budget, self.budget)
        if management.is_device_cpu(self.device):
            return budget, None
        return budget, management.get_free_memory(torch.device("cpu")) * STORE_SHARE


class FlashVideoVAE(comfy.sd.VAE):
    """A ComfyUI VAE around FlashVideo's network.

    Time is always whole: chunks that carry on from one another are part of the network. Tiles cut space only, without
    a seam, so that the overlap of the tiled nodes and their temporal settings do nothing.
    """

    latent_family: str | None = None  # see `flashvideo.nano.latent_family`

    def __init__(self, network: NativeVideoVAE, dtype: torch.dtype, device: torch.device) -> None:
        with silent_about_weights():
            super().__init__(sd={})  # the defaults of the installed ComfyUI, and no network
        config = network.config
        self.first_stage_model = network
        self.latent_channels = config.latent_channels
        self.output_channels = config.image_channels
        self.latent_dim = 3
        self.upscale_ratio, self.downscale_ratio = latent_counts()
        self.upscale_index_formula = (TEMPORAL_FACTOR, SPATIAL_FACTOR, SPATIAL_FACTOR)
        self.downscale_index_formula = self.upscale_index_formula
        most = math.inf if network.budget is None else network.budget
        self.memory_used_encode = lambda shape, dtype: min(most, encode_bytes(network, shape, dtype))
        self.memory_used_decode = lambda shape, dtype: min(most, decode_bytes(network, shape, dtype))
        self.working_dtypes = WORKING_DTYPES
        self.vae_dtype = dtype
        self.device = device
        # Else all weights stay in main memory where a picture is larger than the card. ComfyUI, too, gives such a VAE a
        # patcher without dynamic VRAM.
        self.disable_offload = True
        self.output_device = comfy.model_management.intermediate_device()
        offload_device = comfy.model_management.vae_offload_device()
        self.patcher = ModelPatcher(network, load_device=device, offload_device=offload_device)
        when_on_another_device(self.patcher, _follow_device)
        self.model_size()

    def get_sd(self) -> dict[str, Tensor]:
        """The weights as VAE Save and Save Checkpoint write them, with what their shapes don't say."""
        state, config = dict(super().get_sd()), self.first_stage_model.config
        widths = (config.base_channels * multiplier for multiplier in config.channel_multipliers)
        if config.norm_groups != default_norm_groups(widths):
            state[NORM_GROUPS_METADATA] = torch.empty(config.norm_groups, 0)
        return state

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Frames [4n + 1, H, W, 3] in [0, 1] to a latent [1, 16, n + 1, H/8, W/8]. Raises ValueError for others."""
        check_length(pixel_samples)
        return self._remembered(super().encode(pixel_samples))

    def decode(self, samples_in: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Latents [B, 16, T, h, w] to frames. Raises ValueError for others, such as an image model's."""
        check_video_latent(samples_in, self.latent_channels)
        check_origin(samples_in, vae=self.latent_family)
        return super().decode(samples_in, *args, **kwargs)

    def decode_tiled(self, samples: Tensor, *args: int | None, **kwargs: int | None) -> Tensor:
        """Decode in spatial tiles; otherwise as `decode`."""
        check_video_latent(samples, self.latent_channels)
        check_origin(samples, vae=self.latent_family)
        return super().decode_tiled(samples, *args, **kwargs)

    def encode_tiled(self, pixel_samples: Tensor, *args: int | None, **kwargs: int | None) -> Tensor:
        """Encode in spatial tiles; otherwise as `encode`."""
        check_length(pixel_samples)
        return self._remembered(super().encode_tiled(pixel_samples, *args, **kwargs))

    def _remembered(self, latent: Tensor) -> Tensor:
        remember_origin(latent, self.latent_family)
        return latent

    def vae_encode_crop_pixels(self, pixels: Tensor) -> Tensor:
        """Crop to multiples of 8 pixels as every ComfyUI VAE does, but say so."""
        cropped = super().vae_encode_crop_pixels(pixels)
        if cropped.shape[-3:-1] != pixels.shape[-3:-1]:
            (height, width), (rows, columns) = pixels.shape[-3:-1], cropped.shape[-3:-1]
            logging.warning(
                "The VAE takes multiples of %d pixels: %dx%d was cropped to %dx%d. Prepare Frames would pad it.",
                SPATIAL_FACTOR,
                width,
                height,
                columns,
                rows,
            )
        return cropped

    def decode_tiled_3d(
        self,
        samples: Tensor,
        tile_t: int | None = None,
        tile_x: int = 32,
        tile_y: int = 32,
        overlap: tuple[int, int, int] = (1, 8, 8),
    ) -> Tensor:
        """Decode in spatial tiles of latent pixels; `tile_t` and `overlap` are not used."""
        return self.process_output(self.first_stage_model.decode(samples.to(self.vae_dtype), max(tile_x, tile_y)))

    def encode_tiled_3d(
        self,
        samples: Tensor,
        tile_t: int | None = None,
        tile_x: int = 512,
        tile_y: int = 512,
        overlap: tuple[int, int, int] = (1, 64, 64),
    ) -> Tensor:
        """Encode in spatial tiles of pixels; `tile_t` and `overlap` are not used."""
        video = self.process_input(samples).to(self.vae_dtype)
        latent = self.first_stage_model.encode(video, max(tile_x, tile_y) // SPATIAL_FACTOR)
        return latent.to(self.output_device).float()


def check_length(pixels: Tensor) -> None:
    """Frames [T, H, W, C] or [B, T, H, W, C] must be 4n + 1 in number."""
    frames = pixels.shape[-4]
    if not is_video_length(frames):
        raise ValueError(
            f"FlashVideo's VAE encodes clips of 4n+1 frames (1, 5, 9, ... 49); got {frames}. Put FlashVideo Prepare "
            f"Frames before it: it pads the clip to {next_video_length(frames)} frames, and Finish Frames takes them "
            "off again."
        )


def check_video_latent(samples: Tensor, channels: int) -> None:
    """A latent to decode must be a video's, of the VAE's channels."""
    if samples.ndim != 5 or samples.shape[1] != channels or not samples.numel():
        raise ValueError(
            f"A latent for FlashVideo's VAE must be [batch, {channels}, frames, height, width]; got "
            f"{list(samples.shape)}. One of an image model needs the VAE of that model."
        )


def report_steps() -> OnChunk:
    """A callback for the chunks of an encode or decode: moves ComfyUI's progress bar, and cancels."""
    bar = comfy.utils.ProgressBar(1)

    def on_step(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return on_step


def is_out_of_memory(error: Exception) -> bool:
    """ComfyUI's own check."""
    check = getattr(comfy.model_management, "is_oom", None)  # newer than 0.3.75
    return check(error) if check is not None else isinstance(error, comfy.model_management.OOM_EXCEPTION)


def load_vae_native(source: Path | str, budget: float | None = None) -> FlashVideoVAE:
    """A VAE from a file in any known layout, or one of FlashVideo-Nano's by its name. Raises CheckpointError.

    `budget`: bytes that an encode or decode may hold; None for what is free.
    """
    config, state = read_vae(nano_state(source) if isinstance(source, str) else source)
    device = comfy.model_management.vae_device()
    dtype = comfy.model_management.vae_dtype(device, WORKING_DTYPES)
    layers = {"dtype": dtype, "operations": comfy.ops.disable_weight_init}
    with torch.device("meta"):
        network = NativeVideoVAE(config, device=device, budget=budget, **layers)
    # Copied, so that a loaded VAE doesn't change when its file is replaced.
    weights = {name: tensor.to(dtype, copy=True) for name, tensor in state.items()}
    network.load_state_dict(weights, assign=True)
    vae = FlashVideoVAE(network.eval().requires_grad_(False), dtype, device)
    vae.latent_family = latent_family(source, config)
    remember_loader(vae.patcher, _load_patcher, source, budget)
    return vae


def _load_patcher(source: Path | str, budget: float | None, disable_dynamic: bool = False) -> ModelPatcher:
    return load_vae_native(source, budget).patcher  # which has no dynamic VRAM in any case


def _follow_device(patcher: ModelPatcher) -> None:
    """Let a copy of the network work where ComfyUI has put it."""
    patcher.model.device = patcher.load_device


def _frames(latents: int) -> int:
    return video_frames(latents) if latents > 0 else 0


def _latents(frames: int) -> int:
    return latent_frames(frames) if frames > 0 else 0


def latent_counts() -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What ComfyUI counts with: from latent frames, rows and columns to the video's, and back."""
    return (_frames, SPATIAL_FACTOR, SPATIAL_FACTOR), (_latents, SPATIAL_FACTOR, SPATIAL_FACTOR)


@contextmanager
def silent_about_weights() -> Iterator[None]:
    """Drop ComfyUI's warning about a VAE of another architecture."""

    def keep(record: logging.LogRecord) -> bool:
        return _NO_WEIGHTS not in str(record.msg)

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)
