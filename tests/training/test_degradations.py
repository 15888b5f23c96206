"""The degradations: the official code's weak one, and the statistics of each."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flashvideo.degradation import degrade_latent
from flashvideo.training.config import build
from flashvideo.training.data.degradation_sheet import degradation_sheet
from flashvideo.training.data.degradations import (
    JPEG,
    RESAMPLERS,
    Blur,
    LatentDegradation,
    Noise,
    PixelDegradation,
    RandomOrder,
    Resize,
    Sometimes,
    StrongDegradation,
    VideoCompression,
    WeakDegradation,
    add_gaussian_noise,
    add_photon_noise,
    degrade_latents,
    filter_frames,
    gaussian_kernel,
    resize_frames,
    shrink_and_enlarge,
    sinc_kernel,
)
from flashvideo.training.data.video_compression import compress_h264, compress_jpeg, compress_mpeg4
from flashvideo.training.errors import TrainingError
from flashvideo.training.loop.metrics import psnr
from flashvideo.training.scenes.stream import SceneStream

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
LEVEL = 2 / 255  # one of 255 levels in [-1, 1]
TRANSFORMS = [
    WeakDegradation((3.0, 6.0)), Blur(sinc=0.0), Blur(sinc=1.0), Resize(), Noise(poisson=0.0), Noise(poisson=1.0),
    JPEG(), VideoCompression(mpeg4=0.0), VideoCompression(mpeg4=1.0), StrongDegradation(), PixelDegradation(),
]  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def clip() -> Tensor:
    """A grass hill with a dotted ring: [3, 5, 62, 98], sides that no codec likes."""
    return SceneStream("validation", 62, 98, 5, 7).sample(2)[0]


def noise_clip(spread: float = 0.1, size: int = 128) -> Tensor:
    """White noise that no clamp touches: [3, 2, size, size]."""
    return spread * torch.randn(3, 2, size, size, generator=seeded(1))


def energy(video: Tensor) -> Tensor:
    """Mean power spectrum over frames and channels, faded out towards the borders: [H, W]."""
    inner = video[..., 16:-16, 16:-16]
    window = torch.hann_window(inner.shape[-1])
    return torch.fft.fft2(inner * window * window[:, None]).abs().square().mean(dim=(0, 1))


def frequencies(size: int) -> tuple[Tensor, Tensor]:
    """Radians a pixel of `energy`'s rows and columns."""
    axis = 2 * math.pi * torch.fft.fftfreq(size)
    return axis[:, None], axis[None]


# Weak


@pytest.mark.parametrize("index", [0, 1])
def test_weak_degradation_equals_the_official_one(index: int) -> None:
    golden = load_file(GOLDEN / "train_terms.safetensors")
    factor = json.loads((GOLDEN / "train_terms.json").read_text())["factors"][index]
    video = golden["pixel.x"][0].transpose(0, 1)
    degraded = WeakDegradation((factor, factor))(video, seeded())
    # Measured 0: torch's own resizing on both sides.
    assert (degraded - golden[f"pixel.degraded.{index}"][0].transpose(0, 1)).abs().max() <= 1e-5


def test_weak_degradation_of_one_colour_is_that_colour() -> None:
    video = torch.tensor([0.3, -0.7, 1.0])[:, None, None, None].expand(3, 2, 25, 41)
    torch.testing.assert_close(shrink_and_enlarge(video, 5.3), video)


def test_weak_degradation_loses_detail_and_keeps_the_rest() -> None:
    before, after = energy(noise_clip()), energy(shrink_and_enlarge(noise_clip(), 4.0))
    rows, columns = frequencies(len(before))
    radius = (rows**2 + columns**2).sqrt()
    fine, coarse = radius > math.pi / 2, (radius > 0) & (radius < math.pi / 16)
    assert after[fine].sum() / before[fine].sum() < 0.01
    assert after[coarse].sum() / before[coarse].sum() > 0.6


