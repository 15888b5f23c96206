"""Real clips as training data: which pieces samples are, and what is never trained on."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from small_libraries import counted, levels, name_of, write_library

from flashvideo.training.data.clip_library import ClipLibrary
from flashvideo.training.data.held_out import split_of
from flashvideo.training.data.real_clips import Cut, RealClips
from flashvideo.training.errors import TrainingError

SIZE = 32, 48


class TestRealClips:
    @pytest.fixture
    def library(self, tmp_path: Path) -> ClipLibrary:
        names = [name_of("train", "a", ".mp4"), name_of("validation", "b", ".mp4"), "bikes.mp4"]
        clips = {name: counted(60) for name in names} | {name_of("train", "still", ".png"): counted(1)}
        return write_library(tmp_path, clips, {names[0]: "a ramp"})

    def test_a_sample_is_a_piece_in_time_and_space(self, library: ClipLibrary) -> None:
        cut = Cut(shrink=(1.0, 1.0), flip=False)
        source = RealClips(library, *SIZE, 9, seed=1, cut=cut)
        seen = set()
        for index in range(60):
            video, caption = source.sample(index)
            assert video.shape == (3, 9, *SIZE)
            assert caption == "a ramp"
            assert video.is_contiguous()
            pixels = levels(video)
            first, top, left = pixels[0, 0, 0] / (4, 3, 2)
            stride = round((pixels[1, 0, 0, 0] - pixels[0, 0, 0, 0]) / 4)
            seen.add((stride, round(first)))
            t, y, x = np.ogrid[:9, : SIZE[0], : SIZE[1]]
            wanted = np.broadcast_arrays(4 * (first + stride * t), 3 * (top + y), 2 * (left + x))
            assert np.abs(pixels - np.stack(wanted, -1)).max() < 0.01
        assert {stride for stride, _ in seen} == {1, 2}
        starts = [first for _, first in seen]
        assert min(starts) < 5
        assert max(starts) > 40

    def test_samples_are_shrunk_by_one_to_two(self, library: ClipLibrary) -> None:
        source = RealClips(library, *SIZE, 5, seed=2, cut=Cut(flip=False))
        steps = []
        for index in range(80):
            pixels = levels(source.sample(index)[0])
            inner = pixels[:, 4:-4, 4:-4]  # antialiasing changes the border
            steps.append(np.diff(inner[..., 2], axis=2).mean() / 2)
            assert np.diff(inner[..., 1], axis=1).mean() / 3 == pytest.approx(steps[-1], rel=0.03)
        assert 0.99 < min(steps) < 1.1
        assert 1.9 < max(steps) < 2.02
        assert np.std(steps) > 0.2

    def test_half_are_mirrored_but_not_where_words_tell_left_from_right(self, tmp_path: Path) -> None:
        name = name_of("train", "a", ".mp4")
        for caption, wanted in (("a dog runs", {True, False}), ("a dog runs to the Left", {False})):
            library = write_library(tmp_path / caption, {name: counted(20)}, {name: caption})
            source = RealClips(library, *SIZE, 5, seed=3)
            rows = [levels(source.sample(index)[0])[0, 5, :, 2] for index in range(20)]
            mirrored = {bool(np.diff(row).mean() < 0) for row in rows}
            assert mirrored == wanted

    def test_a_sample_depends_on_seed_and_index_only(self, library: ClipLibrary) -> None:
        first, second = (RealClips(library, *SIZE, 9, seed=7) for _ in range(2))
        for index in range(3):
            first.sample(index)
        assert torch.equal(first.sample(11)[0], pickle.loads(pickle.dumps(second)).sample(11)[0])
        assert not torch.equal(first.sample(11)[0], RealClips(library, *SIZE, 9, seed=8).sample(11)[0])
        assert not torch.equal(first.sample(11)[0], first.sample(12)[0])

    def test_what_is_held_out_is_never_trained_on(self, tmp_path: Path) -> None:
        clips = {f"clip{number}.mp4": np.full((5, *SIZE, 3), number, np.uint8) for number in range(40)}
        clips |= {"bikes.mp4": np.full((5, *SIZE, 3), 50, np.uint8), "carphone_pristine.mp4": clips["clip0.mp4"] + 60}
        library = write_library(tmp_path, clips)

        def seen(split: str) -> set[int]:
            source = RealClips(library, *SIZE, 5, seed=1, split=split)
            return {round(float(levels(source.sample(index)[0]).mean())) for index in range(600)}

        held_out = {n for n in range(40) if hashlib.sha256(f"clip{n}.mp4".encode()).hexdigest()[0] in "01"}
        assert 2 <= len(held_out) <= 10
        assert seen("validation") == held_out
        assert seen("train") == set(range(40)) - held_out
        assert seen("test") == {50, 60}

    def test_validation_shows_one_clip_after_the_other(self, tmp_path: Path) -> None:
        names = [name for number in range(80) if split_of(name := f"{number}.mp4") == "validation"]
        library = write_library(tmp_path, {name: np.full((5, *SIZE, 3), i, np.uint8) for i, name in enumerate(names)})
        source = RealClips(library, *SIZE, 5, seed=1, split="validation")
        values = [round(float(levels(source.sample(index)[0]).mean())) for index in range(len(names))]
        assert sorted(values) == list(range(len(names)))

    def test_samples_stay_within_a_scene_where_one_is_long_enough(self, tmp_path: Path) -> None:
        bright = counted(12) // 4 + np.uint8(180)
        name = name_of("train", "a", ".mp4")
        library = write_library(tmp_path, {name: np.concatenate((counted(12) // 8, bright))})
        assert next(iter(library.clips.values())).cuts == (12,)

        def scenes(frames: int, *, across: bool) -> set[int]:
            source = RealClips(library, *SIZE, frames, seed=1, cut=Cut(across_cuts=across))
            green = [levels(source.sample(index)[0])[..., 1].mean((1, 2)) > 128 for index in range(40)]
            return {len(set(each.tolist())) for each in green}

        assert scenes(9, across=False) == {1}
        assert scenes(9, across=True) == {1, 2}
        assert scenes(17, across=False) == {2}  # there is nothing longer

    def test_stills_are_clips_of_one_frame(self, library: ClipLibrary) -> None:
        source = RealClips(library, *SIZE, 1, seed=1)
        assert {clip.frames for clip in source.clips} == {1, 60}
        assert {source.clip(index).frames for index in range(20)} == {1, 60}
        assert all(source.sample(index)[0].shape == (3, 1, *SIZE) for index in range(4))

    def test_what_is_missing_is_told(self, library: ClipLibrary) -> None:
        with pytest.raises(
            TrainingError, match=r"no clip to train on of at least 200x100 pixels and 9 frames; the larg"
        ):
            RealClips(library, 100, 200, 9, seed=1)
        with pytest.raises(TrainingError, match="no clip that is held out of at least 48x32 pixels and 99 frames"):
            RealClips(library, *SIZE, 99, seed=1, split="validation")

    def test_its_content_is_known_by_a_hash(self, tmp_path: Path) -> None:
        name = name_of("train", "a", ".mp4")
        libraries = [
            write_library(tmp_path / "1", {name: counted(20)}, {name: "one"}),
            write_library(tmp_path / "2", {name: counted(20)}, {name: "one"}),
            write_library(tmp_path / "3", {name: counted(20)}, {name: "two"}),
            write_library(tmp_path / "4", {name: counted(21)}, {name: "one"}),
        ]
        digests = [RealClips(library, *SIZE, 5, seed=1).digest for library in libraries]
        assert digests[0] == digests[1]
        assert len(set(digests)) == 3
