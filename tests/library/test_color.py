"""Colour matching: casts go, detail stays, nothing flickers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_clips import clip_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashvideo.color import (
    METHODS,
    Detail,
    LowBand,
    adain_transform,
    color_statistics,
    match_colors,
)
from flashvideo.config import (
    COLOR_MATCHES,
    DETAIL_SIZE,
    MAX_DETAIL_SIZE,
    MIN_DETAIL_SIZE,
    NANO_DETAIL_SIZE,
)
from flashvideo.frames import TargetSize, finish, prepare
from flashvideo.training.ablations.measures import delta_e

SIDES = (1, 2, 7, 16, 23, 24, 25, 100, 271)
BIT = 1 / 255


def turned(colors: Tensor, degrees: float) -> Tensor:
    """Colours [..., 3] with their hue turned: a rotation about the grey axis."""
    angle, share = math.radians(degrees), 1 / 3
    cosine, sine = math.cos(angle), math.sin(angle) * math.sqrt(share)
    low, high = (1 - cosine) * share - sine, (1 - cosine) * share + sine
    same = cosine + (1 - cosine) * share
    return colors @ torch.tensor([[same, low, high], [high, same, low], [low, high, same]]).T


CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "darker": lambda clip: clip * 0.85,
    "brighter": lambda clip: clip * 1.15,
    "offset": lambda clip: clip + torch.tensor([0.06, -0.03, 0.05]),
    "gain and offset": lambda clip: clip * torch.tensor([0.9, 1.05, 0.85]) + torch.tensor([0.03, -0.02, 0.08]),
    "less contrast": lambda clip: (clip - 0.5) * 0.8 + 0.5,
    "hue": lambda clip: turned(clip, 4),
}
MATCHED = [(method, cast) for method in METHODS for cast in CASTS if (method, cast) != ("adain", "hue")]  # see below


def colour_error(clip: Tensor, reference: Tensor) -> float:
    """Mean Delta E of the pixels."""
    pytest.importorskip("skimage")
    return float(delta_e(clip, reference).mean())


def gradient_energy(clip: Tensor) -> float:
    """Sum of squared differences between neighbours along both axes."""
    return float(clip.diff(dim=1).square().sum() + clip.diff(dim=2).square().sum())


@pytest.mark.parametrize(("method", "cast"), MATCHED)
def test_a_cast_over_the_whole_clip_goes(method: str, cast: str) -> None:
    reference = clip_of()
    refined = CASTS[cast](reference)
    before = colour_error(refined, reference)
    after = colour_error(match_colors(refined, reference, method), reference)
    assert before > 1.5
    assert after <= 1.0  # below what an eye sees side by side
    assert after < before / 2


def test_adain_lessens_a_turned_hue_but_cannot_undo_it() -> None:
    """A turn mixes the channels; a gain and an offset for each of them can't mix them back."""
    reference = clip_of()
    refined = CASTS["hue"](reference)
    before, after = (colour_error(clip, reference) for clip in (refined, match_colors(refined, reference, "adain")))
    assert after < before


@pytest.mark.parametrize(("method", "cast"), MATCHED)
def test_the_refined_detail_stays(method: str, cast: str) -> None:
    """Detail that the reference doesn't have comes through: as strong as it was, or (adain) as without the cast."""
    reference = clip_of(detail=0.0)
    detailed = clip_of(detail=0.03)
    refined = CASTS[cast](detailed)
    expected = refined if method == "wavelet" else match_colors(detailed, reference, "adain")
    matched = match_colors(refined, reference, method)
    assert gradient_energy(matched) == pytest.approx(gradient_energy(expected), rel=0.02)