def test_weak_degradation_draws_its_factor_from_the_range(clip: Tensor) -> None:
    scores = [psnr(WeakDegradation((2.0, 8.0))(clip, seeded(seed)), clip) for seed in range(8)]
    least, most = (psnr(shrink_and_enlarge(clip, factor), clip) for factor in (8.0, 2.0))
    assert len(set(scores)) == 8
    assert least - 1 <= min(scores) < max(scores) <= most + 1  # decibels; fractions stretch the clip a little


@pytest.mark.parametrize("factor", [0.5, 63.0])
def test_weak_degradation_refuses_a_factor_that_leaves_nothing(clip: Tensor, factor: float) -> None:
    with pytest.raises(ValueError, match="factor must be from 1 to the shorter side of 62x98"):
        shrink_and_enlarge(clip, factor)


# Blur and resizing


@pytest.mark.parametrize(("along", "across", "angle"), [(1.5, 1.5, 0.0), (2.5, 1.0, 0.0), (2.5, 1.0, 0.7)])
def test_gaussian_blur_has_the_gaussians_transfer_function(along: float, across: float, angle: float) -> None:
    before, after = (
        energy(v) for v in (noise_clip(), filter_frames(noise_clip(), gaussian_kernel(along, across, angle)))
    )
    rows, columns = frequencies(len(before))
    u, v = columns * math.cos(angle) + rows * math.sin(angle), rows * math.cos(angle) - columns * math.sin(angle)
    exponent = (u * along) ** 2 + (v * across) ** 2  # the power is its negative exponential
    for low, high in ((0.0, 0.5), (0.5, 1.5), (1.5, 3.0)):
        band = (exponent > low) & (exponent <= high)
        expected = (before * torch.exp(-exponent))[band].sum() / before[band].sum()
        # 3 % for the kernel's end at 3 sigma and for what leaks over the borders of the part that is measured
        assert float(after[band].sum() / before[band].sum()) == pytest.approx(float(expected), rel=0.03)


def test_sinc_filter_passes_below_its_cutoff_and_stops_above() -> None:
    cutoff = math.pi / 2
    before, after = (energy(v) for v in (noise_clip(), filter_frames(noise_clip(), sinc_kernel(cutoff))))
    rows, columns = frequencies(len(before))
    radius = (rows**2 + columns**2).sqrt()
    low, high = radius < 0.7 * cutoff, radius > 1.3 * cutoff
    assert float(after[low].sum() / before[low].sum()) == pytest.approx(1, abs=0.2)  # 21 pixels ripple
    assert after[high].sum() / before[high].sum() < 0.01


def test_sinc_filter_rings_at_an_edge_and_a_gaussian_does_not() -> None:
    edge = torch.full((3, 1, 32, 64), -0.5)
    edge[..., 32:] = 0.5
    assert filter_frames(edge, sinc_kernel(math.pi / 3)).max() > 0.52
    assert filter_frames(edge, gaussian_kernel(1.5, 1.5)).max() <= 0.5 + 1e-6


def test_kernels_sum_to_one() -> None:
    for kernel in (gaussian_kernel(0.3, 0.3), gaussian_kernel(3, 0.5, 1.0), sinc_kernel(1.2), sinc_kernel(math.pi)):
        assert float(kernel.sum()) == pytest.approx(1)
    with pytest.raises(ValueError, match="above 0 pixels"):
        gaussian_kernel(0.0, 1.0)


@pytest.mark.parametrize("resampler", RESAMPLERS)
def test_resampling_keeps_one_colour_and_the_mean(clip: Tensor, resampler: str) -> None:
    small = resize_frames(clip, 20, 32, resampler)
    assert small.shape == (3, 5, 20, 32)
    assert (small.mean(dim=(1, 2, 3)) - clip.mean(dim=(1, 2, 3))).abs().max() < 2 * LEVEL
    torch.testing.assert_close(
        resize_frames(torch.full((3, 1, 20, 20), 0.25), 7, 31, resampler), torch.full((3, 1, 7, 31), 0.25)
    )
    with pytest.raises(ValueError, match="resampler must be one of"):
        resize_frames(clip, 20, 32, "nearest")


