"""The file behind the slider in ComfyUI's page: both clips in one video, read back with PyAV and Pillow."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from flashvideo.compare import preview as previews
from flashvideo.compare.preview import Preview, plan_preview, write_preview
from flashvideo.video_files.pixels import BT601, BT709, LIMITED


def level(value: float, frames: int = 1, height: int = 32, width: int = 48) -> torch.Tensor:
    """A grey clip, each frame darker by 10 of 255."""
    steps = value - 10 / 255 * torch.arange(frames)
    return steps.view(-1, 1, 1, 1).expand(frames, height, width, 3).clone()


def written(folder: Path, before: torch.Tensor, after: torch.Tensor, fps: float = 24) -> tuple[Preview, np.ndarray]:
    """The preview of two clips, and the file's frames [T, rows, columns, 3] uint8."""
    preview = plan_preview(before, after, fps)
    target = folder / f"preview{preview.suffix}"
    write_preview(target, before, after, preview)
    assert [path.name for path in folder.iterdir()] == [target.name], "nothing else is left"
    if preview.suffix == ".png":
        return preview, np.asarray(Image.open(target))[None]
    with av.open(str(target)) as container:
        track = container.streams.video[0]
        assert track.average_rate == preview.fps
        frames = list(container.decode(track))
        assert {(frame.colorspace, frame.color_range) for frame in frames} == {(BT709, LIMITED)}
        pictures = [frame.reformat(format="rgb24", src_colorspace=BT709, dst_colorspace=BT601) for frame in frames]
        return preview, np.stack([picture.to_ndarray() for picture in pictures])


def test_every_frame_holds_the_same_moment_of_both_clips(tmp_path: Path) -> None:
    preview, frames = written(tmp_path, level(0.4, 6), level(0.8, 6), 29.97)
    assert (preview.height, preview.width, preview.frames, preview.total) == (32, 48, 6, 6)
    assert preview.fps == Fraction(2997, 100)
    for index, frame in enumerate(frames):
        assert abs(float(frame[:32].mean()) - (102 - 10 * index)) < 1.5
        assert abs(float(frame[preview.offset :].mean()) - (204 - 10 * index)) < 1.5


def test_colours_stay_up_to_the_edges(tmp_path: Path) -> None:
    red, blue = (torch.tensor(colour).expand(3, 32, 48, 3) for colour in ([0.9, 0.1, 0.1], [0.1, 0.2, 0.9]))
    preview, frames = written(tmp_path, red, blue)
    for half, colour in ((frames[:, :32], red), (frames[:, preview.offset :], blue)):
        assert np.abs(half - colour[0, 0, 0].numpy() * 255).max() < 4


def test_one_frame_is_a_picture_without_loss(tmp_path: Path) -> None:
    before, after = torch.rand(1, 20, 31, 3), torch.rand(1, 20, 31, 3)
    preview, frames = written(tmp_path, before, after)
    for half, clip in ((frames[0, :20], before), (frames[0, preview.offset : preview.offset + 20], after)):
        assert np.array_equal(half[:, :31], (clip[0] * 255).round().byte().numpy())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (33, 17), (50, 2)])
def test_any_size_can_be_shown(tmp_path: Path, height: int, width: int) -> None:
    preview, frames = written(tmp_path, level(0.3, 2, 7, 5), level(0.7, 2, height, width))
    assert (preview.height, preview.width) == (height, width)
    assert frames.shape[1:3] == preview.shape
    assert preview.offset >= height + 16 and frames.shape[1] % 16 == 0 and frames.shape[2] % 2 == 0
    assert abs(float(frames[0, :height, :width].mean()) - 0.3 * 255) < 3
    assert abs(float(frames[0, preview.offset : preview.offset + height, :width].mean()) - 0.7 * 255) < 3


def test_the_shorter_clip_holds_its_last_frame(tmp_path: Path) -> None:
    for before, after in ((level(0.5, 2), level(0.9, 5)), (level(0.5, 5), level(0.9, 2))):
        preview, frames = written(tmp_path, before, after)
        assert len(frames) == preview.frames == 5
        for clip, half in ((before, frames[:, :32]), (after, frames[:, preview.offset :])):
            assert abs(float(half[4].mean()) - float(clip[-1].mean()) * 255) < 1.5
        (tmp_path / "preview.mp4").unlink()


@pytest.mark.parametrize(
    ("frames", "height", "width", "shown"),
    [
        (60, 1080, 1920, (60, 1080, 1920)),
        (61, 1080, 1920, (61, 720, 1280)),
        (9, 2160, 3840, (9, 1080, 1920)),
        (9, 3840, 2160, (9, 1920, 1080)),
        (1, 16384, 16, (1, 1920, 2)),
        (1000, 480, 854, (240, 480, 854)),
    ],
)
def test_large_and_long_clips_get_a_small_preview(
    frames: int, height: int, width: int, shown: tuple[int, int, int]
) -> None:
    clip = torch.zeros(1).expand(frames, height, width, 3)  # takes no memory
    preview = plan_preview(clip[:1], clip, 24)
    assert (preview.frames, preview.height, preview.width) == shown
    assert preview.total == frames


def test_the_help_page_says_the_limits() -> None:
    page = (Path(__file__).resolve().parents[2] / "web" / "docs" / "FlashVideoCompare.md").read_text(encoding="utf-8")
    limits = (previews.LONG_SIDE, previews.LONG_SIDE_OF_LONG_CLIPS, previews.LONG_CLIP, previews.MAX_FRAMES)
    said = "at most {} pixels on the long side ({} for more than {} frames) and the first {} frames"
    assert said.format(*limits) in " ".join(page.split())


def test_what_clean_repairs_is_shown_repaired(tmp_path: Path) -> None:
    with_alpha = torch.cat((level(1.5, 2), torch.zeros(2, 32, 48, 1)), 3)
    preview, frames = written(tmp_path, (level(0.5, 2) * 255).byte(), with_alpha.half())
    assert abs(float(frames[0, :32].mean()) - 127) < 1.5
    assert float(frames[0, preview.offset :].mean()) > 253


def test_a_preview_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = level(0.4, 4), level(0.8, 4)
    after[2] = torch.nan
    for clip in (after, after[2:3]):
        preview = plan_preview(before[: len(clip)], clip, 24)
        with pytest.raises(ValueError, match="before|images must be finite"):
            write_preview(tmp_path / f"preview{preview.suffix}", before[: len(clip)], clip, preview)
        assert not list(tmp_path.iterdir())
    monkeypatch.setitem(previews._OPTIONS, "preset", "no such")
    with pytest.raises((av.FFmpegError, ValueError)):
        write_preview(tmp_path / "preview.mp4", before, before, plan_preview(before, before, 24))
    assert not list(tmp_path.iterdir())
