"""Model files: what they are, how they are read, converted, found and downloaded."""

from .keymaps import OWN_PREFIX
from .reading import (
    STAGE_METADATA,
    STAGE_NAMES,
    Checkpoint,
    describe,
    load_dit,
    load_vae,
    open_checkpoint,
    read_dit,
    read_stored_dit,
    read_vae,
)
from .weights import CheckpointError

__all__ = [
    "OWN_PREFIX",
    "STAGE_METADATA",
    "STAGE_NAMES",
    "Checkpoint",
    "CheckpointError",
    "describe",
    "load_dit",
    "load_vae",
    "open_checkpoint",
    "read_dit",
    "read_stored_dit",
    "read_vae",
]
