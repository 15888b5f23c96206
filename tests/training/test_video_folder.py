"""A folder of the user's videos and captions as training data."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from small_videos import turn_clockwise

from flashvideo.training.data.folder import UnusablePart, UnusableVideo, VideoFolder, read_clip
from flashvideo.training.errors import TrainingError
from flashvideo.training.scenes.stream import SPLITS


class TestFolder:
    def test_clips_have_size_range_and_caption(self, tmp_path: Path) -> None:
        _write_video(tmp_path / "one.mp4", frames=30)
        (tmp_path / "one.txt").write_text("a grey\n ramp\n", encoding="utf-8")
        folder = VideoFolder(tmp_path, 32, 48, 5, seed=1)
        video, text = folder.sample(0)
        assert video.shape == (3, 5, 32, 48)
        assert -1 <= video.min() <= video.max() <= 1
        assert text == "a grey ramp"
        assert torch.equal(video, VideoFolder(tmp_path, 32, 48, 5, seed=1).sample(0)[0])

    def test_frames_are_those_shown_at_the_wanted_rate(self, tmp_path: Path) -> None:
        # 24 frames a second, each 8 brighter than the last: at 8 a second, steps of 24.
        _write_video(tmp_path / "ramp.mp4", frames=30, rate=24)
        (tmp_path / "ramp.txt").write_text("", encoding="utf-8")
        for index in range(5):
            video, _ = VideoFolder(tmp_path, 32, 48, 5, seed=1).sample(index)
            levels = (video.mean((0, 2, 3)) + 1) * 127.5
            assert torch.allclose(levels.diff(), torch.full((4,), 24.0), atol=3)  # compression

    def test_broken_videos_and_captions_are_left_out_with_a_warning(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        _write_video(tmp_path / "good.mp4", frames=30)
        _write_video(tmp_path / "short.mp4", frames=6)
        _write_video(tmp_path / "badcaption.mp4", frames=30)
        _write_video(tmp_path / "nocaption.mp4", frames=30)
        (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 20)
        whole = (tmp_path / "good.mp4").read_bytes()
        (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
        _write_video(tmp_path / "small.mp4", frames=30, size=(24, 40))
        for name in ("good", "short", "noise", "cut", "small"):
            (tmp_path / f"{name}.txt").write_text("a clip", encoding="utf-8")
        (tmp_path / "badcaption.txt").write_bytes(b"\xff\xfe\xfa caf\xe9")
        with caplog.at_level(logging.WARNING):
            folder = VideoFolder(tmp_path, 32, 48, 5, seed=1)
            first = [folder.sample(index)[0] for index in range(20)]
        captionless = {"badcaption.mp4", "nocaption.mp4"}
        assert {path.name for path in folder.problems} == captionless | {"short.mp4", "noise.mp4", "small.mp4"}
        assert folder.skipped == 5
        for name in ("short.mp4", "badcaption.txt", "nocaption.txt", "noise.mp4", "small.mp4"):
            assert name in caplog.text
        assert "smaller than the clips (40x24 of 48x32)" in caplog.text
        with pytest.raises(TrainingError, match=r"videos for validation .*cut\.mp4: it can't be read"):
            VideoFolder(tmp_path, 32, 48, 5, seed=1, split="validation").sample(0)
        # Found broken early or late, a clip is the same.
        assert torch.equal(first[13], VideoFolder(tmp_path, 32, 48, 5, seed=1).sample(13)[0])

    def test_what_is_judged_by_is_never_learnt_from(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        for number in range(21):
            (tmp_path / "more").mkdir(exist_ok=True)
            _write_video(tmp_path / "more" / f"{number}.mp4", frames=14)
            (tmp_path / "more" / f"{number}.txt").write_text(str(number), encoding="utf-8")

        def seen(split: str) -> set[str]:
            folder = VideoFolder(tmp_path, 32, 48, 5, seed=2, split=split)
            return {folder.sample(index)[1] for index in range(120)}

        held_out = seen("validation")
        assert 1 <= len(held_out) <= 5
        assert seen("train") == {str(number) for number in range(21)} - held_out
        assert not caplog.text
        for number in range(1, 21):
            (tmp_path / "more" / f"{number}.mp4").unlink()
        assert seen("train") == seen("validation") == {"0"}
        assert "learnt from, and judged by" in caplog.text

    def test_pictures_are_clips_of_one_frame(self, tmp_path: Path) -> None:
        for number, ending in enumerate(("png", "jpg", "webp")):
            picture = Image.fromarray(np.full((40, 60, 3), 40 + 60 * number, np.uint8))
            picture.save(tmp_path / f"{ending}.{ending}")
        _write_video(tmp_path / "video.mp4", frames=14)
        for path in list(tmp_path.iterdir()):
            path.with_suffix(".txt").write_text(path.stem, encoding="utf-8")
        seen = {}
        for split in SPLITS[:2]:
            stills = VideoFolder(tmp_path, 32, 48, 1, seed=1, split=split)
            for video, text in map(stills.sample, range(40)):
                assert video.shape == (3, 1, 32, 48)
                seen[text] = round(float((video.mean() + 1) * 127.5))
        levels = [seen[ending] for ending in ("png", "jpg", "webp")]
        assert levels == pytest.approx([40, 100, 160], abs=2)
        assert "video" in seen
        clips = VideoFolder(tmp_path, 32, 48, 5, seed=1)
        assert {clips.sample(index)[1] for index in range(10)} == {"video"}
        assert clips.skipped == 0

    def test_only_pictures_make_no_longer_clips(self, tmp_path: Path) -> None:
        Image.new("RGB", (60, 40)).save(tmp_path / "one.png")
        (tmp_path / "one.txt").write_text("", encoding="utf-8")
        with pytest.raises(TrainingError, match="holds no videos"):
            VideoFolder(tmp_path, 32, 48, 5, seed=1)

    def test_animated_pictures_are_videos(self, tmp_path: Path) -> None:
        frames = [Image.fromarray(np.full((40, 60, 3), 8 * index, np.uint8)) for index in range(30)]
        frames[0].save(
            tmp_path / "ramp.webp", save_all=True, append_images=frames[1:], duration=1000 / 24, lossless=True
        )
        (tmp_path / "ramp.txt").write_text("a ramp", encoding="utf-8")
        for index in range(5):
            video, text = VideoFolder(tmp_path, 32, 48, 5, seed=1).sample(index)
            levels = (video.mean((0, 2, 3)) + 1) * 127.5
            assert text == "a ramp"
            assert torch.allclose(levels.diff(), torch.full((4,), 24.0), atol=8.1)  # milliseconds are whole
        assert len(read_clip(tmp_path / "ramp.webp", 5, 24)) == 5
        with pytest.raises(UnusableVideo, match=r"it is too short: 1\.\d+ s of 5\.\d+ s"):
            read_clip(tmp_path / "ramp.webp", 41, 8)
        (tmp_path / "noise.webp").write_bytes(b"RIFF")
        with pytest.raises(UnusableVideo, match="it can't be read as a picture"):
            read_clip(tmp_path / "noise.webp", 5, 8)

    def test_its_content_is_known_by_a_hash(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            _write_video(tmp_path / f"{name}.mp4", frames=14)
            (tmp_path / f"{name}.txt").write_text("a clip", encoding="utf-8")

        def digest() -> tuple[str, str]:
            return tuple(VideoFolder(tmp_path, 32, 48, 5, seed=1, split=split).digest for split in SPLITS[:2])

        before = digest()
        assert before == digest()
        for change in (
            lambda path: path.with_suffix(".txt").write_text("another clip", encoding="utf-8"),
            lambda path: _write_video(path, frames=15),
        ):
            for name in ("one", "two"):
                change(tmp_path / f"{name}.mp4")
            after = digest()
            assert not set(before) & set(after)
            before = after

    def test_a_telephones_video_is_upright(self, tmp_path: Path) -> None:
        _write_video(tmp_path / "one.mp4", frames=14, size=(32, 96))
        turn_clockwise(tmp_path / "one.mp4")
        (tmp_path / "one.txt").write_text("a clip", encoding="utf-8")
        assert {frame.shape for frame in read_clip(tmp_path / "one.mp4", 5, 12)} == {(96, 32, 3)}
        assert VideoFolder(tmp_path, 96, 32, 5, seed=1).sample(0)[0].shape == (3, 5, 96, 32)

    def test_colours_are_those_of_the_files_own_matrix(self, tmp_path: Path) -> None:
        for matrix in (1, 5):  # BT.709 and BT.601
            with av.open(str(tmp_path / "one.mkv"), "w") as container:
                stream = container.add_stream("ffv1", rate=8)
                stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv444p"
                stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 1
                for _ in range(6):
                    picture = av.VideoFrame.from_ndarray(np.full((32, 48, 3), (200, 40, 90), np.uint8), format="rgb24")
                    picture = picture.reformat(format="yuv444p", src_colorspace=5, dst_colorspace=matrix)
                    container.mux(stream.encode(picture))
                container.mux(stream.encode())
            assert abs(np.mean(read_clip(tmp_path / "one.mkv", 5, 8), (0, 1, 2)) - (200, 40, 90)).max() <= 2

    def test_pictures_that_change_their_size_are_no_clip(self, tmp_path: Path) -> None:
        _write_growing_video(tmp_path / "one.mkv", frames=8, small=3)
        with pytest.raises(UnusablePart, match="change their size"):
            read_clip(tmp_path / "one.mkv", 5, 8)

    def test_a_clip_is_the_same_whatever_was_read_before(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Also where a video is damaged in one place: its other parts go on being used."""
        for number in range(3):
            _write_video(tmp_path / f"{number}.mp4", frames=20)
            _write_growing_video(tmp_path / f"growing{number}.mkv", frames=40, small=20)
        for path in list(tmp_path.iterdir()):
            path.with_suffix(".txt").write_text(path.stem, encoding="utf-8")

        def opened() -> VideoFolder:
            return VideoFolder(tmp_path, 32, 48, 5, seed=1)

        folder = opened()
        clips = [folder.sample(index) for index in range(30)]
        assert "a part of it: its pictures change their size" in caplog.text
        assert folder.skipped == 0
        for index, (video, text) in enumerate(clips):
            again, same_text = opened().sample(index)
            assert text == same_text
            assert torch.equal(again, video)

    def test_sound_that_lasts_longer_takes_nothing_away(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "one.mkv"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("ffv1", rate=8)
            stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv444p"
            sound = container.add_stream("pcm_s16le", rate=8000)
            sound.layout = "mono"
            for index in range(24):
                picture = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 10 * index, np.uint8), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 26000), np.int16), format="s16", layout="mono")
            samples.sample_rate = 8000
            container.mux(sound.encode(samples))
            container.mux(sound.encode())

        def levels(when: float) -> list[int]:
            return [round(float(frame.mean()) / 10) for frame in read_clip(path, 5, 8, when)]

        assert [levels(0), levels(1)] == [[0, 1, 2, 3, 4], [19, 20, 21, 22, 23]]
        monkeypatch.setattr("flashvideo.training.data.folder._length", lambda *_: 3.25)  # of a file that says no more
        assert [levels(0), levels(1)] == [[0, 1, 2, 3, 4], [19, 20, 21, 22, 23]]

    def test_a_growing_folder_never_makes_a_judge_of_what_was_learnt(self, tmp_path: Path) -> None:
        held_out: set[str] = set()
        names = [f"{number}.mp4" for number in range(40)] + ["caf\udce9.mp4"]
        for count, name in enumerate(names, start=1):
            (tmp_path / name).with_suffix(".txt").write_text("a clip", encoding="utf-8")
            (tmp_path / name).touch()
            folder = VideoFolder(tmp_path, 32, 48, 5, seed=1, split="validation")
            now = {path.name for path in folder._videos}
            assert count == 1 or now - held_out <= {name}
            held_out = now
        assert 1 <= len(held_out) <= 9

    def test_nothing_to_train_on_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match="no such folder"):
            VideoFolder(tmp_path / "nowhere", 32, 48, 5, seed=1)
        with pytest.raises(TrainingError, match="holds no videos"):
            VideoFolder(tmp_path, 32, 48, 5, seed=1)
        (tmp_path / "a.mp4").write_bytes(b"no video")
        (tmp_path / "a.txt").write_text("a clip", encoding="utf-8")
        with pytest.raises(TrainingError, match=r"a\.mp4: it can't be read as a video"):
            VideoFolder(tmp_path, 32, 48, 5, seed=1).sample(0)


def _write_video(path: Path, frames: int, rate: int = 24, size: tuple[int, int] = (48, 64)) -> None:
    """Even grey pictures, each 8 levels brighter than the last."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate, bit_rate=2_000_000)
        (stream.height, stream.width), stream.pix_fmt = size, "yuv420p"
        for index in range(frames):
            picture = np.full((*size, 3), 8 + 8 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _write_growing_video(path: Path, frames: int, small: int) -> None:
    """Grey pictures of 48x32, and from frame `small` on of 48x64."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuvj420p"
        other = av.CodecContext.create("mjpeg", "w")
        other.height, other.width, other.pix_fmt, other.time_base = 64, 48, "yuvj420p", Fraction(1, 8)
        for index in range(frames):
            encoder, rows = (stream, 32) if index < small else (other, 64)
            picture = av.VideoFrame.from_ndarray(np.full((rows, 48, 3), 90, np.uint8), format="rgb24")
            picture.pts, picture.time_base = index, Fraction(1, 8)
            for packet in encoder.encode(picture):
                packet.stream = stream
                container.mux(packet)