def test_resize_draws_its_scale_from_the_range_and_stops_at_16_pixels(clip: Tensor) -> None:
    shapes = {tuple(Resize((0.1, 1.5))(clip, seeded(seed)).shape[-2:]) for seed in range(40)}
    assert len(shapes) > 20
    assert all(16 <= height <= 93 and 16 <= width <= 147 for height, width in shapes)


# Noise


@pytest.mark.parametrize("sigma", [2.0, 12.0])
def test_gaussian_noise_has_its_sigma(sigma: float) -> None:
    noise = add_gaussian_noise(torch.zeros(3, 4, 64, 64), sigma, seeded())
    assert float(noise.std()) == pytest.approx(sigma * LEVEL, rel=0.02)  # 49152 draws: 0.3 % each
    assert float(noise.mean()) == pytest.approx(0, abs=0.02 * sigma * LEVEL)


@pytest.mark.parametrize("add", [add_gaussian_noise, add_photon_noise])
def test_noise_is_shared_by_colours_if_grey_and_by_frames_if_still(add: Callable[..., Tensor]) -> None:
    video = torch.zeros(3, 4, 48, 48)

    def agreement(noise: Tensor) -> tuple[float, float]:
        colours = torch.corrcoef(noise.flatten(1))[0, 1]
        frames = torch.corrcoef(noise.transpose(0, 1).flatten(1))[0, 1]
        return round(float(colours), 1) + 0.0, round(float(frames), 1) + 0.0

    assert agreement(add(video, 20.0, seeded())) == (0, 0)
    assert agreement(add(video, 20.0, seeded(), grey=True)) == (1, 0)
    assert agreement(add(video, 20.0, seeded(), still=True)) == (0, 1)
    assert agreement(add(video, 20.0, seeded(), grey=True, still=True)) == (1, 1)


@pytest.mark.parametrize("grey", [False, True])
def test_photon_noise_has_a_variance_proportional_to_brightness(grey: bool) -> None:
    photons = 400.0
    for bright in (0.1, 0.4, 0.8):
        video = torch.full((3, 4, 64, 64), 2 * bright - 1)
        noise = (add_photon_noise(video, photons, seeded(), grey=grey) - video) / 2
        assert float(noise.var()) == pytest.approx(bright / photons, rel=0.05)  # 16384 draws at least: 1.1 % each
        assert float(noise.mean()) == pytest.approx(0, abs=1e-3)


def test_photon_noise_leaves_black_alone() -> None:
    black = torch.full((3, 2, 16, 16), -1.0)
    assert torch.equal(add_photon_noise(black, 50.0, seeded()), black)


# Compression


@pytest.mark.parametrize(
    ("compress", "settings"),
    [(compress_h264, (10, 24, 32, 40, 48)), (compress_mpeg4, (1, 4, 10, 20, 31)), (compress_jpeg, (95, 75, 50, 25, 5))],
)
def test_stronger_compression_is_further_from_the_clip(
    clip: Tensor, compress: Callable[[Tensor, int], Tensor], settings: tuple[int, ...]
) -> None:
    scores = [psnr(compress(clip, setting), clip) for setting in settings]
    assert all(better > worse for better, worse in zip(scores, scores[1:], strict=False)), scores
    assert scores[0] - scores[-1] > 5


@pytest.mark.parametrize(
    "compress", [lambda v: compress_h264(v, 18), lambda v: compress_mpeg4(v, 2), lambda v: compress_jpeg(v, 95)]
)
def test_fine_compression_keeps_the_colours_and_the_order_of_frames(compress: Callable[[Tensor], Tensor]) -> None:
    grey = torch.linspace(-0.8, 0.8, 7)[None, :, None, None]
    video = (grey + torch.tensor([0.2, 0.0, -0.15])[:, None, None, None]).expand(3, 7, 33, 47)
    difference = (compress(video) - video).mean(dim=(2, 3))
    assert difference.abs().max() <= 4 * LEVEL  # 8-bit colours of a fixed range, rounded twice


