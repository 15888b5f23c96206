"""Real clips and moving photographs as training data: what samples are, where they come from, and how they move."""

from __future__ import annotations

import hashlib
import itertools
import math
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from small_recipes import CLIPS, SMALL_VAE, VAE, head
from torch import Tensor

from flashvideo.training.config import build, load_toml
from flashvideo.training.data import photographs as photographs_module
from flashvideo.training.data.camera import FASTEST, Motion, follow, random_motion
from flashvideo.training.data.clip_library import ClipLibrary, Sizes
from flashvideo.training.data.decoding import Decoded
from flashvideo.training.data.held_out import split_of
from flashvideo.training.data.latents import ClipSettings, ScenePieces, content_of, layout_of, sample_uncut
from flashvideo.training.data.photographs import MovingPhotographs
from flashvideo.training.data.real_clips import Cut, RealClips
from flashvideo.training.data.sources import Footage, Mixture, Weights
from flashvideo.training.errors import TrainingError
from flashvideo.training.scenes.stream import SceneStream
from flashvideo.training.tasks.vae import CropData, VAESettings

SIZE = 32, 48


def name_of(split: str, start: str, ending: str) -> str:
    """A file name of a split."""
    return next(name for number in range(99) if split_of(name := f"{start}{number}{ending}") == split)


def write_library(folder: Path, clips: dict[str, np.ndarray], captions: dict[str, str] | None = None) -> ClipLibrary:
    """A library of frames [T, H, W, 3] by name."""
    library = ClipLibrary.create(folder, Sizes(384, 1024, 300))
    for name, frames in clips.items():
        digest = hashlib.sha256(name.encode() + frames.tobytes()).hexdigest()
        rate = 15.0 if len(frames) > 1 else 0.0
        library.add(name, digest, Decoded(frames, rate), source="test", licence="MIT")
    library.caption([captions or {}])
    return ClipLibrary.open(folder)


