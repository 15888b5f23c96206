"""Detail that the reference supports: finer than the draft, where the draft's shapes agree."""

from __future__ import annotations

import math

import pytest
import torch
from small_clips import clip_of
from torch import Tensor

from flashvideo.color import COLORS_ONLY, Detail, LowBand, auto_detail, match_colors
from flashvideo.config import NANO_DETAIL_GAIN, NANO_DETAIL_SIZE, NANO_FOOTAGE_STAGE2, NANO_STAGE2, STAGE2
from flashvideo.frames import resize


def test_a_small_detail_size_keeps_the_draft_and_adds_finer_detail() -> None:
    truth = clip_of(3, 96, 128, detail=0.05)
    draft = resize(truth, 24, 32, "area")
    enlarged = resize(draft, 96, 128, "bicubic")
    stray = clip_of(3, 96, 128, seed=5) - 0.5
    refined = (truth + 0.4 * stray).clamp(0, 1)  # right detail on a picture that has moved away
    far = (resize(refined, 24, 32, "area") - draft).abs().mean()
    result = match_colors(refined, enlarged, "wavelet", Detail(NANO_DETAIL_SIZE))
    assert (resize(result, 24, 32, "area") - draft).abs().mean() < 0.2 * far
    detail = [picture - resize(resize(picture, 24, 32, "area"), 96, 128, "bicubic") for picture in (truth, result)]
    alike = torch.nn.functional.cosine_similarity(detail[0].flatten(), detail[1].flatten(), dim=0)
    assert alike > 0.8


SUPPORTED = Detail(NANO_DETAIL_SIZE, NANO_DETAIL_GAIN)


def enlarged_clip(factor: int) -> tuple[Tensor, Tensor]:
    """(truth, the truth shrunk and enlarged again), with texture that only the truth has where the factor is 4."""
    truth = clip_of(2, 96, 128, detail=0.05)
    return truth, resize(resize(truth, 96 // factor, 128 // factor, "area"), 96, 128, "bicubic")


def fine(picture: Tensor) -> Tensor:
    """What is smaller than the detail size."""
    low_band = LowBand(*picture.shape[1:3], detail_size=NANO_DETAIL_SIZE)
    return picture - torch.stack([low_band(frame) for frame in picture])


def waves(height: int, width: int) -> Tensor:
    """A pattern of 10 pixels, coarse enough for a soft reference and of much contrast: [H, W, 1] in -1..1."""
    return torch.cos(torch.arange(width) * math.pi / 5).expand(height, width)[..., None]


@pytest.mark.parametrize(("contrast", "least", "most"), [(0.49, 2.45, 2.5), (0.0, 0.999, 1.001)])
def test_supported_detail_is_made_stronger_where_the_reference_is_soft_but_not_faint(
    contrast: float, least: float, most: float
) -> None:
    """2.5 times where the reference has all contrast there is, which it comes near to; not at all where it has none."""
    reference = (0.5 + contrast * waves(96, 128)).expand(2, -1, -1, 3)
    weak = reference + 0.002 * fine(torch.randn(reference.shape, generator=torch.Generator().manual_seed(1)))
    added, more = (match_colors(weak, reference, "wavelet", Detail(9, gain)) - reference for gain in (1.0, 2.5))
    assert least < float((more * added).sum() / added.square().sum()) < most
    whole = fine(weak - reference)
    assert 0.8 < float((added * whole).sum() / whole.square().sum()) <= 1.001


def test_detail_isnt_believed_where_larger_things_have_moved() -> None:
    """As behind fast motion, where a small VAE makes ghosts and stripes."""
    contrast = 0.15 * waves(96, 128) * (torch.arange(128) >= 64)[:, None]  # on the right: there it isn't faint
    truth, reference = (clip + contrast for clip in enlarged_clip(4))
    refined, left, right = truth.clone(), slice(0, 44), slice(84, 128)
    stripes = 0.1 * torch.cos(torch.arange(96) * math.pi / 2)[:, None, None]
    ghost = 0.25 * torch.cos(torch.arange(96) * math.pi / 12)[:, None, None]
    refined[:, :, left] += ghost + stripes
    plain = match_colors(refined, reference, "wavelet", Detail(NANO_DETAIL_SIZE))
    result = match_colors(refined, reference, "wavelet", SUPPORTED)
    away = [(clip - reference)[:, :, left].square().mean() for clip in (plain, result)]
    assert away[1] < 0.1 * away[0]
    assert (result - reference)[:, :, right].square().mean() > (plain - reference)[:, :, right].square().mean()


def test_what_the_reference_shows_isnt_lost_where_the_refined_clip_is_softer() -> None:
    truth, softer = enlarged_clip(2)
    result = match_colors(softer, truth, "wavelet", SUPPORTED)
    lost = (match_colors(softer, truth, "wavelet", Detail(NANO_DETAIL_SIZE)) - truth).square().mean()
    assert (result - truth).square().mean() < 0.1 * lost


def test_on_a_sharp_reference_detail_is_half_as_strong_whatever_the_gain() -> None:
    truth, _ = enlarged_clip(1)
    other = truth + 0.03 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    strong, plain = (match_colors(other, truth, "wavelet", Detail(9, gain)) for gain in (2.5, 1.0))
    assert torch.equal(strong, plain)
    whole = fine(other - truth)
    assert 0.4 < float(((strong - truth) * whole).sum() / whole.square().sum()) <= 0.501


def test_supported_detail_of_a_frame_follows_from_that_frame_alone() -> None:
    truth, reference = enlarged_clip(4)
    both = match_colors(truth, reference, "wavelet", SUPPORTED)
    assert torch.equal(both[1:], match_colors(truth[1:], reference[1:], "wavelet", SUPPORTED))
    for same in (reference, torch.full_like(reference, 0.5), torch.zeros_like(reference)):
        assert (match_colors(same, same, "wavelet", SUPPORTED) - same).abs().max() < 1e-5


def test_only_the_miniature_is_held_to_its_draft_by_itself() -> None:
    assert auto_detail(NANO_STAGE2) == Detail(9)
    assert auto_detail(NANO_FOOTAGE_STAGE2) == Detail(9, gain=3.5)
    assert auto_detail(STAGE2) == auto_detail(None) == COLORS_ONLY == Detail(70)
