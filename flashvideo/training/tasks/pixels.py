"""Stage II's errors in pixels: part of the latent that its velocity leads to is decoded and compared with the clip."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...color import LowBand, check_detail_size
from ...config import SPATIAL_FACTOR, video_frames
from ...vae import VideoVAE
from ..errors import TrainingError
from ..randomness import randint
from .fused_vae import fused_or_plain
from .losses import PixelWeights, pixel_loss


@dataclass(frozen=True)
class PixelSettings:
    """How much pixels count beside latents, where a batch's pieces begin with their clips.

    The network's velocity is followed to the clean latent, of which a part is decoded and compared. The VAE doesn't
    learn; through it, errors of a latent count as much as they are visible.
    """

    weight: float = 0.0  # of `pixel_loss` beside the velocity's error; 0: latents alone count
    since: int = 0  # the first step in which it counts
    window: int = 12  # latent pixels of the part that is decoded, rows and columns
    edge: int = 1  # latent pixels around it that are decoded, but not compared: their neighbours are missing
    detail_size: float = (
        0.0  # pixels: what is larger isn't compared, since Finish Frames takes it from the draft; 0: all
    )
    fused: bool = False  # decodes through the kernels of `fused_vae`, where the CPU and its compiler can
    terms: PixelWeights = field(default_factory=PixelWeights)

    def __post_init__(self) -> None:
        """Refuse parts with nothing in them."""
        if not 0 <= 2 * self.edge < self.window:
            raise TrainingError(
                f"[pixels] edge must be 0 or more, and leave something of a window of {self.window}; got {self.edge}."
            )
        check_detail(self.detail_size, "[pixels]")


def check_detail(size: float, table: str) -> None:
    """Refuse a detail size, of a config's `table`, that no picture is split at; 0 is none."""
    if size:
        try:
            check_detail_size(size)
        except ValueError as error:
            raise TrainingError(f"{table} {error}") from None


def visible_part(
    videos: Sequence[Tensor], piece: Sequence[Any], window: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Cut the part of the clips that pieces of latents show; the pieces begin with their clips.

    `piece` holds the slices of latent frames, rows and columns last, `window` the latent pixels of the part's sides.
    Returns "video" [B, 3, F, h, w] and "place", the latent row and column where the part begins in the piece.
    """
    time, *sides = piece[-3:]
    place = [randint(generator, 0, side.stop - side.start - window) for side in sides]
    starts = [side.start + offset for side, offset in zip(sides, place, strict=True)]
    rows, columns = (slice(SPATIAL_FACTOR * start, SPATIAL_FACTOR * (start + window)) for start in starts)
    frames = video_frames(time.stop)
    return {"video": torch.stack([video[:, :frames, rows, columns] for video in videos]), "place": torch.tensor(place)}


def decoder_of(vae: VideoVAE, *, fused: bool) -> Callable[[Tensor], Tensor]:
    """What decodes latents with a VAE's weights: the VAE, or the kernels of `fused_vae` where these can."""
    learner = fused_or_plain(vae) if fused else vae
    return learner.decode if learner is not vae else lambda latent: vae.decode(latent.to(vae.dtype))


def visible_loss(
    decode: Callable[[Tensor], Tensor], latent: Tensor, video: Tensor, place: Tensor, settings: PixelSettings
) -> Tensor:
    """Decode the part of a latent in raw scale that `visible_part` chose, and compare it."""
    rows, columns = (slice(start, start + settings.window) for start in place.tolist())
    edge = settings.edge * SPATIAL_FACTOR
    inner = slice(edge, settings.window * SPATIAL_FACTOR - edge)
    shown = decode(latent[..., rows, columns]).float()
    shown = with_large_of(video, shown, settings.detail_size)
    return weighted_loss(shown[..., inner, inner], video[..., inner, inner], settings.terms)


def with_large_of(video: Tensor, shown: Tensor, detail_size: float) -> Tensor:
    """`shown` [B, 3, T, H, W], but what is larger than `detail_size` pixels is `video`'s; all is its own with 0."""
    if not detail_size:
        return shown
    return shown + LowBand(*shown.shape[-2:], shown.device, detail_size).of_planes(video - shown)


def weighted_loss(shown: Tensor, video: Tensor, terms: PixelWeights) -> Tensor:
    """How far videos [B, 3, T, H, W] are from the true ones, by these weights."""
    return pixel_loss(shown, video, **dataclasses.asdict(terms))["loss"]