@pytest.mark.parametrize("size", [DETAIL_SIZE, 35, NANO_DETAIL_SIZE])
def test_wavelet_leaves_short_patterns_and_replaces_long_ones(size: int) -> None:
    x = torch.arange(1600)
    reference = torch.full((1, 32, 1600, 3), 0.5)
    inner = slice(400, 1200)
    for length, left in [(size / 3, 1.0), (size, 0.5), (size * 6, 0.02)]:
        pattern = 0.2 * torch.cos(2 * math.pi * x / length + 0.3)
        refined = reference + pattern[:, None]
        result = match_colors(refined, reference, "wavelet", Detail(size))[0, 5, inner, 1] - 0.5
        assert float((result @ pattern[inner]) / pattern[inner].square().sum()) == pytest.approx(left, abs=0.01)


@pytest.mark.parametrize("size", [MIN_DETAIL_SIZE - 1, 0, -70, MAX_DETAIL_SIZE + 1, math.inf, math.nan])
def test_a_detail_size_out_of_range_is_named(size: float) -> None:
    clip = clip_of(1, 16, 16)
    for method in METHODS:
        with pytest.raises(ValueError, match=f"detail_size must be 5 to 1000 pixels; got {size:g}"):
            match_colors(clip, clip, method, Detail(size))


def test_wavelet_removes_a_cast_that_differs_from_place_to_place() -> None:
    reference = clip_of()
    refined = reference + 0.08 * torch.linspace(-1, 1, reference.shape[2])[:, None] * torch.tensor([1.0, 0, -1])
    assert colour_error(refined, reference) > 5
    assert colour_error(match_colors(refined, reference, "wavelet"), reference) < 0.5


@pytest.mark.parametrize("method", METHODS)
def test_a_clip_equal_to_its_reference_comes_back(method: str) -> None:
    clip = clip_of()
    matched = match_colors(clip, clip.clone(), method)
    assert (matched - clip).abs().max() <= 1e-6  # float32 rounding; 1/255 would show in a file
    flat = torch.full((2, 17, 33, 3), 0.25)
    assert (match_colors(flat, flat, method) - flat).abs().max() <= 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 17, 2), (1, 16, 16), (2, 33, 47), (5, 23, 100), (3, 8, 271)])
def test_any_size_and_length(method: str, shape: tuple[int, int, int]) -> None:
    make = torch.Generator().manual_seed(sum(shape))
    refined, reference = torch.rand(2, *shape, 3, generator=make)
    copies = refined.clone(), reference.clone()
    matched = match_colors(refined, reference, method)
    assert matched.shape == refined.shape
    assert matched.is_contiguous()
    assert 0 <= float(matched.min()) <= float(matched.max()) <= 1
    assert torch.equal(refined, copies[0])
    assert torch.equal(reference, copies[1])
    assert matched.data_ptr() not in (refined.data_ptr(), reference.data_ptr())


@pytest.mark.parametrize("method", METHODS)
def test_memory_layout_does_not_matter(method: str) -> None:
    reference, refined = clip_of(3), CASTS["darker"](clip_of(3))
    planes = refined.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.allclose(match_colors(planes, reference, method), match_colors(refined, reference, method), atol=1e-6)


def test_values_stay_in_range_when_the_correction_overshoots() -> None:
    refined = torch.rand(2, 40, 40, 3, generator=torch.Generator().manual_seed(0))
    for method in METHODS:
        for level in (0.0, 1.0):
            matched = match_colors(refined, torch.full_like(refined, level), method)
            assert 0 <= float(matched.min()) <= float(matched.max()) <= 1


@pytest.mark.parametrize("side", SIDES)
def test_the_low_band_is_a_symmetric_average(side: int) -> None:
    """Rows sum to one, weights aren't negative, eigenvalues lie in [0, 1]: what the module says about flicker."""
    low_band = LowBand(side, 1)
    units = torch.eye(side)[:, :, None, None].expand(-1, -1, 1, 3)  # one picture for each pixel
    matrix = torch.stack([low_band(unit)[:, 0, 0] for unit in units], 1).double()
    rounding = 1e-6
    assert (matrix.sum(1) - 1).abs().max() < rounding
    assert (matrix - matrix.T).abs().max() < rounding
    assert matrix.min() >= 0
    eigenvalues = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    assert -rounding < eigenvalues.min() <= eigenvalues.max() < 1 + rounding


