"""Frames before and after the refiner: upscale, pad to the networks' sizes, crop back to the pixel.

Frames are [T, H, W, 3] in [0, 1], as ComfyUI's IMAGE; a video is [1, 3, T, H, W] in [-1, 1]. The refiner needs sides
that are multiples of 16 and 4n + 1 frames. The reference implementation crops the rest (1080 rows become 1072); here
the picture is padded at the right, at the bottom and at the end, by repeating its last column, row or frame. So the
picture stays in the top left corner, and cropping back needs only the original shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .color import COLORS_ONLY, Detail, match_colors
from .config import (
    COLOR_MATCHES,
    PIXEL_MULTIPLE,
    RESAMPLERS,
    SIZE_MODES,
    TEMPORAL_FACTOR,
    next_video_length,
)
from .masks import clean_mask
from .progress import Progress

MAX_SIDE = 16384  # pixels: ComfyUI's own limit of a side
_CHUNK_BYTES = 64 * 2**20  # of resized pixels at a time, so that the peak stays near the output's own size
_TRANSPARENT = (
    "images are transparent and are refined as they stand on black: connect alpha to Finish Frames, which makes them "
    "transparent again."
)
_ALIASING = ("mps",)  # devices for which PyTorch had no antialiased resampling in older versions
_ANTIALIASED = ("bilinear", "bicubic")  # the resamplers that torch can antialias when it makes a picture smaller


class PictureSize(NamedTuple):
    """The size of a picture in pixels, as `TargetSize.resolve` gives it."""

    height: int
    width: int

    @property
    def even(self) -> bool:
        """Whether both sides are even, as nearly all video files and players need them."""
        return self.height % 2 == self.width % 2 == 0

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class TargetSize:
    """The rule that turns the input's size into the size of the result.

    `mode` is one of SIZE_MODES; the field that the mode names counts, the others are ignored. Pixels.
    Raises ValueError for an unknown mode, a scale that is no positive number, and a short side that can't be.
    """

    mode: str = "short side"
    short_side: int = 1080
    scale: float = 4.0
    width: int = 1920
    height: int = 1080

    def __post_init__(self) -> None:
        if self.mode not in SIZE_MODES:
            raise ValueError(f"size must be one of {', '.join(SIZE_MODES)}; got {self.mode!r}.")
        if self.mode == "scale" and not 0 < self.scale <= MAX_SIDE:
            raise ValueError(f"scale must be a number above 0 and at most {MAX_SIDE}; got {self.scale}.")
        if self.mode == "short side" and not 1 <= self.short_side <= MAX_SIDE:
            raise ValueError(f"the short side must be 1 to {MAX_SIDE} pixels; got {self.short_side}.")

    def resolve(self, height: int, width: int) -> PictureSize:
        """The size for an input of `height` x `width` pixels. Resolve it once and hand the result down.

        "short side" and "scale" keep the aspect ratio as far as even sides can (to the nearest, halves up), because
        video files store colours at half size. "exact" and "keep" give exactly the named size, also with odd sides;
        "exact" stretches. Raises ValueError for a side below 1 or above MAX_SIDE.
        """
        if self.mode == "short side":
            short = min(height, width)
            target = PictureSize(*(2 * ((side * self.short_side + short) // (2 * short)) for side in (height, width)))
        elif self.mode == "scale":
            target = PictureSize(*(2 * int(side * self.scale / 2 + 0.5) for side in (height, width)))
        elif self.mode == "exact":
            target = PictureSize(self.height, self.width)
        else:
            target = PictureSize(height, width)
        if min(target) < 1 or max(target) > MAX_SIDE:
            raise ValueError(
                f"size {self.mode!r} would turn {width}x{height} into {target}; "
                f"each side must be 1 to {MAX_SIDE} pixels."
            )
        return target


def odd_size_notice(size: PictureSize) -> str:
    """A warning for a size with an odd side; empty for even sides."""
    if size.even:
        return ""
    return (
        f"{size} has an odd side: most video formats and many players refuse it. "
        "The sizes 'short side' and 'scale' give even sides."
    )


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare`.

    frames: [T', H', W', 3], sides multiples of 16 and 4n + 1 frames.
    reference: [T, H, W, 3], the same without the padding (a view of `frames`, so that it costs no memory).
    notes: sentences for the user: the new size and length, what was repaired in the input, and odd sides.
    alpha: how opaque the clip is, [1 or T, h, w] in [0, 1] at its own size, if it is transparent anywhere; `frames` and
        `reference` then show it on black.
    """

    frames: Tensor
    reference: Tensor
    notes: tuple[str, ...]
    alpha: Tensor | None = None


