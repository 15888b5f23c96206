"""Stills: a picture file as the refiner takes it, and a refined picture as a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..atomic_files import whole_file
from ..errors import CommandError
from ..frames import to_bytes
from ..video_files import split_alpha

_JPEG_QUALITY = 95
_OPAQUE_ENDINGS = (".jpg", ".jpeg", ".bmp")
_WHITE = 255
_DEEP_STEP = 257  # 65535 / 255
_ALPHA_MODES = ("RGBA", "LA", "PA")
_RGB_MODES = ("RGB", "RGBA", "P")


@dataclass(frozen=True)
class Picture:
    """A picture upright: pixels [height, width, 3], uint8 or on black in [0, 1] with `alpha` [height, width].

    `profile`: its ICC profile where it is one of RGB.
    """

    pixels: Tensor
    alpha: Tensor | None
    profile: bytes | None


def read_picture(path: Path) -> Picture:
    """Read a picture file. Raises CommandError."""
    try:
        with Image.open(path) as image:
            mode, profile = image.mode, image.info.get("icc_profile")
            deep = mode.startswith("I;16") or (mode == "I" and image.format == "PNG")  # by Pillow's version
            upright = ImageOps.exif_transpose(image)
            if deep:  # Pillow would cut off at 255
                grey = (np.asarray(upright).astype(np.float32) / _DEEP_STEP).round().astype(np.uint8)
                upright = Image.fromarray(grey)
            elif mode in ("I", "F"):
                raise CommandError(f"{path} has 32 bits a pixel: save it with 8 or 16.")
            profile = profile if mode in _RGB_MODES else None
            is_transparent = upright.mode in _ALPHA_MODES or "transparency" in upright.info
            stored = torch.from_numpy(np.array(upright.convert("RGBA" if is_transparent else "RGB")))
            if stored.shape[2] == len("RGB") or int(stored[..., 3].min()) == _WHITE:
                return Picture(stored[..., :3].contiguous(), None, profile)
            shown = stored.float() / _WHITE
            return Picture(shown[..., :3] * shown[..., 3:], shown[..., 3], profile)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise CommandError(f"{path} can't be read as a picture: {error}.") from error


def keeps_alpha(picture: Picture, target: Path) -> bool:
    """Whether a picture is transparent, and its result can be."""
    return picture.alpha is not None and target.suffix.lower() not in _OPAQUE_ENDINGS


def note_picture_losses(picture: Picture, target: Path, note: Callable[[str], None]) -> None:
    """Report what the result has no room for."""
    if picture.alpha is not None and not keeps_alpha(picture, target):
        ending = target.suffix.lower()
        note(f"Its transparency gets lost: a {ending} file stands on black, .png and .webp keep it.")


def write_picture(target: Path, refined: Tensor, profile: bytes | None, *, force: bool) -> None:
    """Write a refined picture [H, W, 3 or premultiplied 4] in [0, 1]; `force` allows to replace."""
    if refined.shape[2] == len("RGB"):
        pixels = to_bytes(refined).numpy()
    else:
        colours, alpha = split_alpha(refined, _WHITE)
        pixels = np.dstack([to_bytes(colours).numpy(), alpha.astype(np.uint8)])
    kind = Image.registered_extensions()[target.suffix.lower()]
    with whole_file(target, replace=force) as part:
        Image.fromarray(pixels).save(part, format=kind, quality=_JPEG_QUALITY, icc_profile=profile)
