"""Moving photographs as training data: they move as their motion says, and depend on seed and index only."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from small_libraries import counted, levels, name_of, texture, write_library

from flashvideo.training.data import photographs as photographs_module
from flashvideo.training.data.camera import FASTEST, Motion, follow, random_motion
from flashvideo.training.data.clip_library import ClipLibrary
from flashvideo.training.data.photographs import MovingPhotographs
from flashvideo.training.errors import TrainingError


def shift(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """By how many pixels (y, x) what [H, W] `first` shows has moved in `second`: phase correlation."""
    window = np.outer(np.hanning(first.shape[0]), np.hanning(first.shape[1]))
    spectra = [np.fft.fft2((picture - picture.mean()) * window) for picture in (first, second)]
    cross = spectra[1] * spectra[0].conj()
    peaks = np.fft.ifft2(cross / (np.abs(cross) + 1e-3 * np.abs(cross).max())).real
    place = np.unravel_index(peaks.argmax(), peaks.shape)
    found = []
    for axis, side in enumerate(peaks.shape):
        line = np.roll(np.take(peaks, place[1 - axis], axis=1 - axis), 1 - place[axis])
        before, at, after = line[:3]
        finer = place[axis] + 0.5 * (before - after) / (before - 2 * at + after)
        found.append((finer + side / 2) % side - side / 2)
    return np.array(found)


def motion(pan: float = 0.0, zoom: float = 0.0, turn: float = 0.0, **more: float) -> Motion:
    values = {"direction": 0.6, "bend": 0.0, "swell": 0.0, **more}
    return Motion(pan, zoom, turn, **values)


class TestPhotographs:
    SIDE, FRAMES, RATE = 128, 9, 8.0

    @pytest.fixture(scope="class")
    def library(self, tmp_path_factory: pytest.TempPathFactory) -> ClipLibrary:
        return write_library(
            tmp_path_factory.mktemp("photographs"),
            {
                name_of("train", "a", ".png"): texture(700, 900),
                name_of("train", "b", ".png"): texture(700, 900, seed=1),
                name_of("validation", "c", ".png"): texture(700, 900, seed=2),
                name_of("train", "clip", ".mp4"): counted(20, 300, 300),
            },
        )

    def moving(
        self, library: ClipLibrary, monkeypatch: pytest.MonkeyPatch, fixed: Motion, layers: tuple[int, ...] = (1, 0, 0)
    ) -> MovingPhotographs:
        """Photographs that all move in one way."""
        monkeypatch.setattr(photographs_module, "random_motion", lambda *_: fixed)
        monkeypatch.setattr(photographs_module, "_LAYERS", layers)
        return MovingPhotographs(library, self.SIDE, self.SIDE, self.FRAMES, seed=4)

    @pytest.mark.parametrize("speed", [0.1, 0.3, 0.8])
    def test_pans_have_their_speed_and_direction(
        self, speed: float, library: ClipLibrary, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = self.moving(library, monkeypatch, motion(pan=speed))
        for index in range(3):
            green = levels(source.sample(index)[0])[..., 1]
            steps = np.array([shift(*pair) for pair in zip(green, green[1:], strict=False)])
            pace = np.hypot(*steps.T) / self.SIDE * self.RATE  # picture heights a second
            assert pace.mean() == pytest.approx(speed, rel=0.1)
            assert pace.max() < 1.1 * FASTEST * speed
            # The camera goes one way, what it sees the other.
            along = steps.mean(0) / np.linalg.norm(steps.mean(0))
            assert along == pytest.approx([-math.sin(0.6), -math.cos(0.6)], abs=0.1)

    @pytest.mark.parametrize(("zoom", "turn"), [(0.15, 0.0), (-0.15, 0.0), (0.0, 0.2), (0.0, -0.2)])
    def test_zooms_and_turns_have_their_speed_at_the_upper_and_lower_edge(
        self, zoom: float, turn: float, library: ClipLibrary, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = self.moving(library, monkeypatch, motion(zoom=zoom, turn=turn))
        green = levels(source.sample(1)[0])[..., 1]
        band, middle = 48, slice(40, 88)
        found = []
        for part in (slice(0, band), slice(self.SIDE - band, self.SIDE)):
            steps = [shift(a[part, middle], b[part, middle]) for a, b in zip(green, green[1:], strict=False)]
            found.append(np.mean(steps, axis=0) / self.SIDE * self.RATE)
        # The bands' middles are nearer to the picture's than the edges are.
        share = 1 - band / self.SIDE
        wanted = np.array([[zoom, -turn], [-zoom, turn]]) * share  # y, x of the upper and the lower band
        assert np.array(found) == pytest.approx(wanted, abs=0.03)

    def test_speeds_of_all_kinds_are_within_the_bounds(self, library: ClipLibrary) -> None:
        kinds = set()
        for seed in range(300):
            draw = random.Random(seed)
            speed = math.exp(draw.uniform(math.log(0.05), 0))
            drawn = random_motion(draw, speed, seconds=2.1)
            parts = drawn.pan, abs(drawn.zoom), abs(drawn.turn)
            kinds.add(tuple(part > 0 for part in parts))
            assert math.hypot(*parts) <= speed + 1e-9
            if drawn.pan:
                assert drawn.pan >= 0.05 * 0.1
            path = follow(drawn, torch.arange(17) / 8, 1 / 8)
            assert path.zoom.min() + 1e-5 >= 1
            assert path.zoom.max() <= 3.01
            assert (path.angle.max() - path.angle.min()) <= math.radians(121)
        assert len(kinds) == 4

    def test_a_shutter_leaves_streaks_of_its_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        picture = np.zeros((1, 600, 900, 3), np.uint8)
        picture[:, 8::40, 8::40] = 255
        library = write_library(tmp_path, {name_of("train", "a", ".png"): picture})
        monkeypatch.setattr(photographs_module, "_MOST_SHRINK", 1.0)
        monkeypatch.setattr(photographs_module, "SHUTTER", (0.5, 0.5))
        speed = 0.9
        source = self.moving(library, monkeypatch, motion(pan=speed, direction=0.0, swell=math.pi / 2))
        frame = levels(source.sample(0)[0])[4, :, :, 1] / 255
        light = frame**2
        row = light.sum(1)[20:-20].argmax() + 20
        line = light[row, 10:-10]
        lit = (line > 0.3 * line.max()).mean()  # the streaks' share of 40 pixels
        # cos has its mean at a quarter: there the pace is the mean one.
        wanted = speed / self.RATE * 0.5 * self.SIDE
        assert lit * 40 == pytest.approx(wanted, abs=2.0)
        assert light.sum(1)[row - 4 : row + 5].sum() == pytest.approx(light.sum(1)[row - 1 : row + 2].sum(), rel=0.05)

    def test_layers_move_at_different_speeds(self, library: ClipLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(photographs_module, "_NEARNESS", (0.3, 0.3))
        monkeypatch.setattr(photographs_module, "_COVER", (0.45, 0.45))
        source = self.moving(library, monkeypatch, motion(pan=0.25, direction=0.0), layers=(0, 1, 0))
        paces = []
        for index in range(8):
            green = levels(source.sample(index)[0])[..., 1]
            for y, x in itertools.product(range(0, self.SIDE - 47, 40), repeat=2):
                pieces = green[3:6, y : y + 48, x : x + 48]
                steps = np.array([shift(*pair) for pair in zip(pieces, pieces[1:], strict=False)])
                if abs(steps[0] - steps[1]).max() < 1:  # else an outline crosses
                    paces.append(-steps[:, 1].mean() / self.SIDE * self.RATE)
        far, between, near = np.histogram(paces, bins=[0.05, 0.12, 0.18, 0.35])[0]
        assert min(far, near) >= 8
        assert far + near > 0.75 * len(paces)
        assert between < 0.1 * len(paces)

    def test_a_sample_depends_on_seed_and_index_only(self, library: ClipLibrary) -> None:
        first, second = (MovingPhotographs(library, 64, 96, 5, seed=7) for _ in range(2))
        for index in range(3):
            first.sample(index)
        again = second.sample(5)[0]
        assert torch.equal(first.sample(5)[0], again)
        assert not torch.equal(first.sample(6)[0], again)
        assert again.shape == (3, 5, 64, 96)
        assert again.dtype == torch.float32
        assert -1 <= again.min() < again.max() <= 1

    def test_a_still_camera_shows_the_photograph(self, library: ClipLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(photographs_module, "_MOST_SHRINK", 1.0)
        video = levels(self.moving(library, monkeypatch, motion()).sample(0)[0])
        assert np.ptp(video, axis=0).max() < 0.01
        pictures = [library.frames(clip)[0] for clip in library.of_split("train") if clip.frames == 1]
        assert any(_contains(picture[..., 1], video[0, 8:-8, 8:-8, 1]) for picture in pictures)

    def test_splits_share_no_photograph(self, library: ClipLibrary) -> None:
        train, held_out = (MovingPhotographs(library, 64, 64, 5, seed=1, split=s) for s in ("train", "validation"))
        assert not {clip.name for clip in train.stills} & {clip.name for clip in held_out.stills}
        assert len(train.stills) == 2
        assert len(held_out.stills) == 1
        with pytest.raises(TrainingError, match="holds no photograph that is held out of at least 2000x2000 pixels"):
            MovingPhotographs(library, 2000, 2000, 5, seed=1, split="validation")


def _contains(picture: np.ndarray, part: np.ndarray) -> bool:
    """Whether a picture [H, W] has, somewhere, a part that looks like another one [h, w]."""
    size = [a + b for a, b in zip(picture.shape, part.shape, strict=True)]
    centred = part - part.mean()
    spectrum = np.fft.rfft2(picture.astype(float) - picture.mean(), size)
    found = np.fft.irfft2(spectrum * np.fft.rfft2(centred, size).conj(), size)
    y, x = np.unravel_index(found.argmax(), found.shape)
    there = picture[y : y + part.shape[0], x : x + part.shape[1]].astype(float)
    return there.shape == part.shape and float(np.sqrt(np.square(there - part).mean())) < 6
