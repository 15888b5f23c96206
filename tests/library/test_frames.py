"""Frame preparation: exact sizes, padding that comes off to the pixel, clear words for bad input."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from flashvideo.compare import LAYOUTS, compare
from flashvideo.config import RESAMPLERS
from flashvideo.frames import (
    TargetSize,
    clean,
    enlarge,
    extend_edges,
    finish,
    padded_shape,
    prepare,
    resize,
    to_frames,
    to_video,
)

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
KEEP = TargetSize("keep")


def frames_of(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Random frames [count, height, width, 3] in [0, 1]."""
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def expected_side(side: int, numerator: int, denominator: int) -> int:
    """The even number nearest to side * numerator / denominator; of two, the larger."""
    quotient, rest = divmod(side * numerator, 2 * denominator)
    return 2 * (quotient + (rest >= denominator))


def random_case(seed: int) -> tuple[torch.Tensor, TargetSize, tuple[int, int]]:
    """A clip of random shape and memory layout, a random size rule, and the (height, width) it must give."""
    pick = random.Random(seed)
    long_clip = pick.random() < 0.5
    count = pick.randint(1, 200) if long_clip else pick.randint(1, 3)
    sides = [pick.randint(16, 40), pick.randint(16, 40) if long_clip else pick.randint(16, 2200)]
    pick.shuffle(sides)
    height, width = sides
    clip = frames_of(count, height, width, seed)
    layout = pick.choice(["plain", "planes", "every other frame"])
    if layout == "planes":
        clip = clip.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    elif layout == "every other frame":
        clip = clip.repeat_interleave(2, 0)[::2]
    mode = pick.choice(["short side", "scale", "exact", "keep"])
    short, quarters = pick.randint(16, 48), pick.randint(1, 8)
    exact_height, exact_width = pick.randint(1, 70), pick.randint(1, 70)
    wanted = {
        "short side": tuple(expected_side(side, short, min(sides)) for side in (height, width)),
        "scale": tuple(expected_side(side, quarters, 4) for side in (height, width)),
        "exact": (exact_height, exact_width),
        "keep": (height, width),
    }[mode]
    return clip, TargetSize(mode, short, quarters / 4, exact_width, exact_height), wanted


@pytest.mark.parametrize("seed", range(60))
def test_any_clip_gets_its_exact_size_and_comes_back_to_the_pixel(seed: int) -> None:
    clip, size, (height, width) = random_case(seed)
    untouched = clip.clone()
    prepared = prepare(clip, size, RESAMPLERS[seed % len(RESAMPLERS)])

    assert prepared.reference.shape == (len(clip), height, width, 3)
    count, rows, columns, channels = prepared.frames.shape
    assert (count - 1) % 4 == rows % 16 == columns % 16 == 0
    assert 0 <= count - len(clip) < 4
    assert 0 <= rows - height < 16
    assert 0 <= columns - width < 16
    assert channels == 3
    assert float(prepared.frames.min()) >= 0
    assert float(prepared.frames.max()) <= 1
    assert torch.equal(clip, untouched)
    assert torch.equal(finish(prepared.frames, prepared.reference), prepared.reference)


def test_finish_needs_nothing_but_the_tensors() -> None:
    prepared = prepare(frames_of(6, 20, 33), KEEP)
    reference = prepared.reference.clone()
    refined = 1 - prepared.frames
    assert torch.equal(finish(refined, reference), 1 - reference)


def test_keep_does_not_touch_a_pixel() -> None:
    clip = frames_of(5, 32, 48)
    prepared = prepare(clip, KEEP)
    assert torch.equal(prepared.frames, clip)
    assert prepared.frames.data_ptr() != clip.data_ptr()


def test_padding_repeats_the_last_column_row_and_frame() -> None:
    clip = frames_of(3, 17, 30)
    padded = prepare(clip, KEEP).frames  # [5, 32, 32, 3]
    assert torch.equal(padded[:3, :17, 30:], clip[:, :, -1:].expand(-1, -1, 2, -1))
    assert torch.equal(padded[:3, 17:, :30], clip[:, -1:].expand(-1, 15, -1, -1))
    assert torch.equal(padded[:3, 17:, 30:], clip[:, -1:, -1:].expand(-1, 15, 2, -1))
    assert torch.equal(padded[3:], padded[2:3].expand(2, -1, -1, -1))


