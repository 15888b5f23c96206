"""The tiny autoencoder as a ComfyUI VAE that only decodes, and as previews in true colours."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import folder_paths
import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args
from PIL.Image import Image
from torch import Tensor

from ...flashvideo.checkpoints import CheckpointError
from ...flashvideo.checkpoints.tiny_vae import MARK, load_tiny
from ...flashvideo.config import SPATIAL_FACTOR, TEMPORAL_FACTOR, video_shape
from ...flashvideo.nano import OFFICIAL
from ...flashvideo.vae.tiny import LATENT_CHANNELS, TinyDecoder, decode_tiny, tiny_bytes
from .host import ModelPatcher, remember_loader
from .latent_origin import check_origin
from .vae import WORKING_DTYPES, check_video_latent, latent_counts, report_steps, silent_about_weights

APPROXIMATE = "vae_approx"  # the model folder for previews
PREVIEW_SIDE = 512  # pixels, about
ONLY_DECODES = (
    "The tiny autoencoder only decodes. Encode with FlashVideo's own VAE (3d-vae.pt): the refiner needs exact latents."
)


class TinyVAE(comfy.sd.VAE):
    """A ComfyUI VAE that decodes approximately, one latent frame after the other."""

    def __init__(self, network: TinyDecoder, dtype: torch.dtype, device: torch.device) -> None:
        with silent_about_weights():
            super().__init__(sd={})  # the defaults of the installed ComfyUI, and no network
        self.first_stage_model = network
        self.latent_channels, self.output_channels, self.latent_dim = LATENT_CHANNELS, 3, 3
        self.upscale_ratio, self.downscale_ratio = latent_counts()
        self.upscale_index_formula = (TEMPORAL_FACTOR, SPATIAL_FACTOR, SPATIAL_FACTOR)
        self.downscale_index_formula = self.upscale_index_formula
        self.memory_used_decode = tiny_bytes
        self.working_dtypes, self.vae_dtype, self.device = WORKING_DTYPES, dtype, device
        self.disable_offload = True
        self.output_device = comfy.model_management.intermediate_device()
        offload_device = comfy.model_management.vae_offload_device()
        self.patcher = ModelPatcher(network, load_device=device, offload_device=offload_device)
        self.model_size()

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Refused: see ONLY_DECODES."""
        raise ValueError(ONLY_DECODES)

    def encode_tiled(self, pixel_samples: Tensor, *_: Any, **__: Any) -> Tensor:
        """Refused: see ONLY_DECODES."""
        raise ValueError(ONLY_DECODES)

    def decode(self, samples_in: Tensor, vae_options: dict[str, Any] | None = None) -> Tensor:
        """A latent [B, 16, T, h, w] in the VAE's scale to frames [B, 4 (T - 1) + 1, 8h, 8w, 3]."""
        check_video_latent(samples_in, LATENT_CHANNELS)
        check_origin(samples_in, vae=OFFICIAL)
        needed = self.memory_used_decode(samples_in.shape, self.vae_dtype)
        comfy.model_management.load_models_gpu([self.patcher], memory_required=needed)
        video = torch.empty(len(samples_in), 3, *video_shape(samples_in.shape[2:]), device=self.output_device)
        latent = samples_in.to(self.device, self.vae_dtype)
        return decode_tiny(self.first_stage_model, latent, video, report_steps()).movedim(1, -1)

    def decode_tiled(self, samples: Tensor, *_: Any, **__: Any) -> Tensor:
        """The same as `decode`, which needs little memory."""
        return self.decode(samples)


class TinyPreviewer(latent_preview.LatentPreviewer):
    """Previews of a video's middle in true colours, by a copy of the tiny autoencoder without time and full size."""

    def __init__(self, path: Path, scale: float, device: torch.device, side: int) -> None:
        """`scale` of the sampler's latents to the VAE's; their `device` and longer `side`. Raises CheckpointError."""
        doublings = max(1, min(3, int(math.log2(PREVIEW_SIDE / side))))
        with torch.device("meta"):
            empty = TinyDecoder(doublings, (1, 1, 1))
        self._decoder = load_tiny(path, empty, torch.float32).to(device)
        self._scale, self._device = scale, device

    def decode_latent_to_preview(self, x0: Tensor) -> Image:
        """A latent [B, 16, T, h, w] of the sampler to a picture."""
        middle = x0.shape[2] // 2
        # With the latent before, which its layers remember.
        latent = x0[0, :, max(0, middle - 1) : middle + 1].to(self._device, torch.float32) / self._scale
        *_, frames = self._decoder.frames(latent)
        return latent_preview.preview_to_image(frames[-1].movedim(0, -1), do_scale=False)


def load_tiny_vae(path: Path) -> TinyVAE:
    """A VAE from a file such as taecvx.safetensors. Raises CheckpointError."""
    device = comfy.model_management.vae_device()
    dtype = comfy.model_management.vae_dtype(device, WORKING_DTYPES)
    with torch.device("meta"):
        empty = TinyDecoder(operations=comfy.ops.disable_weight_init, dtype=dtype)
    vae = TinyVAE(load_tiny(path, empty, dtype), dtype, device)
    remember_loader(vae.patcher, _load_patcher, path)
    return vae


def _load_patcher(path: Path, disable_dynamic: bool = False) -> ModelPatcher:
    return load_tiny_vae(path).patcher


def previewer(scale: float, device: torch.device, side: int) -> TinyPreviewer | None:
    """The previewer that ComfyUI's preview method "TAESD" asks for, if models/vae_approx has the file.

    For the arguments see TinyPreviewer. A file that can't be used is logged: a run doesn't end for its previews.
    """
    if args.preview_method != LatentPreviewMethod.TAESD:
        return None
    names = [name for name in folder_paths.get_filename_list(APPROXIMATE) if MARK in name.lower()]
    path = folder_paths.get_full_path(APPROXIMATE, names[0]) if names else None
    try:
        return None if path is None else TinyPreviewer(Path(path), scale, device, side)
    except CheckpointError as error:
        logging.warning("FlashVideo: no previews by the tiny autoencoder. %s", error)
        return None
