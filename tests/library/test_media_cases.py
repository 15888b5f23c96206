"""Video files that were refused, spoilt or lost something, each looked at independently: packets, times, flags, pixels.

The files are FFmpeg's test pictures, 96x64 and 0.6 s unless they say otherwise; see tests/data/media.
"""

from __future__ import annotations

import random
import re
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from small_videos import make_video, ramps, read, turn_clockwise

from flashvideo.errors import CommandError
from flashvideo.frames import TargetSize
from flashvideo.refiner.files import is_picture, videos_in
from flashvideo.video_files import (
    CONTAINERS,
    VideoFormat,
    check_container,
    encode_segment,
    open_clip,
    orientation,
    write_video,
)
from flashvideo.video_files.times import in_order, missing_frames

MEDIA = Path(__file__).resolve().parents[1] / "data" / "media"


def copy(source: Path, target: Path, **choices: str) -> list[str]:
    """The same pictures in a new file, by the way that refined ones go; returns what is said before the work."""
    clip, told = open_clip(source), []
    form = VideoFormat(clip, clip.height, clip.width, crf=0, **choices)
    told += [*clip.notes, *form.losses(), *clip.damage, *check_container(target.suffix, form, told.append)]
    write_video(
        target, form, [encode_segment((frame[None] for frame in clip.frames()), form)], CONTAINERS[target.suffix]
    )
    return told


def flags(path: Path) -> list[tuple[str, bool]]:
    """Kind of each track, and whether it is a default one."""
    with av.open(str(path)) as container:
        numbers = [getattr(each.disposition, "value", each.disposition) for each in container.streams]
        return [(each.type, bool(number & 1)) for each, number in zip(container.streams, numbers, strict=True)]