def counted(frames: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Frame t has red 4 t, row y green 3 y, column x blue 2 x: each pixel says where it is from."""
    t, y, x = np.ogrid[:frames, :height, :width]
    return np.stack(np.broadcast_arrays(4 * t, 3 * y, 2 * x), axis=-1).astype(np.uint8)


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A still [1, H, W, 3] of clouds of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(1, 3, height, width)
    for cell in (4, 8, 16, 64):
        noise = torch.randn(1, 3, -(-height // cell), -(-width // cell), generator=generator)
        total += torch.nn.functional.interpolate(noise, (height, width), mode="bicubic")
    levels = (total / total.std() * 45 + 128).clamp(0, 255).byte()
    return levels.permute(0, 2, 3, 1).numpy()


def levels(video: Tensor) -> np.ndarray:
    """[3, T, H, W] in [-1, 1] -> [T, H, W, 3] in levels of 255."""
    return ((video + 1) * 127.5).permute(1, 2, 3, 0).numpy()


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


class TestSources:
    @pytest.fixture
    def real(self, tmp_path: Path) -> Path:
        clips = {name_of(split, "a", ".mp4"): counted(30) for split in ("train", "validation")}
        clips |= {name_of(split, "p", ".png"): texture(200, 300) for split in ("train", "validation")}
        write_library(tmp_path / "real", clips, {name: "a real clip" for name in clips if name.startswith("a")})
        return tmp_path / "real"

    def test_a_config_names_its_source(self, real: Path, tmp_path: Path) -> None:
        path = tmp_path / "x.toml"
        for source, kind in (
            ("", SceneStream),
            ('source = "scenes"\n', SceneStream),
            ('source = "scenes"\nscene = [64, 96]\n', ScenePieces),
            (f'source = "real"\nreal = "{real.as_posix()}"\nshrink = [1.0, 1.5]\nstrides = [1]\n', RealClips),
            (f'source = "photographs"\nreal = "{real.as_posix()}"\nspeeds = [0.1, 0.2]\n', MovingPhotographs),
            (f'source = "mixed"\nreal = "{real.as_posix()}"\nweights = {{ scenes = 2, real = 1 }}\n', Mixture),
        ):
            path.write_text(CLIPS + source, encoding="utf-8")
            settings = build(ClipSettings, load_toml(path), path.name)
            for split in ("train", "validation"):
                opened = settings.open(split, 3)
                assert isinstance(opened, kind)
                video, caption = opened.sample(1)
                assert video.shape == (3, 5, 32, 48)
                assert isinstance(caption, str)

    def test_a_mixture_draws_by_its_weights(self, real: Path) -> None:
        weights = Weights(scenes=2, real=1, photographs=1)
        settings = ClipSettings(32, 48, 5, clips=4, source="mixed", real=str(real), weights=weights)
        mixture = settings.open("train", 3)
        kinds = [type(mixture.of(index)) for index in range(2000)]
        for kind, share in ((SceneStream, 0.5), (RealClips, 0.25), (MovingPhotographs, 0.25)):
            assert kinds.count(kind) / 2000 == pytest.approx(share, abs=0.04)
        again = settings.open("train", 3)
        for index in range(12):
            assert torch.equal(mixture.sample(index)[0], again.sample(index)[0])
            assert torch.equal(mixture.sample(index)[0], mixture.of(index).sample(index)[0])
        without = ClipSettings(32, 48, 5, 4, source="mixed", real=str(real), weights=Weights(1, 1, 0)).open("train", 3)
        assert {type(without.of(index)) for index in range(50)} == {SceneStream, RealClips}

    def test_a_scene_of_a_mixture_is_cut_from_its_whole_and_knows_its_layout(self, real: Path) -> None:
        pieces = ClipSettings(32, 48, 5, 4, source="mixed", real=str(real), scene=(64, 96)).open("train", 3)
        wholes = ClipSettings(32, 48, 5, 4, source="mixed", real=str(real)).open("train", 3)
        seen = set()
        for index in range(12):
            whole, caption, cut = sample_uncut(pieces, index)
            video, same = pieces.sample(index)
            assert torch.equal(cut(whole), video)
            assert caption == same
            seen.add(tuple(whole.shape[-2:]))
            layout = layout_of(wholes, index, 4)
            assert (layout is None) == (not isinstance(wholes.of(index), SceneStream))
        assert seen == {(64, 96), (32, 48)}

    def test_latents_are_made_anew_for_other_files_and_cuts_only(self, real: Path) -> None:
        scenes = ClipSettings(32, 48, 5, clips=4)
        mixed = ClipSettings(32, 48, 5, clips=4, source="mixed", real=str(real))
        assert content_of(scenes.open("train", 1)) == ()
        assert scenes.identity == ClipSettings(32, 48, 5, clips=4, shrink=(1.0, 1.5)).identity
        assert mixed.identity != ClipSettings(32, 48, 5, 4, source="mixed", real=str(real), shrink=(1.0, 1.5)).identity
        before = content_of(mixed.open("train", 1))
        library = ClipLibrary.open(real)
        library.caption([{clip.name: "other words" for clip in library.clips.values()}])
        assert content_of(mixed.open("train", 1)) != before

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"source": "films"}, "source must be one of scenes, real, photographs, mixed; got 'films'"),
            ({"source": "real"}, 'source = "real" needs the folder of fetched clips: add real = "runs/nano/real"'),
            ({"source": "mixed", "real": "x", "weights": (0, 0, 0)}, "weights must be 0 or more"),
            ({"shrink": (0.5, 2.0)}, "shrink must be two numbers of 1 or more"),
            ({"strides": ()}, "strides must be whole numbers of 1 or more"),
            ({"speeds": (0.0, 1.0)}, "speeds must be two numbers above 0"),
            ({"folder": "videos", "source": "real", "real": "x"}, 'source = "real" name different clips'),
        ],
    )
    def test_settings_that_can_not_be_are_refused(self, settings: dict, message: str) -> None:
        with pytest.raises(TrainingError, match=message):
            weights = settings.pop("weights", None)
            more = {"weights": Weights(*weights)} if weights else {}
            ClipSettings(32, 48, 5, clips=4, **settings, **more)

    def test_the_vae_learns_from_all_sources_and_is_judged_by_held_out_ones(self, real: Path, tmp_path: Path) -> None:
        path = tmp_path / "vae.toml"
        clips = f'[clips]\nsource = "mixed"\nreal = "{real.as_posix()}"\n'
        crop = '[[crops]]\nrender = [32, 48]\nsize = [16, 24]\nframes = 5\nclips = 2\ncrops = 2\nsource = "{}"\n'
        judged = '[[validation]]\nname = "real"\nsize = [32, 48]\nframes = 5\nclips = 3\nsource = "real"\n'
        text = head(tmp_path / "run") + VAE + judged + "".join(map(crop.format, ("scenes", "real", "photographs", "")))
        path.write_text(text + clips, encoding="utf-8")
        settings = build(VAESettings, load_toml(path), path.name)
        data = CropData(settings.crops, settings.seed, settings.clips)
        shapes = {tuple(data[index].shape) for index in range(40)}
        assert shapes == {(2, 3, 5, 16, 16), (4, 3, 5, 16, 24)}
        assert torch.equal(data[7], CropData(settings.crops, settings.seed, settings.clips)[7])
        scenes = CropData(settings.crops[:1], settings.seed)
        assert torch.equal(scenes[3], CropData(settings.crops[:1], settings.seed, Footage())[3])

    def test_a_source_without_its_folder_is_told_before_training(self, tmp_path: Path) -> None:
        path = tmp_path / "vae.toml"
        path.write_text(head(tmp_path / "run") + VAE.replace("clips = 2\n[[val", 'clips = 2\nsource = "real"\n[[val'))
        with pytest.raises(TrainingError, match='source = "real" needs the folder'):
            build(VAESettings, load_toml(path), path.name)
        assert SMALL_VAE in VAE
