"""Judges of quality without a truth: what they rate better, and what they are fitted to."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashvideo.training.ablations import no_reference
from flashvideo.training.ablations.judges import Judges
from flashvideo.training.ablations.no_reference import FEWEST_CLIPS, PATCH, NaturalModel, brisque, patch_features, piqe
from flashvideo.training.errors import TrainingError

SIZE = (96, 144)


def textured(seed: int, frames: int = 2) -> Tensor:
    """A clip [T, H, W, 3] of noise at several scales, as photographs have it."""
    draw = torch.Generator().manual_seed(seed)
    height, width = SIZE
    picture = torch.zeros(frames, 1, height, width)
    for scale in (1, 2, 4, 8, 16):
        noise = torch.randn(frames, 1, height // scale, width // scale, generator=draw)
        picture += scale * F.interpolate(noise, SIZE, mode="bicubic", align_corners=False)
    return (0.5 + picture / 60).clamp(0, 1).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()


def blurred(clip: Tensor) -> Tensor:
    return F.avg_pool2d(clip.permute(0, 3, 1, 2), 5, 1, 2, count_include_pad=False).permute(0, 2, 3, 1)


def test_niqe_is_least_for_clips_like_those_it_is_fitted_to() -> None:
    model = NaturalModel.fitted(textured(seed) for seed in range(FEWEST_CLIPS))
    clip = textured(100, frames=4)
    noisy = (clip + 0.1 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    own, soft, rough = (model.distance(each) for each in (clip, blurred(clip), noisy))
    assert own < soft / 2
    assert own < rough / 2
    assert model.covariance.shape == (36, 36)


def test_niqe_is_not_fitted_to_few_clips_and_says_nothing_of_flat_ones() -> None:
    with pytest.raises(ValueError, match=f"at least {FEWEST_CLIPS} clips; got 3"):
        NaturalModel.fitted(textured(seed) for seed in range(3))
    model = NaturalModel.fitted(textured(seed) for seed in range(FEWEST_CLIPS))
    assert math.isnan(model.distance(torch.full((2, *SIZE, 3), 0.4)))
    with pytest.raises(ValueError, match=f"at least {PATCH}x{PATCH} pixels"):
        patch_features(torch.zeros(1, PATCH - 1, 200, 3))


def test_the_shape_of_a_distribution_is_found() -> None:
    """2 for a Gaussian, 1 for a Laplacian; an asymmetric one has a spread and a share of its own on each side."""
    draw = torch.Generator().manual_seed(0)
    gaussian = torch.randn(1, 400, 400, generator=draw, dtype=torch.float64)
    laplacian = torch.empty_like(gaussian).exponential_(generator=draw) * gaussian.sign()
    for values, shape in ((gaussian, 2), (laplacian, 1)):
        assert float(no_reference._features(values)[0, 0]) == pytest.approx(shape, rel=0.03)
    right = torch.rand(1, 160000, generator=draw, dtype=torch.float64) < 2 / 3
    amounts = gaussian.flatten(1).abs()
    found = no_reference._asymmetric(torch.where(right, 2 * amounts, -amounts))
    mean = math.sqrt(2 / math.pi) * (2 * 2 / 3 - 1 / 3)
    assert [float(each) for each in found] == pytest.approx([2, mean, 1, 2], rel=0.03)


def test_only_the_sharpest_patches_are_fitted() -> None:
    clip = textured(0, frames=1)
    clip[:, :, : SIZE[1] // 2] = 0.5 + (clip[:, :, : SIZE[1] // 2] - 0.5) * 0.01
    assert len(patch_features(clip)) == 6
    assert 1 <= len(patch_features(clip, sharpest=0.75)) <= 4


@pytest.mark.parametrize("judge", [brisque, piqe])
def test_real_texture_is_rated_better_than_the_same_blurred(judge: object) -> None:
    if no_reference.missing_packages():
        pytest.skip("brisque and pypiqe are not installed (scripts/requirements/evidence.txt)")
    color = pytest.importorskip("skimage.data")
    picture = torch.from_numpy(color.astronaut()[:192, 160:352].copy()).float()[None] / 255
    assert judge(picture) + 10 < judge(blurred(blurred(picture)))


class FailsWithThisNumPy:
    """What brisque 0.2.0 does with NumPy 2.4: an array of one element is no number any more."""

    def __init__(self, url: bool) -> None:
        pass

    def score(self, picture: object) -> float:
        raise TypeError("only 0-dimensional arrays can be converted to Python scalars")


def test_without_its_package_a_judge_is_left_out_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    no_reference._works.cache_clear()
    no_reference._brisque.cache_clear()
    for name in ("brisque", "pypiqe"):
        monkeypatch.setitem(sys.modules, name, None)  # Python's own way to say that it isn't there
    try:
        assert no_reference.missing_packages() == ["brisque", "piqe"]
        values = Judges()(textured(0), (2, *SIZE), real=True)
        assert all(math.isnan(value) for value in values.values())
        with pytest.raises(TrainingError, match=r"evidence\.txt"):
            brisque(textured(0))
        monkeypatch.setitem(sys.modules, "brisque", SimpleNamespace(BRISQUE=FailsWithThisNumPy))
        no_reference._works.cache_clear()
        assert no_reference.missing_packages() == ["brisque", "piqe"]
    finally:
        no_reference._brisque.cache_clear()
        no_reference._works.cache_clear()


def test_drawn_scenes_are_judged_by_niqe_and_its_model_is_kept(tmp_path: Path) -> None:
    size = (1, 2 * PATCH, 2 * PATCH)
    noise = torch.rand(1, *size[1:], 3, generator=torch.Generator().manual_seed(0))
    value = Judges(tmp_path)(noise, size, real=False)["niqe"]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert value > 0
    assert len(kept) == 1
    assert Judges(tmp_path)(noise, size, real=False)["niqe"] == pytest.approx(value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == kept
