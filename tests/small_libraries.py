"""Small libraries of clips, and frames that can be recognised in samples."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flashvideo.training.data.clip_library import ClipLibrary, Sizes
from flashvideo.training.data.decoding import Decoded
from flashvideo.training.data.held_out import split_of


def name_of(split: str, start: str, ending: str) -> str:
    """A file name of a split."""
    return next(name for number in range(99) if split_of(name := f"{start}{number}{ending}") == split)


def write_library(folder: Path, clips: dict[str, np.ndarray], captions: dict[str, str] | None = None) -> ClipLibrary:
    """A library of frames [T, H, W, 3] by name."""
    library = ClipLibrary.create(folder, Sizes(384, 1024, 300))
    for name, frames in clips.items():
        digest = hashlib.sha256(name.encode() + frames.tobytes()).hexdigest()
        rate = 15.0 if len(frames) > 1 else 0.0
        library.add(name, digest, Decoded(frames, rate), source="test", licence="MIT")
    library.caption([captions or {}])
    return ClipLibrary.open(folder)


def counted(frames: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Frame t has red 4 t, row y green 3 y, column x blue 2 x: each pixel says where it is from."""
    t, y, x = np.ogrid[:frames, :height, :width]
    return np.stack(np.broadcast_arrays(4 * t, 3 * y, 2 * x), axis=-1).astype(np.uint8)


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A still [1, H, W, 3] of clouds of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(1, 3, height, width)
    for cell in (4, 8, 16, 64):
        noise = torch.randn(1, 3, -(-height // cell), -(-width // cell), generator=generator)
        total += torch.nn.functional.interpolate(noise, (height, width), mode="bicubic")
    levels = (total / total.std() * 45 + 128).clamp(0, 255).byte()
    return levels.permute(0, 2, 3, 1).numpy()


def levels(video: Tensor) -> np.ndarray:
    """[3, T, H, W] in [-1, 1] -> [T, H, W, 3] in levels of 255."""
    return ((video + 1) * 127.5).permute(1, 2, 3, 0).numpy()