@pytest.mark.parametrize("detail_size", [5, 9, 40, 41, 70])
@pytest.mark.parametrize("shape", [(40, 56), (1, 1), (3, 90), (131, 2), (17, 18)])
def test_planes_have_the_low_band_of_pictures(shape: tuple[int, int], detail_size: float) -> None:
    """Also where pictures take a shorter way, on a CPU with fine splines."""
    pictures = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    low_band = LowBand(*shape, detail_size=detail_size)
    planes = low_band.of_planes(pictures).permute(0, 2, 3, 1)
    for picture, expected in zip(pictures.permute(0, 2, 3, 1), planes, strict=True):
        assert (low_band(picture) - expected).abs().max() < 1e-6
        given = torch.empty(*shape, 3)
        assert low_band(picture, given) is given
        assert (given - expected).abs().max() < 1e-6


def test_wavelet_gives_each_frame_the_reference_mean() -> None:
    reference = clip_of()
    refined = CASTS["gain and offset"](clip_of(seed=1))
    matched = match_colors(refined, reference, "wavelet")
    assert (matched.mean((1, 2)) - reference.mean((1, 2))).abs().max() < 1e-5


def flicker(clip: Tensor) -> Tensor:
    """Root mean square change of the pixels from frame to frame, [T - 1]."""
    return clip.diff(dim=0).square().mean((1, 2, 3)).sqrt()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["grain", "brightness", "blotches"])
def test_a_steady_reference_gets_no_flicker(method: str, kind: str) -> None:
    """The correction changes less than the refined clip itself, and the result doesn't flicker more than that."""
    reference = clip_of(1).expand(8, -1, -1, -1)
    noise = torch.Generator().manual_seed(3)
    cells = {"grain": (135, 241), "brightness": (1, 1), "blotches": (3, 5)}[kind]
    unrest = torch.randn(8, 3, *cells, generator=noise)
    unrest = torch.nn.functional.interpolate(unrest, (135, 241), mode="bilinear").permute(0, 2, 3, 1)
    refined = (reference + 0.02 * unrest).clamp(0, 1)
    matched = match_colors(refined, reference, method)
    rounding = 1e-5
    assert (flicker(matched - refined) <= flicker(refined) * (1 if method == "wavelet" else 0.1) + rounding).all()
    assert (flicker(matched) <= flicker(refined) * (1 if method == "wavelet" else 1.1) + rounding).all()
    if method == "wavelet" and kind == "brightness":
        assert flicker(matched).max() < 1e-5  # a pumping refiner is steadied


def test_wavelet_removes_the_step_between_two_windows() -> None:
    reference = clip_of(8)
    refined = reference.clone()
    refined[4:] += 0.04
    error = match_colors(refined, reference, "wavelet") - reference
    assert error.abs().max() < 1e-5


def test_adain_does_not_follow_a_single_frame() -> None:
    """A flash in one frame of the refined clip changes every frame alike, by one gain and one offset."""
    reference, refined = clip_of(5), clip_of(5)
    refined[2] = (refined[2] + 0.1).clamp(0, 1)
    matched = match_colors(refined, reference, "adain")
    gain, offset = adain_transform(color_statistics(refined), color_statistics(reference))
    assert (matched - (refined * gain + offset).clamp(0, 1)).abs().max() < 1e-6


def test_long_clips_need_not_be_held_whole() -> None:
    """Wavelet gives the same for any run of frames; adain takes its statistics from a stream of frames."""
    reference, refined = clip_of(6), CASTS["gain and offset"](clip_of(6, seed=1))
    parts = [match_colors(refined[i : i + 2], reference[i : i + 2], "wavelet") for i in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), match_colors(refined, reference, "wavelet"))
    gain, offset = adain_transform(color_statistics(iter(refined)), color_statistics(iter(reference)))
    adain = (refined * gain + offset).clamp(0, 1)
    assert (match_colors(refined, reference, "adain") - adain).abs().max() < 1e-6


