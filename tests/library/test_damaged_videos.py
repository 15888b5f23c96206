"""Damaged videos: what can be decoded is read, and nothing is lost without a word; recorded gaps are no damage."""

from __future__ import annotations

import random
from pathlib import Path

import av
import pytest
from small_videos import make_video

from flashvideo.errors import CommandError
from flashvideo.video_files import open_clip
from flashvideo.video_files.structure import is_broken

FRAMES = 60
ENDINGS = (".mkv", ".mp4", ".mov", ".avi", ".flv", ".ts", ".m2ts")


def silent_video(path: Path) -> Path:
    """Pictures without sound, with a key frame each 15."""
    return make_video(path, FRAMES, size=(64, 96), crf="20", g="15")


def without(source: Path, target: Path, missing: range) -> Path:
    """The same packets but for some: a recorder that lost time writes such a file, and it isn't damaged."""
    with av.open(str(source)) as before, av.open(str(target), "w") as after:
        track = after.add_stream_from_template(before.streams.video[0])
        for number, packet in enumerate(before.demux(video=0)):
            if packet.dts is not None and number not in missing:
                packet.stream = track
                after.mux(packet)
    return target


@pytest.mark.parametrize("ending", [".mkv", ".mp4", ".mov", ".avi", ".flv"])
def test_pictures_without_sound_are_not_lost_in_silence(ending: str, tmp_path: Path) -> None:
    data = silent_video(tmp_path / f"in{ending}").read_bytes()
    damaged, counts = tmp_path / f"bad{ending}", []
    for seed in range(12):
        pick = random.Random(seed)
        at, size = pick.randrange(len(data) // 10, len(data) * 9 // 10), pick.choice((1, 8, 100, 1500))
        changed = data[:at] if seed % 4 == 0 else data[:at] + pick.randbytes(size) + data[at + size :]
        damaged.write_bytes(changed)
        try:
            clip = open_clip(damaged)
        except CommandError as refusal:
            assert str(damaged) in str(refusal)
            continue
        counts.append(clip.count)
        assert clip.damage or clip.count == FRAMES, seed
    assert any(0 < count < FRAMES for count in counts)


@pytest.mark.parametrize("ending", [".ts", ".m2ts"])
def test_packets_that_a_transport_stream_lacks_are_noticed(ending: str, tmp_path: Path) -> None:
    source, damaged = silent_video(tmp_path / f"in{ending}"), tmp_path / f"bad{ending}"
    data, length = source.read_bytes(), 192 if ending == ".m2ts" else 188
    packets = [data[at : at + length] for at in range(0, len(data), length)]
    damaged.write_bytes(b"".join(packets[: len(packets) // 3] + packets[len(packets) // 3 + 30 :]))
    (said,) = open_clip(damaged).damage
    assert "can't be decoded (" in said
    damaged.write_bytes(data[: len(data) // 2 - len(data) // 2 % length + 50])
    (said,) = open_clip(damaged).damage
    assert "s on)" in said


def test_the_place_of_what_is_missing_is_said_where_the_rate_changes(tmp_path: Path) -> None:
    times = [index + index // 7 * 5 for index in range(FRAMES)]
    source = make_video(tmp_path / "in.mkv", FRAMES, size=(64, 96), times=times, g="15", bf="0", crf="20")
    with av.open(str(source)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    data, end = source.read_bytes(), bytes(packets[30])[-60:]
    source.write_bytes(data.replace(end, bytes(60)))
    (said,) = open_clip(source).damage
    assert f"{float((packets[30].pts - packets[0].pts) * packets[0].time_base):.1f} s" in said


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_recorded_gap_is_no_damage(ending: str, tmp_path: Path) -> None:
    kind = ".ts" if ending == ".avi" else ".mkv"  # how H.264 is kept in it
    source = make_video(tmp_path / f"in{kind}", FRAMES, size=(64, 96), bf="0", g="1", crf="20")
    gapped = without(source, tmp_path / f"gap{ending}", range(20, 32))
    clip = open_clip(gapped)
    assert (clip.count, clip.damage) == (FRAMES - 12, ())
    with av.open(str(gapped)) as container:
        assert not is_broken(gapped, container.format.name)


@pytest.mark.parametrize("tracks", ["84", "0100000000100000"])  # 4 bytes, and a megabyte that isn't there
def test_a_damaged_size_asks_for_no_more_memory_than_a_number_takes(tracks: str, tmp_path: Path) -> None:
    number = "d7" + "0104000000000000"  # of a track, by its own word 2^50 bytes long
    segment = f"1654ae6b{tracks}ae8a{number}01"
    path = tmp_path / "damaged.mkv"
    path.write_bytes(bytes.fromhex(f"1a45dfa380 18538067{0x80 + len(segment) // 2:02x}{segment}"))
    assert is_broken(path, "matroska,webm")