@pytest.mark.parametrize(
    ("source", "size", "target"),
    [
        ((256, 480), TargetSize(), (1080, 2026)),
        ((272, 640), TargetSize(), (1080, 2542)),
        ((720, 1280), TargetSize(short_side=192), (192, 342)),
        ((480, 270), TargetSize(), (1920, 1080)),
        ((270, 480), TargetSize(scale=2.5, mode="scale"), (676, 1200)),
        ((5, 3), TargetSize("scale", scale=0.5), (2, 2)),
        ((1, 1), TargetSize("scale", scale=1), (2, 2)),
        ((100, 8), TargetSize("keep"), (100, 8)),
        ((100, 8), TargetSize("exact", width=33, height=1), (1, 33)),
    ],
)
def test_target_sizes(source: tuple[int, int], size: TargetSize, target: tuple[int, int]) -> None:
    assert size.resolve(*source) == target


@pytest.mark.parametrize(
    ("count", "padded"), [(1, 1), (2, 5), (5, 5), (20, 21), (21, 21), (48, 49), (49, 49), (200, 201)]
)
def test_frame_counts_are_padded_to_4n_plus_1(count: int, padded: int) -> None:
    assert padded_shape(count, 1080, 8) == (padded, 1088, 16)


def test_enlarged_stage1_video_equals_the_reference() -> None:
    with safe_open(GOLDEN / "pipeline.safetensors", "pt") as file:
        draft = file.get_tensor("stage1.video")
        pixels = file.get_tensor("stage2.pixels_first5")
    video = to_video(prepare(draft / 255, TargetSize("exact", width=32, height=32)).frames)
    assert (video[:, :, :5] - pixels).abs().max() <= 1e-5  # float32 rounding of the same interpolation


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "area", "nearest-exact"])
@pytest.mark.parametrize(("height", "width"), [(96, 160), (17, 23)])
def test_resizing_does_not_shift(resample: str, height: int, width: int) -> None:
    """A mirrored input gives a mirrored output: pixel centres stay where they are."""
    clip = frames_of(1, 33, 47)
    forth = resize(clip, height, width, resample)
    back = resize(clip.flip(1, 2), height, width, resample).flip(1, 2)
    tolerance = 1e-4  # weights are computed from positions in float32
    if resample == "nearest-exact":  # a centre that falls between two pixels may pick either
        assert ((forth - back).abs() > tolerance).float().mean() < 0.1
    else:
        assert (forth - back).abs().max() < tolerance


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = frames_of(7, 20, 24)
    whole = resize(clip, 50, 60)
    monkeypatch.setattr("flashvideo.frames._CHUNK_BYTES", 2 * 50 * 60 * 3 * 4)
    seen = []
    assert torch.equal(resize(clip, 50, 60, progress=lambda done, total: seen.append((done, total))), whole)
    assert seen == [(2, 7), (4, 7), (6, 7), (7, 7)]


def test_frames_survive_the_way_to_a_video_and_back() -> None:
    clip = frames_of(5, 16, 24)
    video = to_video(clip)
    assert video.shape == (1, 3, 5, 16, 24)
    assert torch.allclose(to_frames(video), clip, atol=1e-7)
    assert to_frames(video.expand(2, -1, -1, -1, -1)).shape == (10, 16, 24, 3)
    assert float(to_frames(video * 3).max()) == 1.0


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((49, 3, 256, 480), "images must be [frames, height, width, 3]; got [49, 3, 256, 480]."),
        ((256, 480, 3), "images must be [frames, height, width, 3]; got [256, 480, 3]."),
        ((5, 16, 16, 1), "images must be [frames, height, width, 3]; got [5, 16, 16, 1]."),
        ((0, 16, 16, 3), "images must hold at least one frame of one pixel; got [0, 16, 16, 3]."),
        ((2, 0, 16, 3), "images must hold at least one frame of one pixel; got [2, 0, 16, 3]."),
    ],
)
def test_wrong_shapes_are_named(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError) as error:
        prepare(torch.zeros(shape), KEEP)
    assert str(error.value) == message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_broken_pixels_are_found(value: float) -> None:
    clip = frames_of(5, 16, 16)
    clip[3, 2, 7, 1] = value
    with pytest.raises(ValueError, match=r"frame 3 \(the first is 0\) has NaN or infinite pixels, 1 of 5 frames"):
        prepare(clip, KEEP)


