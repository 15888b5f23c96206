"""FlashVideo's VAE as a native ComfyUI VAE, for the stock encode and decode nodes, tiled or not."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...flashvideo.checkpoints import read_vae
from ...flashvideo.config import SPATIAL_FACTOR, TEMPORAL_FACTOR
from ...flashvideo.nano import nano_state
from ...flashvideo.vae import OnChunk, VideoVAE
from .vae_memory import decode_bytes, encode_bytes

# The official code decodes in float16, which keeps 8 times finer steps than bfloat16.
WORKING_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
_NO_WEIGHTS = "No VAE weights detected"  # part of comfy.sd.VAE's warning about an empty state dict


class NativeVideoVAE(VideoVAE):
    """The network as ComfyUI calls it: tensors in and out, with progress and cancel at every temporal chunk."""

    def encode(self, video: Tensor, on_chunk: OnChunk | None = None) -> Tensor:
        """[B, 3, 4n + 1, H, W] in [-1, 1] to the mean latent [B, 16, n + 1, H/8, W/8].

        The mean and not a sample as in the official code: the same clip gives the same latent every time, and the
        degradation that follows adds far more noise than the sample would have.
        """
        return super().encode(video, on_chunk=on_chunk or report_chunks()).mode()

    def decode(self, latent: Tensor, on_chunk: OnChunk | None = None) -> Tensor:
        """[B, 16, n + 1, h, w] in raw scale to [B, 3, 4n + 1, 8h, 8w], about [-1, 1]."""
        return super().decode(latent, on_chunk=on_chunk or report_chunks())


class FlashVideoVAE(comfy.sd.VAE):
    """A ComfyUI VAE around FlashVideo's network.

    Time is always whole: chunks that carry on from one another are part of the network. Tiled nodes cut space only,
    and their temporal settings do nothing. Each tile still measures its norms by itself, so neighbours can differ
    slightly in tone; the overlap blends them.
    """

    def __init__(self, network: NativeVideoVAE, dtype: torch.dtype, device: torch.device) -> None:
        with _silent(_NO_WEIGHTS):
            super().__init__(sd={})  # every default, whichever this version of ComfyUI has, and no network
        config = network.config
        self.first_stage_model = network
        self.latent_channels = config.latent_channels
        self.output_channels = config.image_channels
        self.latent_dim = 3
        self.upscale_ratio = (_frames, SPATIAL_FACTOR, SPATIAL_FACTOR)
        self.downscale_ratio = (_latents, SPATIAL_FACTOR, SPATIAL_FACTOR)
        self.upscale_index_formula = (TEMPORAL_FACTOR, SPATIAL_FACTOR, SPATIAL_FACTOR)
        self.downscale_index_formula = self.upscale_index_formula
        self.memory_used_encode = lambda shape, dtype: encode_bytes(config, shape, dtype)
        self.memory_used_decode = lambda shape, dtype: decode_bytes(config, shape, dtype)
        self.working_dtypes = WORKING_DTYPES
        self.vae_dtype = dtype
        self.device = device
        self.output_device = comfy.model_management.intermediate_device()
        offload_device = comfy.model_management.vae_offload_device()
        self.patcher = comfy.model_patcher.ModelPatcher(network, load_device=device, offload_device=offload_device)
        self.model_size()

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Frames [4n + 1, H, W, 3] in [0, 1] to a latent [1, 16, n + 1, H/8, W/8]. Raises ValueError for others."""
        check_length(pixel_samples)
        return super().encode(pixel_samples)

    def encode_tiled(self, pixel_samples: Tensor, *args: int | None, **kwargs: int | None) -> Tensor:
        """Encode in spatial tiles; otherwise as `encode`."""
        check_length(pixel_samples)
        return super().encode_tiled(pixel_samples, *args, **kwargs)

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
        """Decode in spatial tiles of latent pixels, blended where they overlap; `tile_t` is not used."""
        tile, overlap = (tile_x, tile_y), overlap[1:]
        on_chunk = report_chunks(_count_tiles(samples, tile, overlap))
        video = self._tiled(
            samples,
            lambda piece: self.first_stage_model.decode(piece, on_chunk),
            tile,
            overlap,
            out_channels=self.output_channels,
            upscale_amount=self.upscale_ratio,
            index_formulas=self.upscale_index_formula,
        )
        return self.process_output(video)

    def encode_tiled_3d(
        self,
        samples: Tensor,
        tile_t: int | None = None,
        tile_x: int = 512,
        tile_y: int = 512,
        overlap: tuple[int, int, int] = (1, 64, 64),
    ) -> Tensor:
        """Encode in spatial tiles of pixels, blended where they overlap; `tile_t` is not used."""
        tile, overlap = (tile_x, tile_y), overlap[1:]
        on_chunk = report_chunks(_count_tiles(samples, tile, overlap))
        return self._tiled(
            samples,
            lambda piece: self.first_stage_model.encode(self.process_input(piece), on_chunk),
            tile,
            overlap,
            out_channels=self.latent_channels,
            upscale_amount=self.downscale_ratio,
            index_formulas=self.downscale_index_formula,
            downscale=True,
        )

    def _tiled(
        self,
        samples: Tensor,
        run: Callable[[Tensor], Tensor],
        tile: tuple[int, int],
        overlap: tuple[int, int],
        **scale: object,
    ) -> Tensor:
        return comfy.utils.tiled_scale_multidim(
            samples,
            lambda piece: run(piece.to(self.device, self.vae_dtype)).float(),
            tile=(samples.shape[2], *tile),
            overlap=(1, *overlap),
            output_device=self.output_device,
            **scale,
        )


