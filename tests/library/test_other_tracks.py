"""What goes along with refined pictures: covers, attached files, and sound to its end and not beyond it."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import pytest
from PIL import Image
from small_videos import make_video, read

from flashvideo.video_files import CONTAINERS, VideoFormat, check_container, encode_segment, open_clip, write_video

FONT = b"a font" * 50
ATTACHED = 0x400  # FFmpeg's flag of a cover


def copy(source: Path, target: Path) -> list[str]:
    """The same pictures in a new file, by the way that refined ones go; returns what is said before the work."""
    clip, told = open_clip(source), []
    form = VideoFormat(clip, clip.height, clip.width, crf=0)
    check_container(target.suffix, form, told.append)
    segments = [encode_segment((frame[None] for frame in clip.frames()), form)]
    write_video(target, form, segments, CONTAINERS[target.suffix])
    return told


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 60)).save(file, kind)
    return file.getvalue()


def with_attachments(path: Path, kind: str) -> tuple[Path, bytes]:
    """A Matroska file with a font and a cover."""
    cover, ending = picture(kind), {"JPEG": "jpg", "PNG": "png"}[kind]
    plain = make_video(path.with_name("plain.mkv"), 6, sound="aac", bf="0")
    with av.open(str(plain)) as before, av.open(str(path), "w") as after:
        tracks = [after.add_stream_from_template(stream) for stream in before.streams]
        after.add_attachment("letters.ttf", "application/x-truetype-font", FONT)
        after.add_attachment(f"cover.{ending}", f"image/{kind.lower()}", cover)
        for packet in before.demux():
            if packet.dts is not None:
                packet.stream = tracks[packet.stream.index]
                after.mux(packet)
    return path, cover


def covers(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        tracks = [
            each
            for each in container.streams.video
            if int(getattr(each.disposition, "value", each.disposition)) & ATTACHED
        ]
        return [bytes(packet) for packet in container.demux(tracks) if packet.size] if tracks else []


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_covers_and_attached_files_go_along_where_there_is_room(kind: str, tmp_path: Path) -> None:
    source, cover = with_attachments(tmp_path / "in.mkv", kind)
    assert covers(source) == [cover]
    for ending in (".mkv", ".mp4", ".mov"):
        told, target = copy(source, tmp_path / f"out{ending}"), tmp_path / f"out{ending}"
        assert covers(target) == ([] if ending == ".mov" else [cover])
        assert len(read(target).frames) == 6
        assert len(read(target).sound) == len(read(source).sound)
        with av.open(str(target)) as container:
            files = [each.data for each in container.streams if each.type == "attachment"]
        assert files == ([FONT] if ending == ".mkv" else [])
        left_out = {".mkv": [], ".mp4": ["an attached file"], ".mov": ["an attached file", "a cover picture"]}[ending]
        assert told == [f"Left out of the {ending} file: {name}." for name in left_out]
    assert copy(tmp_path / "out.mp4", tmp_path / "again.mkv") == []
    assert covers(tmp_path / "again.mkv") == [cover]


def length_of_sound(path: Path) -> Fraction:
    """Seconds from the first sample that is heard to the last, by the file's own words: packets, not decoded."""
    with av.open(str(path)) as container:
        track, end, begin, hidden = container.streams.audio[0], Fraction(0), None, 0
        for packet in container.demux(track):
            if not packet.size:
                continue
            begin = packet.pts * packet.time_base if begin is None else begin
            end = (packet.pts + packet.duration) * packet.time_base
            if packet.has_sidedata("skip_samples"):
                hidden = int.from_bytes(bytes(packet.get_sidedata("skip_samples"))[4:8], "little")
        if track.duration:  # of MP4: where its edit list ends
            end = min(end, (track.duration + (track.start_time or 0)) * track.time_base)
        return end - max(begin, Fraction(0)) - Fraction(hidden, track.rate)


