"""Regions of a clip: the box, the soft border, and that nothing beyond it changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashvideo.refiner.regions import find_region

FRAMES = torch.rand((5, 90, 130, 3), generator=torch.Generator().manual_seed(0))


def square(top: int, left: int, side: int, *, value: float = 1.0) -> Tensor:
    """A mask of the frames' size with a square."""
    mask = torch.zeros(1, *FRAMES.shape[1:3])
    mask[:, top : top + side, left : left + side] = value
    return mask


def whole_mask(border: int, mask: Tensor, context: int = 4) -> Tensor:
    """A region's mask in the whole picture."""
    region = find_region(FRAMES, mask, border, context)
    canvas = torch.zeros(len(region.mask), *FRAMES.shape[1:3])
    canvas[:, region.top : region.top + region.height, region.left : region.left + region.width] = region.mask
    return canvas


@pytest.mark.parametrize("border", [0, 1, 2, 5, 16, 31])
def test_the_border_falls_outside_of_the_marked_pixels_and_ends_at_exactly_nothing(border: int) -> None:
    soft, row = whole_mask(border, square(40, 50, 12)), 46
    assert torch.equal(soft[0, 40:52, 50:62], torch.ones(12, 12))
    beyond = torch.ones(FRAMES.shape[1:3], dtype=torch.bool)
    beyond[40 - border : 52 + border, 50 - border : 62 + border] = False
    assert not soft[0, beyond].any()
    assert (soft[0, row, 62 - 1 : 62 + border].diff() <= 0).all()  # never brighter further out
    if border > 2:
        assert 0 < float(soft[0, row, 62 + border // 2]) < 1
    assert float(soft.max()) == 1
    assert torch.equal(soft, soft.flip(0)) and torch.allclose(soft[0, row, :56].flip(0), soft[0, row, 56:112], atol=0)


def test_a_mask_at_the_picture_s_edge_does_not_fade_towards_it() -> None:
    soft = whole_mask(8, square(0, 0, 20))
    assert torch.equal(soft[0, :20, :20], torch.ones(20, 20))
    assert not soft[0, 28:].any() and not soft[0, :, 28:].any()


def test_the_box_has_context_and_sides_of_sixteen_where_there_is_room() -> None:
    region = find_region(FRAMES, square(40, 50, 12), 8, 10)
    assert (region.height, region.width) == (48, 48)  # 12 + 2 * 8 + 2 * 10
    assert (region.top, region.left) == (22, 32)
    corner = find_region(FRAMES, square(80, 120, 10), 0, 10)
    assert (corner.top + corner.height, corner.left + corner.width) == (90, 130)
    assert (corner.height, corner.width) == (32, 32)
    tall = find_region(FRAMES, square(5, 50, 80), 0, 10)
    assert (tall.top, tall.height) == (0, 90)  # 96 would not fit
    assert torch.equal(region.crop(FRAMES), FRAMES[:, 22:70, 32:80])


def test_the_box_holds_the_masks_of_all_frames() -> None:
    masks = torch.cat([square(10, 10 + 20 * index, 8) for index in range(5)])
    region = find_region(FRAMES, masks, 4, 0)
    assert region.mask.shape == (5, region.height, region.width)
    assert region.left <= 6 and region.left + region.width >= 102
    for index, mask in enumerate(region.mask):
        assert float(mask[10 - region.top, 10 + 20 * index - region.left]) == 1
        assert not mask[:, 10 + 20 * index + 12 - region.left :].any()


def test_no_mask_marks_the_middle_and_another_size_is_stretched() -> None:
    middle = whole_mask(0, None)
    assert torch.equal(middle[0, 22:68, 32:98], torch.ones(46, 66)) and int(middle.sum()) == 46 * 66
    small = torch.zeros(9, 13)
    small[3:5, 5:8] = 1
    stretched = whole_mask(0, small)
    assert float(stretched[0, 40, 65]) == 1
    assert not stretched[0, :25].any() and not stretched[0, 55:].any()


def test_half_marked_pixels_stay_half_marked() -> None:
    assert float(whole_mask(6, square(40, 50, 12, value=0.5)).max()) == 0.5


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(1, 64, 64), "mask is empty"),
        (torch.ones(3, 90, 130), "must have 1 frame, or as many as the clip, 5; got 3"),
        (torch.full((1, 90, 130), float("nan")), "not finite"),
        (torch.ones(1, 2, 90, 130), r"must be \[frames, height, width\]; got"),
    ],
)
def test_other_masks_are_refused_in_words(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_region(FRAMES, mask, 4, 4)


def test_a_stretched_mask_is_not_rounded_beyond_one() -> None:
    region = find_region(torch.zeros(1, 38, 19, 3), torch.ones(1, 15, 8), border=186, context=0)
    assert float(region.mask.max()) == 1