def test_a_transparent_clip_is_put_on_black_and_keeps_its_alpha() -> None:
    clip = torch.rand(2, 16, 16, 4)
    shown = clip[..., :3] * clip[..., 3:]
    for given, alpha in ((clip, None), (clip[..., :3], clip[..., 3]), (torch.rand(2, 16, 16, 4), clip[..., 3])):
        given = torch.cat([clip[..., :3], given[..., 3:]], dim=3)
        prepared = prepare(given, KEEP, alpha=alpha)
        assert torch.equal(prepared.reference, shown)
        assert torch.equal(prepared.alpha, clip[..., 3])
        assert any("stand on black" in note for note in prepared.notes) == (alpha is None)
    one = prepare(clip[..., :3], KEEP, alpha=clip[:1, ..., 3])
    assert torch.equal(one.reference, clip[..., :3] * clip[:1, ..., 3:])


def test_bytes_may_be_transparent() -> None:
    clip = torch.randint(0, 256, (2, 16, 16, 4), dtype=torch.uint8)
    prepared = prepare(clip, KEEP)
    assert torch.equal(prepared.alpha, clip[..., 3] / 255)
    assert torch.equal(prepared.reference, (clip[..., :3] / 255) * (clip[..., 3:] / 255))


def test_an_alpha_channel_that_hides_nothing_changes_nothing() -> None:
    clip = torch.cat([torch.rand(2, 16, 16, 3), torch.ones(2, 16, 16, 1)], dim=3)
    prepared = prepare(clip, KEEP)
    assert prepared.alpha is None
    assert torch.equal(prepared.reference, clip[..., :3])
    assert not any("alpha" in note for note in prepared.notes)


@pytest.mark.parametrize(
    ("alpha", "words"),
    [
        (torch.rand(2, 8, 16), "alpha must have the size of images, 16x16; got 16x8"),
        (torch.rand(3, 16, 16), "alpha must have 1 frame, or as many as the clip, 2; got 3"),
        (torch.full((2, 16, 16), torch.nan), "alpha holds numbers that are not finite"),
        (torch.rand(2, 3, 16, 16), "alpha must be [frames, height, width]; got [2, 3, 16, 16]"),
    ],
)
def test_alpha_that_doesnt_fit_is_refused(alpha: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        prepare(torch.rand(2, 16, 16, 3), KEEP, alpha=alpha)
    with pytest.raises(ValueError, match="the alpha channel of images must be finite; frame 1"):
        prepare(
            torch.cat(
                [torch.rand(2, 4, 4, 3), torch.tensor([1, torch.nan])[:, None, None, None].expand(2, 4, 4, 1)], 3
            ),
            KEEP,
        )


def test_values_outside_are_clamped_and_said() -> None:
    clip = frames_of(1, 16, 16) * 3 - 1
    prepared = prepare(clip, KEEP)
    assert torch.equal(prepared.reference, clip.clamp(0, 1))
    assert any("clamped" in note for note in prepared.notes)


def test_a_clean_clip_is_not_copied_to_be_checked() -> None:
    clip = frames_of(1, 16, 16)
    cleaned, notes = clean(clip)
    assert cleaned is clip
    assert notes == ()


def test_bytes_and_half_precision_are_read() -> None:
    clip = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    assert torch.equal(prepare(clip, KEEP).frames[:2], clip.float() / 255)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        prepared = prepare(frames_of(2, 16, 16).to(dtype), KEEP)
        assert prepared.frames.dtype == prepared.reference.dtype == torch.float32
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        prepare(torch.zeros(1, 16, 16, 3, dtype=torch.int64), KEEP)


def test_padding_is_reported() -> None:
    (note,) = prepare(frames_of(20, 18, 32), KEEP).notes
    assert "20 frames of 32x18" in note
    assert "padded to 21 frames of 32x32" in note
    (note,) = prepare(frames_of(1, 16, 16), KEEP).notes
    assert note == "1 frame of 16x16 becomes 1 frame of 16x16."


@pytest.mark.parametrize("size", [KEEP, TargetSize("exact", width=33, height=18)])
def test_odd_sides_that_were_asked_for_are_kept_and_reported(size: TargetSize) -> None:
    prepared = prepare(frames_of(1, 18, 33), size)
    assert prepared.reference.shape[1:3] == (18, 33)
    assert "33x18 has an odd side" in prepared.notes[1]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_positive_number_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be a number above 0"):
        TargetSize("scale", scale=scale).resolve(16, 16)


def test_unknown_choices_are_refused() -> None:
    clip = frames_of(1, 16, 16)
    with pytest.raises(ValueError, match="size must be one of short side, scale, exact, keep; got 'half'"):
        prepare(clip, TargetSize("half"))
    with pytest.raises(ValueError, match=r"resample must be one of .*; got 'lanczos'"):
        prepare(clip, KEEP, "lanczos")
    with pytest.raises(ValueError, match="color_match must be one of none, wavelet, adain; got 'hue'"):
        finish(clip, clip, "hue")


def test_an_impossible_size_is_refused_before_the_work() -> None:
    with pytest.raises(ValueError, match="would turn 2200x16 into 148500x1080; each side must be 1 to 16384 pixels"):
        prepare(frames_of(1, 16, 2200), TargetSize())
    with pytest.raises(ValueError, match="would turn 16x16 into 16x0"):
        prepare(frames_of(1, 16, 16), TargetSize("exact", width=16, height=0))


def test_finish_refuses_frames_of_another_clip() -> None:
    reference = prepare(frames_of(6, 20, 33), KEEP).reference
    with pytest.raises(ValueError, match="refined form of the reference, 9 frames of 48x32; got 9 frames of 33x20"):
        finish(frames_of(9, 20, 33), reference)
    assert torch.equal(finish(reference, reference), reference)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 47)])