@pytest.mark.parametrize(
    "compress",
    [lambda v: compress_h264(v, 52), lambda v: compress_mpeg4(v, 0), lambda v: compress_jpeg(v, 96)],
)
def test_compression_refuses_settings_that_do_not_exist(clip: Tensor, compress: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="is (0 to 51|1 to 31|1 to 95); got"):
        compress(clip)


def test_video_compression_without_pyav_says_what_to_install(clip: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)  # what Python does for a package that isn't there
    with pytest.raises(TrainingError, match="needs PyAV: `pip install av`"):
        compress_h264(clip, 30)
    assert compress_jpeg(clip, 50).shape == clip.shape


def test_video_of_one_frame_and_few_pixels_is_compressed() -> None:
    video = torch.zeros(3, 1, 16, 16)
    for compressed in (compress_h264(video, 30), compress_mpeg4(video, 8), compress_jpeg(video, 50)):
        assert compressed.shape == video.shape
        assert compressed.abs().max() < 4 * LEVEL


# All of them


@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
def test_transform_keeps_shape_range_and_its_input(clip: Tensor, transform: Callable[..., Tensor]) -> None:
    before = clip.clone()
    degraded = transform(clip, seeded())
    assert isinstance(transform, Resize) or degraded.shape == clip.shape
    assert degraded.dtype == clip.dtype and degraded.device == clip.device
    assert degraded.min() >= -1 and degraded.max() <= 1
    assert torch.equal(clip, before)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
