"""FlashVideo (arXiv 2502.05179) in PyTorch: both stages, the VAE and the samplers, without ComfyUI.

Names are imported when they are first used: a command that only shows its help doesn't wait seconds for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
_MODULES = ("checkpoints", "config", "degradation", "dit", "guidance", "samplers", "schedule", "vae")


def __getattr__(name: str) -> Any:
    """One of the names above, or one of the modules that they come from."""
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in __all__:
        for module in map(__getattr__, _MODULES):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What completion offers."""
    return sorted({*globals(), *__all__})