def test_comparison_shows_both(layout: str, height: int, width: int) -> None:
    before, after = torch.zeros(3, 8, 12, 3), torch.full((3, height, width, 3), 0.5)
    picture = compare(before, after, layout)
    wide = (height, width * 2) if layout == "side by side" else (height, width)
    rows, columns = (height * 2, width) if layout == "stacked" else wide
    assert picture.shape == (3, rows + rows % 2, columns + columns % 2, 3)
    assert torch.equal(picture[:, 0, 0], torch.zeros(3, 3))
    assert torch.equal(picture[:, -1, -1], torch.full((3, 3), 0.5))
    assert (picture[:, :, width // 2] == 1).all() == (layout == "split")


def test_comparison_places_each_pixel_where_it_belongs() -> None:
    before, after = frames_of(2, 16, 20, 1), frames_of(2, 16, 20, 2)
    assert torch.equal(compare(before, after, "side by side"), torch.cat([before, after], 2))
    assert torch.equal(compare(before, after, "stacked"), torch.cat([before, after], 1))
    split = compare(before, after, "split")
    assert torch.equal(split[:, :, :10], before[:, :, :10])
    assert torch.equal(split[:, :, 11:], after[:, :, 11:])


def test_the_shorter_clip_holds_its_last_frame() -> None:
    before, after = frames_of(2, 16, 16, 1), frames_of(5, 16, 16, 2)
    picture = compare(before, after)
    assert len(picture) == 5
    assert torch.equal(picture[4, :, :16], before[1])
    assert torch.equal(compare(after, before)[4, :, 16:], before[1])


def test_comparison_says_which_clip_is_wrong() -> None:
    with pytest.raises(ValueError, match="before must be"):
        compare(torch.zeros(3, 16, 16), frames_of(1, 16, 16))
    with pytest.raises(ValueError, match="layout must be one of"):
        compare(frames_of(1, 16, 16), frames_of(1, 16, 16), "diagonal")


def test_extending_a_full_canvas_changes_nothing() -> None:
    canvas = frames_of(2, 16, 16)
    untouched = canvas.clone()
    extend_edges(canvas, 2, 16, 16)
    assert torch.equal(canvas, untouched)


@pytest.mark.parametrize("resample", RESAMPLERS)
def test_parts_of_a_clip_are_enlarged_as_the_whole_is(resample: str) -> None:
    clip = frames_of(10, 21, 34)
    whole = prepare(clip, TargetSize("exact", width=50, height=30), resample).frames
    parts = [enlarge(clip[:4], 30, 50, 4, resample), enlarge(clip[4:], 30, 50, 9, resample)]
    assert torch.equal(torch.cat(parts), whole)