@pytest.mark.parametrize(("before", "after"), [("mkv", "mkv"), ("mkv", "mp4"), ("mkv", "mov"), ("mp4", "mp4")])
def test_sound_ends_where_it_ended(before: str, after: str, tmp_path: Path) -> None:
    """MP3 is padded to whole packets of 26 ms; how much of the last one is not heard stands beside it."""
    source, target = make_video(tmp_path / f"in.{before}", 24, sound="libmp3lame"), tmp_path / f"out.{after}"
    assert copy(source, target) == []
    assert [sound for sound, _, _ in read(target).sound] == [sound for sound, _, _ in read(source).sound]
    assert abs(length_of_sound(source) - 1) < Fraction(3, 1000)
    assert abs(length_of_sound(target) - 1) < Fraction(3, 1000)  # Matroska counts milliseconds


@pytest.mark.parametrize("sound", ["libmp3lame", "aac"])
def test_sound_of_mp4_ends_in_matroska_where_it_ended(sound: str, tmp_path: Path) -> None:
    """MP4 begins before 0 with what the decoder needs first; Matroska moves all of it, pictures too, to 0."""
    source, target = make_video(tmp_path / "in.mp4", 24, sound=sound), tmp_path / "out.mkv"
    assert copy(source, target) == []
    assert [data for data, _, _ in read(target).sound] == [data for data, _, _ in read(source).sound]
    with av.open(str(target)) as container:
        first = min(packet.pts * packet.time_base for packet in container.demux(video=0) if packet.size)
    assert abs(length_of_sound(target) - first - 1) < Fraction(3, 1000)


@pytest.fixture
def late(tmp_path: Path) -> Path:
    """A recording whose sound began 0.4 s before its pictures."""
    plain, path = make_video(tmp_path / "plain.ts", 12, sound="aac"), tmp_path / "late.ts"
    with av.open(str(plain)) as before, av.open(str(path), "w") as after:
        tracks = [after.add_stream_from_template(stream) for stream in before.streams]
        for packet in before.demux():
            if packet.dts is not None:
                if packet.stream.type == "video":
                    packet.pts, packet.dts = packet.pts + 36000, packet.dts + 36000
                packet.stream = tracks[packet.stream.index]
                after.mux(packet)
    return path


def test_pictures_wait_for_nothing_that_is_left_out(late: Path) -> None:
    clip = open_clip(late)
    assert abs(clip.times[0] * clip.time_base - Fraction(2, 5)) < Fraction(1, 10)
    alone = clip.alone()
    assert alone.times[0] == 0
    assert [after - before for before, after in zip(alone.times, alone.times[1:], strict=False)] == [
        after - before for before, after in zip(clip.times, clip.times[1:], strict=False)
    ]
    assert alone.start + alone.times[0] * alone.time_base == clip.start + clip.times[0] * clip.time_base


def test_what_begins_earlier_and_is_left_out_moves_nothing(tmp_path: Path) -> None:
    """A second track of pictures from 0 on; what is refined, and its sound, begin 5 s later."""
    main, second = (
        make_video(tmp_path / name, 12, sound=sound, bf="0") for name, sound in (("a.mkv", "aac"), ("b.mkv", ""))
    )
    with av.open(str(main)) as first, av.open(str(second)) as other, av.open(str(tmp_path / "in.mkv"), "w") as after:
        tracks = [after.add_stream_from_template(stream) for stream in (*first.streams, *other.streams)]
        tracks[0].disposition, tracks[2].disposition = 1, 0
        for file, numbers, wait in ((other, (2,), 0), (first, (0, 1), 5)):
            for packet in file.demux():
                if packet.dts is not None:
                    later = int(wait / packet.time_base)
                    packet.pts, packet.dts = packet.pts + later, packet.dts + later
                    packet.stream = tracks[numbers[packet.stream.index]]
                    after.mux(packet)
    clip = open_clip(tmp_path / "in.mkv")
    assert float(clip.start) > 4.9
    assert clip.times[0] * clip.time_base < Fraction(1, 10)
    copy(tmp_path / "in.mkv", tmp_path / "out.mkv")
    assert max(read(tmp_path / "out.mkv").times) < 1
