"""Each measure of the ablations on inputs whose result is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flashvideo.training.ablations.measures import (
    METRICS,
    bands,
    colour_shift,
    delta_e,
    flicker,
    gradient_energy,
    gradient_error,
    library,
    lines,
    mean_of,
    measure,
    optical_flow,
    psnr,
    sharpness,
    ssim,
    warp_error,
)
from flashvideo.training.errors import TrainingError

ROUNDING = 1e-3


def waves(length: float, frames: int = 2, height: int = 96, width: int = 160) -> Tensor:
    """Grey stripes [frames, height, width, 3] with a period of `length` pixels, standing still."""
    row = 0.5 + 0.4 * torch.sin(torch.arange(width) * 2 * math.pi / length)
    return row[None, None, :, None].expand(frames, height, width, 3).contiguous()


def columns(frames: int = 2) -> Tensor:
    """Black and white columns of one pixel, [frames, 96, 160, 3]."""
    return (torch.arange(160) % 2).float()[None, None, :, None].expand(frames, 96, 160, 3).contiguous()


def moving(step: int, frames: int = 3) -> Tensor:
    """A smooth random texture that moves by `step` pixels a frame to the left, [frames, 64, 96, 3]."""
    noise = torch.rand(1, 1, 24, 48, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(noise, (96, 192), mode="bicubic", align_corners=False)[0, 0].clamp(0, 1)
    cuts = [large[16:80, 40 + step * frame : 136 + step * frame] for frame in range(frames)]
    return torch.stack(cuts)[..., None].expand(-1, -1, -1, 3).contiguous()


@pytest.fixture(autouse=True)
def _needs_scikit_image() -> None:
    pytest.importorskip("skimage")


def test_psnr_of_an_error_of_a_tenth_is_20_db() -> None:
    clip = waves(20)
    assert psnr(clip + 0.1, clip) == pytest.approx(20, abs=ROUNDING)
    assert psnr(clip, clip) == math.inf


def test_ssim_is_one_for_the_same_and_less_for_a_blurred_clip() -> None:
    clip = moving(0)
    blurred = torch.nn.functional.avg_pool2d(clip.permute(0, 3, 1, 2), 5, 1, 2).permute(0, 2, 3, 1)
    assert ssim(clip, clip) == pytest.approx(1)
    assert ssim(blurred, clip) < 0.9


def test_bands_add_up_and_part_broad_from_fine() -> None:
    for length, in_low in ((400, True), (12, False)):
        clip = waves(length)
        low, high = bands(clip)
        assert torch.allclose(low + high, clip, atol=1e-6)
        assert (low.std() > 5 * high.std()) == in_low


def test_gradient_energy_of_columns_is_a_half() -> None:
    assert gradient_energy(columns()) == pytest.approx(0.5)  # 1 from column to column, 0 from row to row


def test_half_the_contrast_lacks_three_quarters_of_the_gradient_energy() -> None:
    clip = columns()
    assert gradient_error(0.25 + clip / 2, clip) == pytest.approx(75)
    assert gradient_error(clip * 1.5, clip) == pytest.approx(125)
    assert gradient_error(clip, clip) == 0


def test_sharpness_of_columns_is_the_laplacians_variance() -> None:
    # Inside, the Laplacian of 0, 1, 0, 1, ... is twice the step, plus and minus; the borders' is half that.
    assert sharpness(columns()) == pytest.approx((2 * 255) ** 2, rel=0.02)
    assert sharpness(torch.full((2, 32, 32, 3), 0.3)) == pytest.approx(0)


def test_flicker_is_the_error_of_the_change_in_levels() -> None:
    clip = moving(2)
    pumping = clip + torch.tensor([0.1, -0.1, 0.1])[:, None, None, None]
    assert flicker(pumping, clip) == pytest.approx(0.2 * 255, rel=1e-4)
    assert flicker(clip + 0.1, clip) == pytest.approx(0, abs=ROUNDING)
    assert flicker(clip[:1], clip[:1]) == 0


def test_the_flow_follows_a_moving_texture_and_the_warp_error_sees_flicker() -> None:
    clip = moving(2)
    flow = optical_flow(clip)
    assert flow.shape == (2, 2, 64, 96)
    inside = flow[:, :, 12:-12, 12:-12]
    assert inside[:, 0].median() == pytest.approx(0, abs=0.1)
    assert inside[:, 1].median() == pytest.approx(-2, abs=0.2)
    own = warp_error(clip, clip, flow)
    pumping = clip + torch.tensor([0.1, -0.1, 0.1])[:, None, None, None]
    assert own < 2
    assert warp_error(pumping, clip, flow) == pytest.approx(0.2 * 255, rel=0.05)


def test_a_line_across_the_picture_is_seen_and_a_cast_is_not() -> None:
    clip = moving(1)
    for place in ((1, slice(None), slice(40, 41)), (1, slice(0, 1), slice(None))):
        marked = clip.clone()
        marked[place] += 0.1
        assert lines(marked, clip) == pytest.approx(0.1 * 255, rel=0.05)
    assert lines(clip, clip) == 0
    assert lines(clip + 0.05, clip) < ROUNDING
    assert lines(clip * 0.9 + 0.05, clip) < 4


@pytest.mark.parametrize(
    ("color", "lab"),  # published CIE L*a*b* values of the sRGB primaries, D65
    [
        ((1.0, 1.0, 1.0), (100.0, 0.0, 0.0)),
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
        ((1.0, 0.0, 0.0), (53.24, 80.09, 67.20)),
        ((0.0, 1.0, 0.0), (87.73, -86.18, 83.18)),
        ((0.0, 0.0, 1.0), (32.30, 79.19, -107.86)),
    ],
)
def test_colour_difference_is_cie76(color: tuple[float, ...], lab: tuple[float, ...]) -> None:
    distance = delta_e(torch.tensor(color).expand(2, 2, 3), torch.zeros(2, 2, 3))
    assert distance.shape == (2, 2)
    assert float(distance[0, 0]) == pytest.approx(math.hypot(*lab), abs=0.02)  # black is the origin


def test_colour_shift_sees_broad_areas_and_not_detail() -> None:
    clip = torch.full((1, 96, 96, 3), 0.5)
    tinted = clip + torch.tensor([0.04, 0.0, -0.04])
    assert colour_shift(tinted, clip) == pytest.approx(float(delta_e(tinted, clip).mean()), rel=1e-3)
    board = (torch.arange(96)[:, None] + torch.arange(96)) % 2 * 2 - 1
    detailed = clip + 0.2 * board[None, :, :, None]
    assert float(delta_e(detailed, clip).mean()) > 15
    assert colour_shift(detailed, clip) < 0.1


def test_a_clip_is_measured_in_every_way_that_tables_print() -> None:
    clip = moving(1)
    values = measure(clip, clip, optical_flow(clip), clip * 0.9)
    assert set(values) <= set(METRICS)
    assert values["psnr"] == values["psnr_high"] == math.inf
    assert values["gradient_error"] == values["flicker"] == values["colour_error"] == 0
    assert values["colour_shift"] == colour_shift(clip, clip * 0.9) > 0
    assert mean_of([{"psnr": 20.0}, {"psnr": 30.0}]) == {"psnr": 25.0}
    assert mean_of([]) == {}


def test_a_missing_library_is_named() -> None:
    with pytest.raises(TrainingError, match="pip install scikit-image"):
        library("no_such_part")