def test_transform_follows_from_its_generator(clip: Tensor, transform: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    first = transform(clip, seeded(3))
    torch.manual_seed(1)
    assert torch.equal(transform(clip, seeded(3)), first)
    assert any(
        other.shape != first.shape or not torch.equal(other, first)
        for other in (transform(clip, seeded(seed)) for seed in (4, 5, 6))
    )


def test_a_still_clip_stays_still_without_noise_and_video_codecs() -> None:
    frame = SceneStream("validation", 64, 96, 1, 7).sample(0)[0]
    strong = StrongDegradation(noise_probability=0.0, compression_probability=0.0, jpeg_probability=1.0)
    degraded = strong(frame.expand(3, 4, 64, 96), seeded())
    assert torch.equal(degraded, degraded[:, :1].expand_as(degraded))


def test_strong_degradation_is_more_than_nothing_and_keeps_the_scene(clip: Tensor) -> None:
    scores = [psnr(StrongDegradation()(clip, seeded(seed)), clip) for seed in range(12)]
    assert min(scores) > 12 and max(scores) < 45, scores
    assert max(scores) - min(scores) > 3  # each draw is another degradation


def test_strong_degradation_without_rounds_is_the_clip(clip: Tensor) -> None:
    torch.testing.assert_close(StrongDegradation(rounds=0)(clip, seeded()), clip)


def test_pixel_degradation_is_strong_as_often_as_asked(clip: Tensor) -> None:
    mixed = PixelDegradation(0.5, WeakDegradation((1.0, 1.0)), StrongDegradation(rounds=0))
    with_marks = replace(mixed, weak=WeakDegradation((20.0, 20.0)))
    small = clip[:, :1]
    weak = sum(psnr(with_marks(small, seeded(seed)), small) < 40 for seed in range(200))
    assert 70 <= weak <= 130  # 4 standard deviations
    assert psnr(replace(with_marks, strong_probability=1.0)(small, seeded()), small) > 40


def test_order_is_drawn_and_everything_is_done_once() -> None:
    def mark(number: int) -> Callable[..., Tensor]:
        return lambda video, generator: torch.cat((video, torch.tensor([number])))

    marks = RandomOrder(tuple(mark(number) for number in range(3)))
    orders = [tuple(marks(torch.tensor([], dtype=torch.int64), seeded(seed)).tolist()) for seed in range(600)]
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert min(orders.count(order) for order in set(orders)) > 60 and len(set(orders)) == 6  # 100 each, 4 deviations


def test_sometimes_happens_as_often_as_asked() -> None:
    once = Sometimes(lambda video, generator: video + 1, 0.3)
    done = sum(float(once(torch.zeros(1), seeded(seed))) for seed in range(1000))
    assert done == pytest.approx(300, abs=60)  # 4 standard deviations


def test_degradations_can_be_set_in_a_config() -> None:
    table = {
        "strong_probability": 1.0,
        "strong": {"rounds": 1, "blur": {"sigma": [1, 2]}, "jpeg": {"quality": [10, 20]}},
    }
    built = build(PixelDegradation, table, "pixel")
    assert built.strong == StrongDegradation(rounds=1, blur=Blur(sigma=(1.0, 2.0)), jpeg=JPEG(quality=(10, 20)))


def test_picture_for_the_documentation_shows_every_degradation() -> None:
    video = SceneStream("validation", 32, 48, 3, 7).sample(2)[0]
    picture = degradation_sheet(video)
    assert picture.width > 4 * 48 and picture.height > 5 * 32


# Latents


def test_latents_are_degraded_each_at_its_own_step() -> None:
    latent, noise = (torch.randn(3, 16, 2, 4, 4, generator=seeded(seed)) for seed in (0, 1))
    degraded = degrade_latents(latent, noise, torch.tensor([600, 675, 750]))
    for i, step in enumerate((600, 675, 750)):
        assert torch.equal(degraded[i], degrade_latent(latent[i], noise[i], step))


def test_latent_degradation_draws_steps_evenly_from_its_range() -> None:
    latent = torch.zeros(20000, 1, 1, 1, 1)
    _, steps = LatentDegradation()(latent, torch.rand(20000, generator=seeded()), latent)
    counts = torch.bincount(steps)
    assert (int(steps.min()), int(steps.max())) == (600, 750)
    assert counts[600:].min() > 80 and counts.max() < 190  # 132 each, 4.5 standard deviations


def test_latent_degradation_draws_weak_noise_more_often_with_a_power() -> None:
    latent = torch.zeros(20000, 1, 1, 1, 1)
    _, steps = LatentDegradation((100, 499), power=2.0)(latent, torch.rand(20000, generator=seeded()), latent)
    quarters = torch.bincount((steps - 100) // 100, minlength=4) / len(steps)
    expected = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).sqrt().diff()
    assert (int(steps.min()), int(steps.max())) == (100, 499)
    torch.testing.assert_close(quarters, expected, rtol=0, atol=0.015)  # 4 standard deviations


def test_latent_degradation_keeps_a_standard_normal_standard() -> None:
    latent, noise = (torch.randn(4, 16, 4, 16, 16, generator=seeded(seed)) for seed in (5, 6))
    degraded, steps = LatentDegradation((650, 650))(latent, torch.tensor([0.0, 0.3, 0.6, 1.0]), noise)
    assert steps.tolist() == [650] * 4
    assert float(degraded.std()) == pytest.approx(1, rel=0.01)
    assert torch.equal(degraded, degrade_latents(latent, noise, steps))


def test_a_video_codec_makes_the_same_of_a_clip_every_time() -> None:
    """For some widths, such as 96, x264 reads what happens to lie in memory unless it is told not to."""
    noise = torch.rand(3, 5, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    video = (0.3 * noise + torch.linspace(-0.5, 0.5, 96)).clamp(-1, 1)
    for compress, quality in ((compress_h264, 30), (compress_mpeg4, 8)):
        first = compress(video, quality)
        used = []
        for number in range(12):
            used.append(torch.full((1000 + 4000 * number,), number))  # so that memory lies otherwise
            assert torch.equal(compress(video, quality), first)
