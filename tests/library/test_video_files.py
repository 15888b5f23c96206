"""Video files as cameras, recorders and editors write them: colours, times and tracks as they are meant."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from small_videos import SOUND_RATE, add_sound, make_video, ramps, read

from flashvideo.errors import CommandError
from flashvideo.video_files import VideoFormat, check_container, encode_segment, open_clip, write_video
from flashvideo.video_files.times import Clock


def copy(source: Path, target: Path, told: list[str] | None = None, **choices: Any) -> Path:
    """The same pictures in a new file, by the way that refined ones go; `told` gets what was said before the work."""
    clip, told = open_clip(source), [] if told is None else told
    form = VideoFormat(clip, clip.height, clip.width, crf=0, **choices)
    told += [*clip.notes, *form.losses(), *clip.damage, *check_container(target.suffix, form, told.append)]
    write_video(target, form, [encode_segment((frame[None] for frame in clip.frames()), form)])
    return target


def mean_of(path: Path, weights: torch.Tensor) -> float:
    """Mean of the first frame, of channels with these weights."""
    return (next(open_clip(path).frames()).float() @ weights).mean().item()


# Colours


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("pixels", ["yuv444p", "yuv444p10le"])
@pytest.mark.parametrize("matrix", [1, 5])
def test_colours_are_read_by_the_files_own_matrix_and_range(
    matrix: int, pixels: str, full_range: bool, tmp_path: Path
) -> None:
    """The other matrix is off by about 10 of 255, the other range by 9, and what rounds down by 1."""
    source = make_video(tmp_path / "in.mp4", 2, size=(64, 64), matrix=matrix, pixels=pixels, full_range=full_range)
    frame = next(open_clip(source).frames())
    error = (frame if frame.dtype == torch.uint8 else frame * 255).numpy().astype(float) - ramps(0, 64, 64)
    assert np.abs(error).mean() < 0.8
    assert abs(error.mean()) < 0.5


@pytest.mark.parametrize("matrix", [1, 5])
def test_passes_one_after_the_other_darken_nothing(matrix: int, tmp_path: Path) -> None:
    path = make_video(tmp_path / "0.mp4", 2, size=(64, 64), matrix=matrix)
    brightness = torch.tensor([[0.299, 0.587, 0.114], [0.2126, 0.7152, 0.0722]])[int(matrix == 1)]
    before = mean_of(path, brightness)
    for number in range(1, 4):
        path = copy(path, tmp_path / f"{number}.mp4")
    assert abs(mean_of(path, brightness) - before) < 0.3  # 3.3 of 255 where every pass rounds down


# Times


def test_times_that_are_repeated_or_missing_change_nothing_but_themselves() -> None:
    clock = Clock(Fraction(1, 1000), Fraction(0))
    times = [0, 40, 40, 39, None, 500, 540, 3000]
    assert [clock(time, 40) for time in times] == [0, 40, 41, 42, 82, 500, 540, 3000]


def test_times_of_a_joined_recording_go_on() -> None:
    clock = Clock(Fraction(1, 1000), Fraction(7))
    times = [7000, 7040, 8080, 7000, 7040, 9000]
    assert [clock(time, 40) for time in times] == [0, 40, 1080, 1120, 1160, 3120]


def test_a_frame_shown_twice_at_a_time_leaves_the_others_where_they_are(tmp_path: Path) -> None:
    times = [0, 1, 2, 12, 13, 36, 37, 72, 73, 74, 144, 145, 146]
    source = make_video(tmp_path / "in.mkv", len(times), times=times, sound="aac", bf="0")
    repeated = tmp_path / "repeated.mkv"
    with av.open(str(source)) as before, av.open(str(repeated), "w") as after:
        tracks = [after.add_stream_from_template(stream) for stream in before.streams]
        shown = iter([time * 1000 // 24 for time in (*times[:4], times[3], *times[5:])])
        for packet in before.demux():
            if packet.dts is not None:
                if packet.stream.type == "video":
                    packet.pts = packet.dts = next(shown)
                packet.stream = tracks[packet.stream.index]
                after.mux(packet)
    assert read(repeated).times[3] == read(repeated).times[4]  # as it is in the file
    told = read(copy(repeated, tmp_path / "out.mkv")).times
    assert told[:4] == read(repeated).times[:4]
    assert 0 < told[4] - told[3] <= Fraction(1, 1000)
    assert told[5:] == read(repeated).times[5:]


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_a_recorders_clock_that_began_an_hour_ago_begins_with_the_file(ending: str, tmp_path: Path) -> None:
    straight = make_video(tmp_path / "straight.ts", 24, sound="aac")
    late = tmp_path / "late.ts"
    with av.open(str(straight)) as before, av.open(str(late), "w", options={"output_ts_offset": "3600"}) as after:
        tracks = [after.add_stream_from_template(stream) for stream in before.streams]
        for packet in before.demux():
            if packet.dts is not None:
                packet.stream = tracks[packet.stream.index]
                after.mux(packet)
    told = read(late)
    assert told.times[0] > 3600
    result = read(copy(late, tmp_path / f"out{ending}"))
    with av.open(str(tmp_path / f"out{ending}")) as container:
        assert container.duration < 2 * av.time_base
    apart = [each.times[0] - each.sound[0][1] for each in (told, result)]
    assert abs(apart[0] - apart[1]) < Fraction(1, 500)  # Matroska counts milliseconds
    moved = [before - after for before, after in zip(told.times, result.times, strict=True)]
    assert max(moved) - min(moved) < Fraction(1, 500)


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_joined_recordings_keep_all_their_pictures_and_sound(ending: str, tmp_path: Path) -> None:
    one = make_video(tmp_path / "one.ts", 48, sound="aac")
    joined = tmp_path / "joined.ts"
    joined.write_bytes(one.read_bytes() * 2)
    result, single = read(copy(joined, tmp_path / f"out{ending}")), read(one)
    assert len(result.times) == 2 * len(single.times)
    assert len(result.sound) == 2 * len(single.sound)
    assert 3.9 < result.times[-1] - result.times[0] < 4.2
    sound = [time for _, time, _ in result.sound]
    assert 3.8 < sound[-1] - sound[0] < 4.2
    assert sound == sorted(set(sound))


# Tracks


def two_tracks(path: Path) -> Path:
    """A film in two languages."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        tracks = [container.add_stream("aac", rate=SOUND_RATE) for _ in range(2)]
        for track, language in zip(tracks, ("eng", "deu"), strict=True):
            track.metadata["language"] = language
        for index in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(ramps(index, 32, 48), format="rgb24")))
        container.mux(stream.encode())
        for track in tracks:
            add_sound(container, track, 0.5)
    return path


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_every_track_of_sound_keeps_its_language(ending: str, tmp_path: Path) -> None:
    with av.open(str(copy(two_tracks(tmp_path / "in.mp4"), tmp_path / f"out{ending}"))) as container:
        assert [track.metadata["language"] for track in container.streams.audio] == ["eng", "deu"]


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_sound_that_nothing_can_read_is_left_out_and_named(ending: str, tmp_path: Path) -> None:
    """As phones write it: a second track of a kind that FFmpeg doesn't know."""
    data = bytearray(two_tracks(tmp_path / "in.mp4").read_bytes())
    for name, other in ((b"mp4a", b"apac"), (b"esds", b"dapa")):
        at = data.rindex(name)
        data[at : at + 4] = other
    (tmp_path / "in.mp4").write_bytes(data)
    told: list[str] = []
    with av.open(str(copy(tmp_path / "in.mp4", tmp_path / f"out{ending}", told))) as container:
        assert len(container.streams.audio) == 1
    assert told == [f"Left out of the {ending} file: a track of sound of an unknown kind."]


