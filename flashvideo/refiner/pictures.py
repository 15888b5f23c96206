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
from ..video_files import DEEP_ENDINGS, deep_file, is_premultiplied, read_deep, split_alpha

_JPEG_QUALITY = 95
_OPAQUE_ENDINGS = (".jpg", ".jpeg", ".bmp")
_WHITE, _DEEP_WHITE = 255, 65535
_ORIENTATION = 274  # EXIF's tag
_ALPHA_MODES = ("RGBA", "LA", "PA")
_RGB_MODES = ("RGB", "RGBA", "P")


@dataclass(frozen=True)
class Picture:
    """A picture upright: pixels [height, width, 3], uint8 or float in [0, 1]; with `alpha` [height, width] on black.

    `profile`: its ICC profile where it is one of RGB. `deep`: it has 16 bits a colour.
    """

    pixels: Tensor
    alpha: Tensor | None
    profile: bytes | None
    deep: bool = False


def read_picture(path: Path) -> Picture:
    """Read a picture file. Raises CommandError."""
    try:
        with Image.open(path) as image:
            mode, profile = image.mode, image.info.get("icc_profile")
            orientation = image.getexif().get(_ORIENTATION, 1)
            upright = ImageOps.exif_transpose(image)
            if mode.startswith("I;16") or (mode == "I" and image.format == "PNG"):  # by Pillow's version
                grey = torch.from_numpy(np.asarray(upright).astype(np.float32)) / _DEEP_WHITE
                return Picture(grey[..., None].expand(-1, -1, 3).contiguous(), None, None, deep=True)
            if mode in ("I", "F"):
                raise CommandError(f"{path} has 32 bits a pixel: save it with 8 or 16.")
            profile = profile if mode in _RGB_MODES else None
            fine = read_deep(path, image.format, orientation)
            if fine is not None:
                return _deep_picture(torch.from_numpy(fine), profile, premultiplied=is_premultiplied(path))
            is_transparent = upright.mode in _ALPHA_MODES or "transparency" in upright.info
            stored = torch.from_numpy(np.array(upright.convert("RGBA" if is_transparent else "RGB")))
            if stored.shape[2] == len("RGB") or int(stored[..., 3].min()) == _WHITE:
                return Picture(stored[..., :3].contiguous(), None, profile)
            shown = stored.float() / _WHITE
            return Picture(shown[..., :3] * shown[..., 3:], shown[..., 3], profile)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise CommandError(f"{path} can't be read as a picture: {error}.") from error


def _deep_picture(stored: Tensor, profile: bytes | None, *, premultiplied: bool) -> Picture:
    colours, alpha = stored[..., :3], stored[..., 3:]
    if not alpha.numel() or float(alpha.min()) == 1:
        return Picture(colours.contiguous(), None, profile, deep=True)
    return Picture(colours.contiguous() if premultiplied else colours * alpha, alpha[..., 0], profile, deep=True)


def keeps_alpha(picture: Picture, target: Path) -> bool:
    """Whether a picture is transparent, and its result can be."""
    return picture.alpha is not None and target.suffix.lower() not in _OPAQUE_ENDINGS


def note_picture_losses(picture: Picture, target: Path, note: Callable[[str], None]) -> None:
    """Report what the result has no room for."""
    if picture.alpha is not None and not keeps_alpha(picture, target):
        ending = target.suffix.lower()
        note(f"Its transparency gets lost: a {ending} file stands on black, .png and .webp keep it.")
    if picture.deep and target.suffix.lower() not in DEEP_ENDINGS:
        note("Its 16 bits a colour become 8: .png and .tif keep them.")


def write_picture(target: Path, refined: Tensor, picture: Picture, *, force: bool) -> None:
    """Write a refined picture [H, W, 3 or premultiplied 4] in [0, 1], as deep as its source where the ending can be.

    `force` allows to replace.
    """
    ending = target.suffix.lower()
    deep = picture.deep and ending in DEEP_ENDINGS
    white = _DEEP_WHITE if deep else _WHITE
    colours, alpha = (refined, None) if refined.shape[2] == len("RGB") else split_alpha(refined, white)
    pixels = (colours.double() * white).round().numpy() if deep else to_bytes(colours).numpy()
    pixels = pixels.astype(np.uint16 if deep else np.uint8)
    if alpha is not None:
        pixels = np.dstack([pixels, alpha.astype(pixels.dtype)])
    with whole_file(target, replace=force) as part:
        if deep:
            part.write_bytes(deep_file(pixels, ending, picture.profile))
        else:
            kind = Image.registered_extensions()[ending]
            Image.fromarray(pixels).save(part, format=kind, quality=_JPEG_QUALITY, icc_profile=picture.profile)
