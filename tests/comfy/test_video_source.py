"""A VIDEO on its way to a file and back: whatever a graph may hold, exact pictures, and sound that can be saved."""

from __future__ import annotations

import logging
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
import torch
from comfy_api.latest import InputImpl, Types
from torch import Tensor

COUNT, HEIGHT, WIDTH = 5, 32, 48


def pictures() -> Tensor:
    """Random ones, [COUNT, HEIGHT, WIDTH, 3] in [0, 1]."""
    return torch.rand((COUNT, HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(0))


def noise(channels: int, samples: int, rate: int) -> dict[str, Any]:
    """An AUDIO."""
    waveform = torch.rand((1, channels, samples), generator=torch.Generator().manual_seed(1)) - 0.5
    return {"waveform": waveform, "sample_rate": rate}


def in_memory(images: Tensor | None = None, audio: dict[str, Any] | None = None, rate: object = 24) -> Any:
    """A VIDEO that has no file."""
    images = pictures() if images is None else images
    parts = Types.VideoComponents(images=images, audio=audio, frame_rate=Fraction(rate))
    return InputImpl.VideoFromComponents(parts)


def recorded(path: Path, codec: str, rate: int = 48000) -> Path:
    """A file with a second of pictures and of stereo sound."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        track = container.add_stream(codec, rate=rate, layout="stereo")
        for _ in range(24):
            picture = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
        for start in range(0, rate, 1000):
            piece = av.AudioFrame.from_ndarray(np.full((2, 1000), 0.1, np.float32), format="fltp", layout="stereo")
            piece.sample_rate, piece.pts = rate, start
            container.mux(track.encode(piece))
        container.mux(track.encode())
    return path


@pytest.fixture(scope="module")
def source(submodule: Callable[[str], ModuleType]) -> ModuleType:
    """The module under test."""
    return submodule("nodes.native.video_source")


@pytest.fixture(scope="module")
def stored(submodule: Callable[[str], ModuleType]) -> Callable[[Path], np.ndarray]:
    """The pictures of a file, [T, H, W, 3] uint8."""
    open_clip = submodule("flashvideo.video_files").open_clip
    return lambda path: torch.stack(list(open_clip(path).frames())).numpy()


@pytest.fixture(scope="module")
def rewritten(submodule: Callable[[str], ModuleType], source: ModuleType) -> Callable[[Path, Path], Path]:
    """A file's pictures and sound in the kind of file that Refine Long Video would give."""
    files = submodule("flashvideo.video_files")

    def rewrite(path: Path, folder: Path) -> Path:
        clip = files.open_clip(path)
        form = files.VideoFormat(clip, HEIGHT, WIDTH)
        target = folder / f"refined{source.sound_suffix(path)}"
        files.write_video(target, form, [files.encode_segment([torch.stack(list(clip.frames()))], form)])
        return target

    return rewrite


@pytest.mark.parametrize(
    ("rate", "exact"),
    [
        (24.0, Fraction(24)),
        (23.976, Fraction(2997, 125)),
        (24000 / 1001, Fraction(24000, 1001)),
        (29.97, Fraction(2997, 100)),
        (30000 / 1001, Fraction(30000, 1001)),
        (60000 / 1001, Fraction(60000, 1001)),
        (12.5, Fraction(25, 2)),
    ],
)
def test_create_videos_rates_are_kept(
    comfy_nodes: dict[str, Any], source: ModuleType, tmp_path: Path, rate: float, exact: Fraction
) -> None:
    video = comfy_nodes["CreateVideo"].execute(pictures(), rate).result[0]
    path, _ = source.source_file(video, tmp_path)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == exact
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("rate", [11025, 48000, 50000, 192000])
def test_sound_of_any_rate_is_kept_and_can_be_saved(
    source: ModuleType,
    stored: Callable[[Path], np.ndarray],
    rewritten: Callable[[Path, Path], Path],
    tmp_path: Path,
    rate: int,
) -> None:
    path, _ = source.source_file(in_memory(audio=noise(2, rate, rate)), tmp_path)
    assert np.array_equal(stored(path), (pictures() * 255).round().byte().numpy())
    saved = tmp_path / "saved.mp4"
    InputImpl.VideoFromFile(str(rewritten(path, tmp_path))).save_to(str(saved))
    with av.open(str(saved)) as container:
        heard = sum(frame.samples for frame in container.decode(audio=0))
        assert container.streams.audio[0].rate == rate
    assert heard == pytest.approx(rate, abs=3 * 1024)  # AAC adds what it needs to begin and to fill its last frame


@pytest.mark.parametrize("shape", [(1, 2, 0), (0, 2, 100), (1, 0, 100)])
def test_empty_sound_is_left_out(source: ModuleType, tmp_path: Path, shape: tuple[int, ...]) -> None:
    video = in_memory(audio={"waveform": torch.zeros(shape), "sample_rate": 44100})
    path, _ = source.source_file(video, tmp_path)
    with av.open(str(path)) as container:
        assert not container.streams.audio


def test_two_rates_of_the_same_sound_are_two_files(source: ModuleType, tmp_path: Path) -> None:
    paths = {source.source_file(in_memory(audio=noise(1, 9000, rate)), tmp_path)[0] for rate in (44100, 48000)}
    assert len(paths) == 2


def test_pixels_beyond_white_stay_white(
    source: ModuleType, stored: Callable[[Path], np.ndarray], tmp_path: Path
) -> None:
    images = pictures() * 1.5 - 0.25
    path, _ = source.source_file(in_memory(images), tmp_path)
    assert np.array_equal(stored(path), (images.clamp(0, 1) * 255).round().byte().numpy())


def test_broken_pixels_are_refused_and_leave_nothing(source: ModuleType, tmp_path: Path) -> None:
    images = pictures()
    images[3, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"video must be finite; frame 3"):
        source.source_file(in_memory(images), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_broken_sound_is_refused(source: ModuleType, tmp_path: Path) -> None:
    audio = {"waveform": torch.full((1, 2, 5000), float("nan")), "sample_rate": 44100}
    with pytest.raises(ValueError, match="the video's sound holds numbers that are not finite"):
        source.source_file(in_memory(audio=audio), tmp_path)


def test_a_failed_write_leaves_nothing(source: ModuleType, tmp_path: Path) -> None:
    """The kind of file counts pixels to 65535."""
    with pytest.raises(ValueError):
        source.source_file(in_memory(torch.zeros(1, 2, 70000, 3)), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("camera.mov", "pcm_s16le"),
        ("camera24.mov", "pcm_s24le"),
        ("old.avi", "libmp3lame"),
        ("phone.mp4", "aac"),
        ("screen.mkv", "libopus"),
        ("film.mkv", "flac"),
    ],
)
def test_what_fits_an_mp4_is_one_that_save_video_copies(
    source: ModuleType, rewritten: Callable[[Path, Path], Path], tmp_path: Path, name: str, codec: str
) -> None:
    path = recorded(tmp_path / name, codec)
    assert source.sound_suffix(path) == ".mp4"
    saved = tmp_path / "saved.mp4"
    InputImpl.VideoFromFile(str(rewritten(path, tmp_path))).save_to(str(saved))
    with av.open(str(path)) as before, av.open(str(saved)) as after:
        assert after.streams.audio[0].codec_context.name == before.streams.audio[0].codec_context.name
        assert sum(frame.samples for frame in after.decode(audio=0)) > 0


def test_sound_that_save_video_cannot_copy_is_told_before_the_work(
    comfy_nodes: dict[str, Any],
    submodule: Callable[[str], ModuleType],
    model: Any,
    text: dict[str, list],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = recorded(tmp_path / "studio.avi", "pcm_s16le")
    vae = submodule("nodes.native.vae").load_vae_native("vae")
    choices = {
        **{"size": "keep", "short_side": 1080, "scale": 4.0, "width": 64, "height": 48, "resample": "bilinear"},
        **{"strength": 675, "steps": 1, "cfg": 1.0, "shift": 2.5, "seed": 5, "window": 9, "overlap": 4},
        "color_match": "none",
    }
    told: list[int] = []
    long_video = submodule("nodes.native.long_video")
    refine_video = long_video.refine_video

    def begin(*args: Any, **kwargs: Any) -> None:
        told.append(sum("compresses it a second time" in line for line in caplog.messages))
        refine_video(*args, **kwargs)

    monkeypatch.setattr(long_video, "refine_video", begin)
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        node = comfy_nodes["FlashVideoRefineLongVideo"]
        video = node.execute(model, vae, **text, video=InputImpl.VideoFromFile(str(path)), **choices).result[0]
    assert told == [1]
    assert Path(video.get_stream_source()).suffix == ".mkv"
    assert video.get_stream_source() in next(line for line in caplog.messages if "Save Video" in line)
    saved = tmp_path / "saved.mp4"
    video.save_to(str(saved), format=Types.VideoContainer.MP4)
    with av.open(str(saved)) as container:
        assert len(container.streams.audio) == 1
