"""Real clips of the ablations: how they are cut, which of a folder are taken, and what is asked of them."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from small_videos import animation, make_video

from flashvideo.training.ablations.acceptance import BICUBIC, CODED_TRUTH, REFINED
from flashvideo.training.ablations.clips import RealClip, Suite
from flashvideo.training.ablations.document import section
from flashvideo.training.ablations.quality import ONCE, aims, gathered
from flashvideo.training.ablations.results import Row, TableResult
from flashvideo.training.data.clip_library import ClipLibrary, Sizes
from flashvideo.training.data.decoding import Decoded
from flashvideo.training.data.held_out import split_of
from flashvideo.training.data.latents import ClipSettings
from flashvideo.training.errors import TrainingError


def test_a_suite_names_its_clips_and_a_real_one_must_be_a_video(tmp_path: Path) -> None:
    broken = tmp_path / "bikes.mp4"
    broken.write_bytes(b"no video")
    for rate in (8.0, None):
        real = RealClip(broken, 0.5, rate=rate)
        assert Suite(ClipSettings(32, 48, 5, 1), 2, "coded", (real,)).names == ["scene 1", "scene 2", "bikes"]
        with pytest.raises(TrainingError, match=r"bikes\.mp4: it|bikes\.mp4: .*[^.]\.$"):
            real.frames(5, 32, 48)


def test_real_clips_are_cut_frame_by_frame_or_at_a_rate(tmp_path: Path) -> None:
    webp = animation(tmp_path / "one.webp", 12)
    mp4 = make_video(tmp_path / "two.mp4", 12, Fraction(24), (40, 60))
    stored = tmp_path / "three.npy"
    np.save(stored, np.full((12, 40, 60, 3), np.arange(0, 120, 10)[:, None, None, None], dtype=np.uint8))
    for path in (webp, stored):
        for when, first in ((0.0, 0), (1.0, 7), (0.5, 4)):
            cut = RealClip(path, when, rate=None).frames(5, 32, 48)
            assert cut.shape == (5, 32, 48, 3)
            assert (cut.mean(dim=(1, 2, 3)) * 25.5).round().tolist() == [*range(first, first + 5)]
    every, eighth = (RealClip(mp4, 0.0, rate=rate).frames(3, 32, 48) for rate in (None, 8.0))
    blue = [(clip[..., 2].mean(dim=(1, 2)) * 255).round().tolist() for clip in (every, eighth)]
    assert blue == [pytest.approx([40, 45, 50], abs=2), pytest.approx([40, 55, 70], abs=2)]
    with pytest.raises(TrainingError, match=r"one\.webp: it has 12 of 13 frames\."):
        RealClip(webp, rate=None).frames(13, 32, 48)
    with pytest.raises(TrainingError, match=r"one\.webp: 60x40 is smaller than what is measured, 48x64\."):
        RealClip(webp, rate=None).frames(5, 64, 48)


def test_clips_of_a_folder_have_names_of_their_own_and_captions(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "one.txt").write_text("a  red\ncircle", encoding="utf-8")
    for folder in (tmp_path, tmp_path / "more"):
        animation(folder / "one.webp", 2)
    clips = gathered(tmp_path)
    assert [(clip.name, clip.caption) for clip in clips] == [("one", ""), ("one (2)", "a red circle")]
    (tmp_path / "none").mkdir()
    for folder, why in (("none", "holds no clips"), ("missing", "no such folder")):
        with pytest.raises(TrainingError, match=why):
            gathered(tmp_path / folder)


def test_of_a_clip_library_only_held_out_clips_are_judged_on(tmp_path: Path) -> None:
    library = ClipLibrary.create(tmp_path, Sizes(64, 64, 20))
    names = [f"clip-{index}.mp4" for index in range(40)] + ["bikes.mp4"]
    for index, name in enumerate(names):
        frames = np.full((2 + index % 2, 4, 4, 3), index, dtype=np.uint8)
        library.add(name, f"{index:064x}", Decoded(frames, 8.0), source="a", licence="b")
    expected = sorted(Path(name).stem for name in names if split_of(name) in ("validation", "test"))
    assert 1 < len(expected) < 20
    assert [clip.name for clip in gathered(tmp_path)] == expected


def real_table(clips: int = 10, **refined: float) -> TableResult:
    """A measured table of real clips, alike but for `refined` in the refined rows."""
    bicubic = {
        "psnr": 26.0, "gradient_error": 80.0, "flicker": 4.0, "lines": 1.0, "colour_error": 0.5, "colour_shift": 0.1,
        "brisque": 50.0, "piqe": 80.0,
    }  # fmt: skip
    good = {**bicubic, "psnr": 25.8, "gradient_error": 50.0, "flicker": 4.1, "lines": 2.5, "brisque": 30, "piqe": 50}
    rows = {CODED_TRUTH: {**bicubic, "psnr": 28.0}, BICUBIC: bicubic, REFINED: {**good, **refined}, ONCE: good}
    names = [f"clip {index}" for index in range(clips)]
    made = [Row(label, {name: dict(values) for name in names}) for label, values in rows.items()]
    return TableResult("quality", "Real clips", "About.", [], names, [*bicubic], made, [])


def test_what_is_asked_of_real_clips() -> None:
    def failed(table: TableResult) -> list[int]:
        return [index for index, check in enumerate(aims(table)) if not check.passed]

    assert failed(real_table()) == []
    assert failed(real_table(gradient_error=52.1, psnr=24.9)) == [3, 4]
    assert failed(real_table(flicker=4.21, colour_shift=1.1)) == [5, 6]
    assert failed(real_table(colour_error=0.6, brisque=51.0, piqe=math.nan)) == [1, 2, 6]
    lined, soft, rated = real_table(), real_table(), real_table()
    lined.row(REFINED).clips["clip 3"]["lines"] = 3.1  # one clip is enough
    soft.row(CODED_TRUTH).clips["clip 3"]["psnr"] = 22.9
    rated.row(REFINED).clips["clip 3"]["brisque"] = 60.0  # one of ten may be worse
    assert (failed(lined), failed(soft), failed(rated)) == ([7], [0], [])
    rated.row(REFINED).clips["clip 4"]["brisque"] = 60.0
    assert failed(rated) == [1]
    text = section(real_table())
    assert "Means over 10 real clips:" in text
    assert "- **Passed**: VAE's PSNR at least 27 dB" in text
