"""Transparency beside the refined picture: alpha is enlarged along the edges that the network has drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import clean_mask
from ..progress import Progress

_LUMA = (0.2126, 0.7152, 0.0722)  # BT.709
_RADIUS = 2  # of the windows in which alpha follows brightness, in pixels of the source
_UNSEEN = 0.5 / 255  # alpha below which a pixel of 8 bits shows nothing
_FLAT = 1e-4  # variance of brightness below which a window has no edge: (0.01 of white)^2


class TransparentClip(Protocol):
    """A clip with alpha; see `VideoClip`."""

    def frames(self, start: int = 0) -> Iterator[Tensor]:
        """Frames on black."""

    def alpha(self, start: int = 0) -> Iterator[Tensor]:
        """How opaque they are."""


class AlphaLayer:
    """A clip's alpha for refined frames. The clip is read on from segment to segment, not from its start each time."""

    def __init__(self, clip: TransparentClip) -> None:
        self._clip = clip
        self._sources: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._next: int | None = None

    def add(self, first: int, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks [t, H, W, 3] on black, from the clip's frame number `first` on, as premultiplied [t, H, W, 4]."""
        if self._next != first:
            self._sources, self._next = zip(self._clip.frames(first), self._clip.alpha(first), strict=True), first
        for chunk in chunks:
            pictures = []
            for refined in chunk:
                source, alpha = next(self._sources)
                larger = enlarge_alpha(alpha, source, refined)
                pictures.append(torch.cat([refined, larger[..., None].to(refined.dtype)], dim=2))
            self._next += len(pictures)
            yield torch.stack(pictures)


def enlarge_alpha(alpha: Tensor, source: Tensor, refined: Tensor, reference: Tensor | None = None) -> Tensor:
    """Alpha [h, w] of a source [h, w, 3] for its refined picture [H, W, 3], all in [0, 1]: [H, W].

    In each small window of the source alpha is taken as a linear function of brightness (the guided filter, He et al.,
    arXiv 1505.00996): alpha is enlarged bilinearly, and follows what the refined picture's brightness adds to that of
    the source. So a picture that didn't change keeps its alpha. Nothing gets more or less opaque than the source is
    nearby: opaque and empty areas stay as they are. `reference` is the enlarged source, where `source` isn't exact.
    """
    a, guide = alpha.float()[None, None], _brightness(source)
    mean, mean_alpha = _box(guide), _box(a)
    variance = _box(guide * guide) - mean * mean
    slope = _box((_box(guide * a) - mean * mean_alpha) / (variance + _FLAT))
    least, most = -F.max_pool2d(-a, 3, 1, 1), F.max_pool2d(a, 3, 1, 1)
    enlarged, slope, explained, least, most = (
        F.interpolate(each, refined.shape[:2], mode="bilinear", align_corners=False, antialias=True)
        for each in (a, slope, slope * guide, least, most)
    )
    if reference is not None:
        explained = slope * _brightness(reference)
    found = enlarged + slope * _brightness(refined) - explained
    return torch.minimum(torch.maximum(found, least), most)[0, 0].clamp(0, 1)


def make_transparent(
    refined: Tensor, reference: Tensor, alpha: Tensor, *, progress: Progress | None = None
) -> tuple[Tensor, Tensor]:
    """Refined frames on black and their enlarged reference, both [T, H, W, 3], as straight colours and alpha [T, H, W].

    `alpha`: [1 or T, h, w] at the size of the source, which is read off the reference. All in [0, 1]. Where nothing
    shows the colour is black. See `enlarge_alpha`. Raises ValueError for another number of frames.
    """
    colours, larger = torch.empty_like(refined), refined.new_empty(refined.shape[:3])
    alpha = clean_mask(alpha, len(refined), "alpha").expand(len(refined), -1, -1)
    for i, (picture, enlarged, own) in enumerate(zip(refined, reference, alpha, strict=True)):
        planes = enlarged.permute(2, 0, 1)[None]
        source = F.interpolate(planes, own.shape, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
        larger[i] = enlarge_alpha(own, source, picture, enlarged)
        shown = larger[i, ..., None]
        colours[i] = torch.where(shown < _UNSEEN, 0, (picture / shown.clamp(min=_UNSEEN)).clamp(0, 1))
        if progress is not None:
            progress(i + 1, len(refined))
    return colours, larger


def _brightness(picture: Tensor) -> Tensor:
    return (picture.float() @ picture.new_tensor(_LUMA, dtype=torch.float32))[None, None]


def _box(x: Tensor) -> Tensor:
    """Means of windows, [1, 1, h, w]; beyond the picture its border goes on."""
    return F.avg_pool2d(F.pad(x, (_RADIUS,) * 4, mode="replicate"), 2 * _RADIUS + 1, 1)