def test_a_title_in_an_old_code_page_is_no_obstacle(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "in.avi"), "w") as container:
        container.metadata["title"] = "M?rz"
        stream = container.add_stream("mpeg4", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for index in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(ramps(index, 32, 48), format="rgb24")))
        container.mux(stream.encode())
    data = (tmp_path / "in.avi").read_bytes()
    assert b"M?rz" in data
    (tmp_path / "in.avi").write_bytes(data.replace(b"M?rz", "März".encode("latin-1")))
    result = copy(tmp_path / "in.avi", tmp_path / "out.mp4")
    assert len(read(result).frames) == 3
    with av.open(str(result)) as container:
        assert container.metadata["title"] == "M\ufffdrz"


def test_containers_open_where_pyav_has_no_option_for_code_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from PyAV 19 on; there the test above runs this way, too."""
    source, real = make_video(tmp_path / "in.mp4", 3), av.open

    def without_option(*args: Any, **options: Any) -> Any:
        if "metadata_errors" in options:
            raise TypeError("open() got an unexpected keyword argument 'metadata_errors'")
        return real(*args, **options)

    monkeypatch.setattr(av, "open", without_option)
    assert open_clip(source).count == 3


def test_sound_that_a_container_refuses_is_refused_before_the_work(tmp_path: Path) -> None:
    source = make_video(tmp_path / "in.mkv", 5, sound="wavpack")
    clip = open_clip(source)
    with pytest.raises(CommandError, match=r"can't hold H\.264 pictures and the sound of in\.mkv as it is \(wavpack\)"):
        check_container(".mp4", VideoFormat(clip, 32, 48))
    assert torch.equal(next(clip.frames()), next(open_clip(source).frames()))
