"""FlashVideo (arXiv 2502.05179) in PyTorch: both stages, the VAE and the samplers, without ComfyUI."""

from .checkpoints import CheckpointError, load_dit, load_vae
from .config import STAGE1_LATENT_SCALE, STAGE2_LATENT_SCALE, DiTConfig, VAEConfig
from .degradation import degrade_latent
from .dit import FlashVideoDiT
from .guidance import dynamic_cfg_scale
from .samplers import sample_stage1, sample_stage2
from .schedule import stage1_schedule, stage2_times
from .vae import Posterior, VideoVAE

__all__ = [
    "STAGE1_LATENT_SCALE",
    "STAGE2_LATENT_SCALE",
    "CheckpointError",
    "DiTConfig",
    "FlashVideoDiT",
    "Posterior",
    "VAEConfig",
    "VideoVAE",
    "degrade_latent",
    "dynamic_cfg_scale",
    "load_dit",
    "load_vae",
    "sample_stage1",
    "sample_stage2",
    "stage1_schedule",
    "stage2_times",
]