def check_length(pixels: Tensor) -> None:
    """Frames [T, H, W, C] or [B, T, H, W, C] must be 4n + 1 in number."""
    frames = pixels.shape[-4]
    if frames % TEMPORAL_FACTOR != 1:
        needed = _frames(_latents(frames - 1) + 1) if frames else 1
        raise ValueError(
            f"FlashVideo's VAE encodes clips of 4n+1 frames (1, 5, 9, ... 49); got {frames}. Put FlashVideo Prepare "
            f"Frames before it: it pads the clip to {needed} frames, and Finish Frames takes them off again."
        )


def report_chunks(runs: int = 1) -> OnChunk:
    """A callback for the chunks of one or several encodes or decodes: moves ComfyUI's progress bar, and cancels."""
    bar = comfy.utils.ProgressBar(runs)
    done = itertools.count(1)

    def on_chunk(_index: int, chunks: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(next(done), runs * chunks)

    return on_chunk


def load_vae_native(path: Path | None) -> FlashVideoVAE:
    """A VAE from a file in any known layout; FlashVideo-Nano's for None. Raises CheckpointError."""
    config, state = read_vae(nano_state("vae") if path is None else path)
    device = comfy.model_management.vae_device()
    dtype = comfy.model_management.vae_dtype(device, WORKING_DTYPES)
    network = NativeVideoVAE(config, device="meta", dtype=dtype, operations=comfy.ops.disable_weight_init)
    # Copied, so that nothing changes under a loaded VAE when its file is replaced.
    weights = {name: tensor.to(dtype, copy=True) for name, tensor in state.items()}
    network.load_state_dict(weights, assign=True)
    return FlashVideoVAE(network.eval().requires_grad_(False), dtype, device)


def _frames(latents: int) -> int:
    return max(0, TEMPORAL_FACTOR * (latents - 1) + 1)


def _latents(frames: int) -> int:
    return (frames + TEMPORAL_FACTOR - 1) // TEMPORAL_FACTOR


def _count_tiles(samples: Tensor, tile: tuple[int, int], overlap: tuple[int, int]) -> int:
    rows, columns = samples.shape[3:]
    # ComfyUI's tile sizes are (rows, columns) here, whatever they are called.
    tiles = comfy.utils.get_tiled_scale_steps(columns, rows, tile[1], tile[0], overlap[0])
    return samples.shape[0] * tiles


@contextmanager
def _silent(text: str) -> Iterator[None]:
    """Drop a log message that holds this text: ComfyUI has no quieter way to make a VAE of another architecture."""

    def keep(record: logging.LogRecord) -> bool:
        return text not in str(record.msg)

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)