def prepare(
    frames: Tensor,
    size: TargetSize,
    resample: str = "bilinear",
    *,
    alpha: Tensor | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Resize frames [T, H, W, 3 or 4] to `size` and pad them for the refiner. The input is not modified.

    The reference implementation resizes bilinearly. `alpha` [1 or T, H, W] is how opaque frames with straight colours
    are; without it their fourth channel counts. Raises ValueError as `clean`, `clean_mask`, `TargetSize.resolve` and
    `resize` do, and for alpha of another size.
    """
    has_alpha = frames.ndim == 4 and frames.shape[3] == 4
    source, notes = clean(frames[..., :3] if has_alpha else frames)
    if has_alpha and alpha is None:
        alpha, repairs = clean_values(frames[..., 3], "the alpha channel of images")
        notes = (*notes, *repairs, *([] if bool((alpha == 1).all()) else [_TRANSPARENT]))
    if alpha is not None:
        alpha = clean_mask(alpha, len(source), "alpha")
        alpha = None if bool((alpha == 1).all()) else alpha
    if alpha is not None:
        source = _on_black(source, alpha)
    count, old_height, old_width, _ = source.shape
    height, width = target = size.resolve(old_height, old_width)
    padded = padded_shape(count, height, width)
    canvas = enlarge(source, height, width, padded[0], resample, progress=progress)
    reference = canvas[:count, :height, :width]
    odd = odd_size_notice(target)
    notes = (_describe(source.shape, reference.shape, padded), *notes, *([odd] if odd else []))
    return Prepared(canvas, reference, notes, alpha)


def enlarge(
    frames: Tensor,
    height: int,
    width: int,
    length: int,
    resample: str = "bilinear",
    *,
    progress: Progress | None = None,
) -> Tensor:
    """Resize clean frames [T, H, W, 3] to `height` x `width` and pad them: [length, H', W', 3], H', W' multiples of 16.

    Frames are treated one by one, so that a part of a clip comes out as it does within the whole. Raises ValueError as
    `resize` does.
    """
    _, rows, columns = padded_shape(1, height, width)
    canvas = frames.new_empty(length, rows, columns, 3)
    resize(frames, height, width, resample, out=canvas[: len(frames), :height, :width], progress=progress)
    extend_edges(canvas, len(frames), height, width)
    return canvas


def finish(
    frames: Tensor,
    reference: Tensor,
    color_match: str = "none",
    detail: Detail = COLORS_ONLY,
    *,
    progress: Progress | None = None,
) -> Tensor:
    """Crop refined frames [T', H', W', 3] to the exact frames and size of `reference` [T, H, W, 3], match the colours.

    `frames` must have the shape that `prepare` gave with this reference (or the reference's own). `color_match` is one
    of COLOR_MATCHES: "none" only crops, and the result is a view if no pixel had to be repaired; for the others, and
    for `detail`, see `color.match_colors`. The inputs are not modified. Raises ValueError for other shapes and
    as `clean` and `match_colors` do.
    """
    if color_match not in COLOR_MATCHES:
        raise ValueError(f"color_match must be one of {', '.join(COLOR_MATCHES)}; got {color_match!r}.")
    _check_shape(frames, "images")
    _check_shape(reference, "reference")
    shape = tuple(reference.shape[:3])
    allowed = (padded_shape(*shape), shape)
    if tuple(frames.shape[:3]) not in allowed:
        count, *size = allowed[0]
        if tuple(frames.shape[:3]) == (count + TEMPORAL_FACTOR - 1, *size):  # 4 of the first latent frame
            raise ValueError(
                f"images must have {count} frames; got {len(frames)}, as ComfyUI's own Load VAE makes them. Encode and "
                "decode with the VAE of Load FlashVideo VAE."
            )
        raise ValueError(
            f"images must be the refined form of the reference, {_format(allowed[0])}; got {_format(frames.shape)}. "
            "Take images and reference from the same Prepare Frames."
        )
    count, height, width = shape
    cropped, _ = clean(frames[:count, :height, :width])
    if color_match == "none":
        return cropped
    return match_colors(cropped, clean(reference, "reference")[0], color_match, detail, progress=progress)


def clean(frames: Tensor, name: str = "images") -> tuple[Tensor, tuple[str, ...]]:
    """Frames [T, H, W, 3 or 4] as float32 RGB in [0, 1], and a sentence for each repair.

    Clean float32 frames are returned without a copy. uint8 is read as 0..255, half precision is widened, an
    alpha channel is dropped, values outside [0, 1] are clamped. Raises ValueError for any other shape or type, for no
    frames and for NaN or infinite pixels; `name` is what the message calls the frames.
    """
    _check_shape(frames, name)
    notes = []
    if frames.shape[-1] == 4:
        frames = frames[..., :3]
        notes.append(f"{name} had an alpha channel; it was dropped, and the colours stay.")
    frames, repairs = clean_values(frames, name)
    return frames, (*notes, *repairs)


def clean_values(frames: Tensor, name: str) -> tuple[Tensor, tuple[str, ...]]:
    """Frames [T, ...] as float32 in [0, 1], and a sentence for each repair; see `clean`."""
    notes = []
    if frames.dtype == torch.uint8:
        return frames.float().div_(255), ()
    if not frames.is_floating_point():
        raise ValueError(f"{name} must hold numbers from 0 to 1 (float) or 0 to 255 (uint8); got {frames.dtype}.")
    frames = frames.float()
    low, high = torch.stack([torch.stack(frame.aminmax()) for frame in frames]).unbind(1)  # [T] each; NaN comes through
    broken = (~(torch.isfinite(low) & torch.isfinite(high))).nonzero()
    if len(broken):
        raise ValueError(
            f"{name} must be finite; frame {int(broken[0])} (the first is 0) has NaN or infinite pixels, "
            f"{len(broken)} of {len(frames)} frames do."
        )
    low, high = float(low.min()), float(high.max())
    if low < 0 or high > 1:
        frames = frames.clamp(0, 1)
        notes.append(f"{name} had values from {low:.3g} to {high:.3g}; they were clamped to 0..1.")
    return frames, tuple(notes)


def resize(
    frames: Tensor,
    height: int,
    width: int,
    resample: str = "bilinear",
    *,
    out: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Resize each frame of [T, H, W, 3] in [0, 1] to [T, height, width, 3], a few frames at a time.

    Half-pixel centres (no shift), antialiased where torch can ("bilinear", "bicubic"). `out` receives the result if
    given. Raises ValueError if `resample` is not one of RESAMPLERS.
    """
    if resample not in RESAMPLERS:
        raise ValueError(f"resample must be one of {', '.join(RESAMPLERS)}; got {resample!r}.")
    count = frames.shape[0]
    if out is None:
        out = frames.new_empty(count, height, width, 3)
    antialias = {"align_corners": False, "antialias": True} if resample in _ANTIALIASED else {}
    same_size = frames.shape[1:3] == (height, width)
    step = max(1, _CHUNK_BYTES // (height * width * 3 * frames.element_size()))
    for start in range(0, count, step):
        chunk = frames[start : start + step]
        if not same_size:
            planes = rearrange(chunk, "t h w c -> t c h w")
            if planes.device.type in _ALIASING:
                planes = planes.cpu()
            planes = F.interpolate(planes, (height, width), mode=resample, **antialias)
            chunk = rearrange(planes.clamp_(0, 1), "t c h w -> t h w c")  # bicubic overshoots
        out[start : start + step] = chunk
        if progress is not None:
            progress(min(start + step, count), count)
    return out


def padded_shape(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(frames, height, width) as the refiner takes them: 4n + 1 frames, sides the next multiples of 16."""
    rows, columns = (-(-side // PIXEL_MULTIPLE) * PIXEL_MULTIPLE for side in (height, width))
    return next_video_length(frames), rows, columns


def extend_edges(canvas: Tensor, frames: int, height: int, width: int) -> None:
    """Fill [T', H', W', 3] in place: repeat the last column, row and frame of its [:frames, :height, :width]."""
    canvas[:frames, :height, width:] = canvas[:frames, :height, width - 1 : width]
    canvas[:frames, height:] = canvas[:frames, height - 1 : height]
    canvas[frames:] = canvas[frames - 1 : frames]


def to_video(frames: Tensor) -> Tensor:
    """Frames [T, H, W, 3] in [0, 1] as a video [1, 3, T, H, W] in [-1, 1]."""
    return rearrange(frames * 2 - 1, "t h w c -> 1 c t h w")


def to_frames(video: Tensor) -> Tensor:
    """A video [B, 3, T, H, W] in [-1, 1] as frames [B*T, H, W, 3], clamped to [0, 1]."""
    return rearrange(((video + 1) / 2).clamp_(0, 1), "b c t h w -> (b t) h w c")


def to_bytes(frames: Tensor) -> Tensor:
    """Frames [T, H, W, 3] in [0, 1] as uint8, rounded."""
    return (frames * 255).round().byte()


def _on_black(frames: Tensor, alpha: Tensor) -> Tensor:
    """Straight colours [T, H, W, 3] premultiplied by alpha [1 or T, H, W]."""
    (height, width), found = frames.shape[1:3], alpha.shape[1:]
    if found != (height, width):
        raise ValueError(
            f"alpha must have the size of images, {width}x{height}; got {found[1]}x{found[0]}. "
            "Take both from the same node."
        )
    return frames * alpha[..., None]


def _check_shape(frames: Tensor, name: str) -> None:
    shape = list(frames.shape)
    if frames.ndim != 4 or shape[3] not in (3, 4):
        raise ValueError(f"{name} must be [frames, height, width, 3]; got {shape}.")
    if 0 in shape:
        raise ValueError(f"{name} must hold at least one frame of one pixel; got {shape}.")


def _format(shape: tuple[int, ...]) -> str:
    count, height, width = shape[:3]
    return f"{count} frame{'s' if count > 1 else ''} of {width}x{height}"


def _describe(source: tuple[int, ...], target: tuple[int, ...], padded: tuple[int, ...]) -> str:
    text = f"{_format(source)} {'become' if source[0] > 1 else 'becomes'} {_format(target)}"
    if tuple(target[:3]) == padded:
        return text + "."
    return f"{text}, padded to {_format(padded)} for the refiner; Finish Frames crops the padding off."