class Allocations(TorchDispatchMode):
    """The bytes of every storage that the work under it makes, by address."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((result,)):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.sizes[storage.data_ptr()] = max(storage.nbytes(), self.sizes.get(storage.data_ptr(), 0))
        return result


@pytest.mark.parametrize("method", METHODS)
def test_only_the_result_is_as_big_as_the_clip(method: str) -> None:
    reference, refined = clip_of(12), clip_of(12, seed=1)
    given = {clip.untyped_storage().data_ptr() for clip in (reference, refined)}
    with Allocations() as seen:
        matched = match_colors(refined, reference, method)
    made = {address: size for address, size in seen.sizes.items() if address not in given}
    assert made.pop(matched.untyped_storage().data_ptr()) == matched.nbytes
    assert max(made.values()) <= matched[0].nbytes


def test_statistics_are_those_of_all_pixels() -> None:
    clip = clip_of(5)
    found = color_statistics(clip)
    pixels = clip.double().reshape(-1, 3)
    assert torch.allclose(found.mean, pixels.mean(0), atol=1e-6)
    assert torch.allclose(found.deviation, pixels.std(0, correction=0), atol=1e-6)


def test_adain_does_not_blow_up_a_flat_clip_nor_wipe_one_out() -> None:
    picture = clip_of(2)
    flat = torch.full_like(picture, 0.3)
    assert (match_colors(flat, picture, "adain") - picture.mean((0, 1, 2))).abs().max() < 1e-5
    faint = flat + 0.001 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))
    assert color_statistics(match_colors(faint, picture, "adain")).deviation.max() < 0.0041  # 4 times at most
    kept = color_statistics(match_colors(picture, flat, "adain")).deviation
    assert torch.allclose(kept, color_statistics(picture).deviation / 4, rtol=0.01)


@pytest.mark.parametrize(("method", "steps"), [("wavelet", 3), ("adain", 9)])
def test_progress_is_told_step_by_step(method: str, steps: int) -> None:
    seen = []
    clip = clip_of(3, 16, 16)
    match_colors(clip, clip, method, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, steps) for done in range(1, steps + 1)]


def test_finish_crops_then_matches() -> None:
    prepared = prepare(clip_of(6, 50, 75), TargetSize("keep"))
    refined = CASTS["offset"](prepared.frames).clamp(0, 1)
    untouched = refined.clone()
    for method in METHODS:
        finished = finish(refined, prepared.reference, method)
        assert finished.shape == prepared.reference.shape
        assert torch.equal(finished, match_colors(refined[:6, :50, :75], prepared.reference, method))
        assert torch.equal(refined, untouched)
    assert torch.equal(finish(refined, prepared.reference, "none"), refined[:6, :50, :75])
    assert COLOR_MATCHES == ("none", "wavelet", "adain")  # "none" is in saved workflows


def test_finish_reads_any_kind_of_reference() -> None:
    clip = clip_of(1, 16, 16)
    opaque = torch.cat([clip, torch.ones_like(clip[..., :1])], -1)
    assert torch.equal(finish(clip, opaque, "wavelet"), clip)
    with pytest.raises(ValueError, match="reference must be finite"):
        finish(clip, clip * math.nan, "wavelet")


def test_wrong_calls_are_explained() -> None:
    clip = clip_of(2, 16, 16)
    with pytest.raises(ValueError, match="method must be one of wavelet, adain; got 'hue'"):
        match_colors(clip, clip, "hue")
    with pytest.raises(ValueError, match=r"must have one shape; got \[2, 16, 16, 3\] and \[1, 16, 16, 3\]"):
        match_colors(clip, clip[:1], "adain")