# Pictures


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        ((1, 0, 0, 1), lambda p: p),
        ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
        ((1, 0, 0, -1), lambda p: p[::-1]),
        ((-1, 0, 0, -1), lambda p: p[::-1, ::-1]),
        ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
        ((0, -1, 1, 0), lambda p: np.rot90(p)),
        ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda p: np.rot90(p, 2).swapaxes(0, 1)),
    ],
)
def test_every_orientation_comes_out_upright(matrix: tuple[int, ...], turned: object, tmp_path: Path) -> None:
    """The eight of a display matrix (a, b, c, d) that maps (x, y) to (ax + cy, bx + dy)."""
    path = make_video(tmp_path / "in.mp4", 2)
    stored = next(open_clip(path).frames()).numpy()
    data = bytearray(path.read_bytes())
    a, b, c, d = ((value * 65536).to_bytes(4, "big", signed=True) for value in matrix)
    plain = (65536).to_bytes(4, "big") + bytes(12) + (65536).to_bytes(4, "big") + bytes(12) + bytes([64, 0, 0, 0])
    at = data.index(plain, data.index(b"tkhd"))
    data[at : at + 36] = a + b + bytes(4) + c + d + bytes(12) + bytes([64, 0, 0, 0])
    path.write_bytes(data)
    clip = open_clip(path)
    wanted = turned(stored)
    assert (clip.height, clip.width) == wanted.shape[:2]
    assert np.array_equal(next(clip.frames()).numpy(), wanted)
    copy(path, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert next(container.decode(video=0)).rotation == 0


def test_a_mirrored_video_is_mirrored() -> None:
    with av.open(str(MEDIA / "hflip.mp4")) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    upright = next(open_clip(MEDIA / "hflip.mp4").frames()).numpy()
    assert np.abs(upright[:, ::-1].astype(int) - stored).mean() < 10  # PyAV's own conversion is coarser
    assert np.abs(upright.astype(int) - stored).mean() > 20


def test_turned_pictures_are_upright_where_pyav_reads_no_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses all that comes with a frame for the sake of one thing that it doesn't know."""
    turn_clockwise(source := make_video(tmp_path / "in.mp4", 1))
    with av.open(str(source)) as container:
        frame = next(container.decode(video=0))
    wanted = orientation.orientation_of(frame, "h264")
    monkeypatch.setattr(orientation, "side_data", lambda *_: None)
    assert orientation.orientation_of(frame, "h264") == wanted != orientation.UPRIGHT


def test_what_transparency_hides_stays_hidden(tmp_path: Path) -> None:
    with av.open(str(MEDIA / "qtrle_alpha.mov")) as container:
        stored = next(container.decode(video=0)).reformat(format="rgba").to_ndarray()
    hidden = stored[..., 3] == 0
    assert hidden.any()
    assert stored[hidden][:, :3].max() > 100  # other colours lie there
    assert next(open_clip(MEDIA / "qtrle_alpha.mov").frames()).numpy()[hidden].max() == 0
    assert any("transparency" in text for text in copy(MEDIA / "qtrle_alpha.mov", tmp_path / "out.mp4"))


@pytest.mark.parametrize(
    ("name", "words"),
    [("hdr_pq.mp4", None), ("interlaced_tff.mp4", "interlaced"), ("pause_end.gif", None)],
)
def test_what_gets_lost_is_said_before_the_work(name: str, words: str | None, tmp_path: Path) -> None:
    told = copy(MEDIA / name, tmp_path / "out.mp4")
    if words is None:
        assert told == []
    else:
        assert [text for text in told if re.search(words, text)]


def test_the_default_track_of_pictures_is_refined(tmp_path: Path) -> None:
    source = MEDIA / "two_video_second_default.mkv"
    with av.open(str(source)) as container:
        second = next(container.decode(container.streams.video[1])).to_ndarray(format="rgb24")
    assert np.abs(next(open_clip(source).frames()).numpy().astype(int) - second).mean() < 10
    told = copy(source, tmp_path / "out.mkv")
    assert [text for text in told if "another track of pictures" in text]


def test_a_cover_is_no_video() -> None:
    with pytest.raises(CommandError, match="holds no pictures but a cover"):
        open_clip(MEDIA / "audio_cover_only.mp4")


# Times


def test_an_avi_with_b_frames_keeps_its_rate(tmp_path: Path) -> None:
    copy(MEDIA / "pcm.avi", tmp_path / "out.mp4")
    assert read(tmp_path / "out.mp4").times == [Fraction(index, 25) for index in range(16)]


def test_raw_streams_have_the_times_of_their_rate(tmp_path: Path) -> None:
    source, raw = make_video(tmp_path / "in.mp4", 12, Fraction(25), bf="3"), tmp_path / "raw.h264"
    with av.open(str(source)) as before, av.open(str(raw), "w", format="h264") as after:
        track = after.add_stream_from_template(before.streams.video[0])
        for packet in before.demux(video=0):
            if packet.dts is not None:
                packet.stream = track
                after.mux(packet)
    copy(raw, tmp_path / "out.mp4")
    times = read(tmp_path / "out.mp4").times
    assert {after - before for before, after in pairwise(times)} == {Fraction(1, 25)}
    assert "go unnoticed" in open_clip(raw).notes[0]  # lost frames: nothing in the file tells
    assert not open_clip(source).notes


@pytest.mark.parametrize(
    ("times", "wanted"),
    [
        ([1, 4, 3, 5, 2, 7, 8, 6], [1, 2, 3, 4, 5, 6, 7, 8]),
        ([3, 1, 2, 6, 4, 5], [1, 2, 3, 4, 5, 6]),
        ([0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2, 3]),  # joined
        ([*range(50), *range(5)], [*range(50), *range(5)]),
        ([0, None, 2, 1], [0, None, 1, 2]),
        ([None, None], [None, None]),
        ([7, 7, 8], [7, 7, 8]),
        ([], []),
    ],
)
def test_times_of_decoding_are_sorted_and_joined_ones_are_not(times: list, wanted: list) -> None:
    assert in_order(times) == wanted


def test_gaps_are_found_where_the_rate_is_constant() -> None:
    assert missing_frames([*range(0, 400, 40), *range(520, 1000, 40)]) == [(10, 3)]
    assert missing_frames([0, 10, 50, 60, 200, 210, 500]) == []
    assert missing_frames([0]) == []


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_the_last_frame_stays_as_long_as_it_did(ending: str, tmp_path: Path) -> None:
    copy(MEDIA / "pause_end.gif", tmp_path / f"out{ending}")
    with av.open(str(tmp_path / f"out{ending}")) as container:
        assert container.duration == 2_900_000


# Animated pictures


def test_an_animated_png_is_a_video(tmp_path: Path) -> None:
    assert not is_picture(MEDIA / "anim_apng.png")
    copy(MEDIA / "anim_apng.png", tmp_path / "out.mp4")
    assert read(tmp_path / "out.mp4").times == [Fraction(index, 25) for index in range(16)]


@pytest.mark.parametrize("ending", [".webp", ".tif"])
def test_animated_pictures_keep_their_frames_and_times(ending: str, tmp_path: Path) -> None:
    pages, source = [Image.fromarray(ramps(index, 32, 48)) for index in range(4)], tmp_path / f"in{ending}"
    options = {"duration": [40, 80, 40, 500], "lossless": True} if ending == ".webp" else {}
    pages[0].save(source, save_all=True, append_images=pages[1:], **options)
    assert not is_picture(source)
    for index, frame in enumerate(open_clip(source).frames()):
        assert np.array_equal(frame.numpy(), ramps(index, 32, 48))
    copy(source, tmp_path / "out.mp4")
    steps = [0, 40, 120, 160] if ending == ".webp" else [0, 125, 250, 375]
    assert read(tmp_path / "out.mp4").times == [Fraction(step, 1000) for step in steps]
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.duration == (660_000 if ending == ".webp" else 500_000)


def test_a_folder_gives_every_video_that_works_alone(tmp_path: Path) -> None:
    for name in ("v.wmv", "pause_end.gif", "anim_apng.png", "pcm.avi", "qtrle_alpha.mov"):
        (tmp_path / name).write_bytes((MEDIA / name).read_bytes())
    Image.fromarray(ramps(0, 32, 48)).save(tmp_path / "still.png")
    (tmp_path / "notes.txt").write_text("no video")
    names = [path.name for path in videos_in(tmp_path)]
    assert names == ["anim_apng.png", "pause_end.gif", "pcm.avi", "qtrle_alpha.mov", "v.wmv"]


# Other tracks


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_the_default_track_of_sound_stays_the_default(ending: str, tmp_path: Path) -> None:
    source, target = MEDIA / "two_audio_second_default.mp4", tmp_path / f"out{ending}"
    copy(source, target)
    assert flags(target) == [("video", True), ("audio", False), ("audio", True)]
    with av.open(str(source)) as before, av.open(str(target)) as after:
        names = [[track.metadata.get("language") for track in each.streams.audio] for each in (before, after)]
        assert names[0] == names[1] == ["eng", "jpn"]


def test_subtitles_chapters_and_tags_go_along(tmp_path: Path) -> None:
    source, target = MEDIA / "subs_chapters_meta.mkv", tmp_path / "out.mkv"
    assert copy(source, target) == []
    with av.open(str(source)) as before, av.open(str(target)) as after:
        for name in ("title", "ARTIST", "COMMENT", "LOCATION", "creation_time"):
            assert after.metadata[name] == before.metadata[name]
        chapters = [
            [(each["start"], each["metadata"]["title"]) for each in file.chapters()] for file in (before, after)
        ]
        assert chapters[0] == chapters[1] == [(0, "One"), (300_000_000, "Two")]
        texts = [[bytes(p) for p in file.demux(subtitles=0) if p.size] for file in (before, after)]
        assert texts[0] == texts[1] != []


def test_what_a_container_has_no_room_for_is_named(tmp_path: Path) -> None:
    told = copy(MEDIA / "subs_chapters_meta.mkv", tmp_path / "out.mp4")
    assert [text for text in told if "subtitles (srt)" in text and ".mkv has room" in text]
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert [each["metadata"]["title"] for each in container.chapters()] == ["One", "Two"]
        assert container.metadata["title"] == "My film"
        assert container.metadata["location"].startswith("+35.0")


def test_sound_that_nothing_here_can_hold_is_encoded_anew(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="wmav2.*No container here can") as refusal:
        copy(MEDIA / "v.wmv", tmp_path / "out.mkv")
    assert "--sound aac" in refusal.value.with_hint
    copy(MEDIA / "v.wmv", tmp_path / "aac.mp4", sound="aac")
    with av.open(str(tmp_path / "aac.mp4")) as container, av.open(str(MEDIA / "v.wmv")) as source:
        (track,) = container.streams.audio
        assert track.codec_context.name == "aac"
        lengths = [
            sum(frame.samples / frame.sample_rate for frame in each.decode(audio=0)) for each in (source, container)
        ]
        assert abs(lengths[0] - lengths[1]) < 0.05
    copy(MEDIA / "v.wmv", tmp_path / "none.mp4", sound="none")
    assert flags(tmp_path / "none.mp4") == [("video", True)]


# Sizes


@pytest.mark.parametrize(("choice", "size"), [({"short_side": 1080}, (1080, 1918)), ({"mode": "scale"}, (960, 1704))])
def test_a_size_that_is_not_asked_for_exactly_has_even_sides(choice: dict[str, Any], size: tuple[int, int]) -> None:
    clip = open_clip(MEDIA / "c426x240.mp4")
    assert TargetSize(**choice).resolve(clip.height, clip.width) == size


# Damage


@pytest.mark.parametrize(
    ("name", "count", "lost"), [("corrupt.mp4", 90, 10), ("corrupt.ts", 97, 3), ("truncated.mp4", 47, 53)]
)
def test_what_can_be_decoded_is_refined_and_the_rest_named(name: str, count: int, lost: int, tmp_path: Path) -> None:
    (said,) = open_clip(MEDIA / name).damage
    assert said.startswith(f"{lost} of 100 frames can't be decoded")
    told = copy(MEDIA / name, tmp_path / "out.mp4")
    assert said in told
    times = read(tmp_path / "out.mp4").times
    assert len(times) == count
    assert {(time - times[0]) * 25 % 1 for time in times} == {0}  # the others stay at their own times


def with_damage(path: Path, target: Path, at: float, size: int) -> Path:
    """Random bytes in the middle of a file."""
    data = bytearray(path.read_bytes())
    begin = int(at * len(data))
    data[begin : begin + size] = random.Random(0).randbytes(size)
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("at", [0.3, 0.5, 0.7])
def test_a_damaged_matroska_file_loses_nothing_in_silence(at: float, tmp_path: Path) -> None:
    source = make_video(tmp_path / "in.mkv", 100, size=(64, 96), sound="aac", crf="20", g="25")
    clip = open_clip(with_damage(source, tmp_path / "bad.mkv", at, 300))
    assert clip.count < 100
    (said,) = clip.damage
    assert said.startswith(f"{100 - clip.count} of 100 frames can't be decoded")


def test_a_matroska_file_that_was_cut_off_says_so(tmp_path: Path) -> None:
    source, cut = make_video(tmp_path / "in.mkv", 100, size=(64, 96), sound="aac"), tmp_path / "cut.mkv"
    cut.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    (said,) = open_clip(cut).damage
    assert "s on" in said


def test_damaged_sound_is_named(tmp_path: Path) -> None:
    source = make_video(tmp_path / "in.ts", 100, size=(64, 96), sound="aac", crf="20")
    told = copy(with_damage(source, tmp_path / "bad.ts", 0.4, 12000), tmp_path / "out.mp4")
    assert [text for text in told if "packets of sound (track 1, aac) are damaged" in text]
    assert len(read(tmp_path / "out.mp4").sound) > 100


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".ts", ".mov"])
@pytest.mark.parametrize("times", [None, [0, 1, 2, 30, 31, 90, 91, 95, 140, 141]])
def test_a_file_without_damage_has_none(ending: str, times: list[int] | None, tmp_path: Path) -> None:
    clip = open_clip(make_video(tmp_path / f"in{ending}", 10, sound="aac", times=times))
    assert (clip.count, clip.damage) == (10, ())


def test_an_encrypted_file_says_so(tmp_path: Path) -> None:
    """As a shop's: its tracks are marked, and nothing of them can be decoded."""
    data = bytearray(make_video(tmp_path / "in.mp4", 5).read_bytes())
    at = data.index(b"mdat") + 4
    data[at : at + 400] = random.Random(0).randbytes(400)
    end = data.index(b"moov") - 4
    data[at:end] = random.Random(0).randbytes(end - at)
    (tmp_path / "in.mp4").write_bytes(data + b"\0\0\0\x18freeschm....encv....")
    with pytest.raises(CommandError, match="it is encrypted"):
        open_clip(tmp_path / "in.mp4")
