"""Out-of-memory errors that name size, window and tiles; ComfyUI's own tip names the batch size only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_patcher
from torch import Tensor

from ...flashvideo.config import video_shape
from ...flashvideo.devices import is_out_of_memory
from .multidiffusion import TILES, WINDOWS, settings_of


@contextmanager
def explained(model: comfy.model_patcher.ModelPatcher, latent: Tensor, stage: int) -> Iterator[None]:
    """Add size, window and tiles of the run, and advice, to an out-of-memory error."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "no memory left"
        raise type(error)(f"{_explanation(model, latent, stage)} ({reason})") from error


def _explanation(model: comfy.model_patcher.ModelPatcher, latent: Tensor, stage: int) -> str:
    frames, height, width = video_shape(latent.shape[2:])
    videos = f"{len(latent)} videos of " if len(latent) > 1 else ""
    if stage == 1:
        return (
            f"FlashVideo stage I ran out of memory with {videos}{width}x{height}, {frames} frames. Make a shorter or "
            "smaller draft, or load the model with weight_dtype fp8_e4m3fn."
        )
    window, tile = (min(settings_of(model, kind), default=0) for kind in (WINDOWS, TILES))
    window_text = f"window {window}" if window else "no window"
    tile_text = f"tiles of {tile} pixels" if tile else "no tiles"
    return (
        f"FlashVideo stage II ran out of memory with {videos}{width}x{height}, {frames} frames, {window_text}, "
        f"{tile_text}. Take a shorter window (25), put FlashVideo Spatial Tiles (512) before the refiner, refine at a "
        "smaller size, or load the model with weight_dtype fp8_e4m3fn."
    )
