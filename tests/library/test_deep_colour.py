"""More than 8 bits a colour, HDR, and interlaced pictures: what goes in comes out, seen by its stored numbers."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from small_videos import make_video, read

from flashvideo.errors import CommandError
from flashvideo.frames import TargetSize
from flashvideo.refiner import RefineSettings
from flashvideo.refiner.files import FileOptions, refine_video
from flashvideo.video_files import CONTAINERS, VideoFormat, check_container, encode_segment, open_clip, write_video
from flashvideo.video_files.hdr import pq_to_sdr, sdr_to_pq

BLACK, WHITE = 64, 940  # of 10 bits
BT2020, BT709 = 9, 1
PQ, HLG, SDR = 16, 18, 1  # FFmpeg's numbers of the transfer curves
SCREEN = "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)"


def ramp(frame: int, size: tuple[int, int] = (64, 96)) -> np.ndarray:
    """Brightness from black to white and back, in 10 bits, that moves."""
    height, width = size
    steps = (np.arange(height * width).reshape(height, width) + 40 * frame) % (2 * (WHITE - BLACK))
    return (WHITE - np.abs(steps - (WHITE - BLACK))).astype(np.uint16)


def deep_video(path: Path, curve: int = SDR, matrix: int = BT709, count: int = 5, **parameters: str) -> Path:
    """A grey video of 10 bits without loss, with tags and x265's `parameters`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx265", rate=Fraction(25))
        known = {"lossless": "1", "log-level": "error", **parameters}
        stream.options = {"x265-params": ":".join(f"{name}={value}" for name, value in known.items())}
        context = stream.codec_context
        stream.height, stream.width = ramp(0).shape
        context.pix_fmt, context.colorspace, context.color_range = "yuv420p10le", matrix, 1
        context.color_primaries, context.color_trc = matrix, curve
        for index in range(count):
            frame = av.VideoFrame(stream.width, stream.height, "yuv420p10le")
            for plane, values in zip(frame.planes, (ramp(index), None, None), strict=True):
                stored = np.full((plane.height, plane.line_size // 2), 512, np.uint16)
                if values is not None:
                    stored[:, : values.shape[1]] = values
                plane.update(stored.tobytes())
            frame.pts, frame.time_base = index, 1 / Fraction(25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def codes(path: Path) -> list[np.ndarray]:
    """The stored brightness of each frame."""
    with av.open(str(path)) as container:
        return [
            np.frombuffer(bytes(frame.planes[0]), np.uint16).reshape(frame.height, -1)[:, : frame.width].astype(int)
            for frame in container.decode(video=0)
        ]


def copy(source: Path, target: Path, *, deinterlace: bool = False, crf: int = 0, **choices: object) -> VideoFormat:
    """What the refiner does to a file, without a network: read, encode, write."""
    clip = open_clip(source, deinterlace=deinterlace)
    form = VideoFormat(clip, clip.height, clip.width, crf=crf, **choices)
    check_container(target.suffix, form)
    frames = (torch.as_tensor(frame).float() / (255 if frame.dtype == torch.uint8 else 1) for frame in clip.frames())
    segments = [encode_segment((frame[None] for frame in frames), form)]
    write_video(target, form, segments, CONTAINERS[target.suffix])
    return form


def test_the_curve_for_pq_rises_and_has_an_inverse() -> None:
    stored = torch.linspace(0, 1, 4096)
    shown = pq_to_sdr(stored)
    assert (shown[0], shown[-1]) == (0, pytest.approx(1, abs=1e-6))
    assert (shown.diff() > 0).all()
    assert torch.allclose(sdr_to_pq(shown), stored, atol=1e-5)
    # ITU-R BT.2408: white paper has 203 nits, 58 % of PQ and 75 % of HLG. Twice as bright is a stop more.
    assert pq_to_sdr(torch.tensor(0.5807)).item() == pytest.approx(0.75, abs=1e-3)
    assert pq_to_sdr(torch.tensor(0.4401)).item() == pytest.approx(0.75 * (50 / 203) ** (1 / 2.4), abs=2e-3)  # 50 nits
    # No kink at white: before and after it a little more of PQ adds as much.
    steps = pq_to_sdr(torch.tensor([0.5800, 0.5805, 0.5810, 0.5815], dtype=torch.float64)).diff()
    assert steps[2].item() == pytest.approx(steps[0].item(), rel=0.05)


@pytest.mark.parametrize("codec", ["auto", "h264", "hevc"])
@pytest.mark.parametrize(("curve", "matrix"), [(SDR, BT709), (HLG, BT2020), (PQ, BT2020)])
def test_ten_bits_come_out_as_they_went_in(codec: str, curve: int, matrix: int, tmp_path: Path) -> None:
    source = deep_video(tmp_path / "in.mkv", curve, matrix)
    copy(source, tmp_path / "out.mkv", codec=codec)
    for before, after in zip(codes(source), codes(tmp_path / "out.mkv"), strict=True):
        assert np.abs(after - before).mean() < 0.5 and np.abs(after - before).max() <= 2
    with av.open(str(tmp_path / "out.mkv")) as container:
        context = container.streams.video[0].codec_context
        assert context.name == ("h264" if codec == "h264" else "hevc") and context.pix_fmt == "yuv420p10le"
        assert (int(context.color_primaries), int(context.color_trc), int(context.colorspace)) == (
            matrix, curve, matrix
        )  # fmt: skip


@pytest.mark.parametrize(("codec", "ending", "off"), [("av1", ".mp4", 6), ("prores", ".mov", 3), ("hevc", ".mp4", 3)])
def test_other_codecs_hold_ten_bits_within_their_quality(codec: str, ending: str, off: float, tmp_path: Path) -> None:
    source = deep_video(tmp_path / "in.mkv")
    copy(source, tmp_path / f"out{ending}", codec=codec, crf=4)
    for before, after in zip(codes(source), codes(tmp_path / f"out{ending}"), strict=True):
        assert np.abs(after - before).mean() < off
    with av.open(str(tmp_path / f"out{ending}")) as container:
        track = container.streams.video[0]
        assert [frame.pts * track.time_base for frame in container.decode(track)] == [Fraction(n, 25) for n in range(5)]
        assert codec != "hevc" or track.codec_context.codec_tag == "hvc1"  # without it Apple's players show nothing


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
def test_mastering_data_are_carried(codec: str, tmp_path: Path) -> None:
    given = {"master-display": SCREEN, "max-cll": "900,300", "hdr10": "1"}
    source = deep_video(tmp_path / "in.mkv", PQ, BT2020, **given)
    copy(source, tmp_path / "out.mp4", codec=codec, crf=4)
    found = open_clip(tmp_path / "out.mp4").mastering
    wanted = (0.68, 0.32, 0.265, 0.69, 0.15, 0.06, 0.3127, 0.329, 1000, 0.005)
    assert [float(each) for each in found.screen] == pytest.approx(wanted, abs=2e-4)
    assert found.brightest == (900, 300)


def test_the_network_gets_pq_as_an_ordinary_screen_shows_it(tmp_path: Path) -> None:
    clip = open_clip(deep_video(tmp_path / "in.mkv", PQ, BT2020))
    frame = next(clip.frames())
    stored = (torch.from_numpy(ramp(0).astype(np.float32)) - BLACK) / (WHITE - BLACK)
    assert (clip.bits, clip.curve) == (10, "PQ")
    assert torch.allclose(frame, pq_to_sdr(stored)[..., None].expand(-1, -1, 3), atol=2e-3)


def test_eight_bits_may_be_written_with_ten(tmp_path: Path) -> None:
    clip = open_clip(make_video(tmp_path / "in.mp4", 1))
    form = VideoFormat(clip, 32, 1024, crf=0, bits=10)
    smooth = torch.linspace(0.2, 0.8, 1024).expand(1, 32, 1024)[..., None].expand(-1, -1, -1, 3)
    write_video(tmp_path / "out.mkv", form, [encode_segment([smooth], form)])
    assert len(np.unique(codes(tmp_path / "out.mkv")[0])) > 500  # 8 bits have 131 steps there


def test_what_a_format_cannot_hold_is_said_or_refused(tmp_path: Path) -> None:
    source = deep_video(tmp_path / "in.mkv", PQ, BT2020, **{"master-display": SCREEN, "max-cll": "900,300"})
    clip = open_clip(source)
    (said,) = VideoFormat(clip, 32, 32, bits=8).losses()
    assert "10 bits a colour become 8" in said and "PQ" in said
    (said,) = VideoFormat(clip, 32, 32, codec="prores").losses()
    assert "mastering" in said
    assert not [*VideoFormat(clip, 32, 32).losses()]
    with pytest.raises(CommandError, match="ProRes has 10 bits a colour, not 8"):
        VideoFormat(clip, 32, 32, codec="prores", bits=8)
    with pytest.raises(CommandError, match="AV1 needs even sides; the result would be 33x32"):
        VideoFormat(clip, 32, 33, codec="av1")
    with pytest.raises(CommandError, match=r"\.mp4 file can't hold ProRes pictures\. \.mov and \.mkv can"):
        check_container(".mp4", VideoFormat(clip, 32, 32, codec="prores"))


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 9])
def test_segments_of_any_length_follow_each_other(frames: int, tmp_path: Path) -> None:
    source = deep_video(tmp_path / "in.mkv", count=2 * frames)
    clip = open_clip(source)
    form, pictures = VideoFormat(clip, clip.height, clip.width, crf=0), list(clip.frames())
    parts = [encode_segment((frame[None] for frame in part), form) for part in (pictures[:frames], pictures[frames:])]
    write_video(tmp_path / "out.mp4", form, parts)
    assert [abs(a - b).max() <= 1 for a, b in zip(codes(source), codes(tmp_path / "out.mp4"), strict=True)]


def test_refined_files_keep_ten_bits_and_resume(tiny_networks: object, tmp_path: Path) -> None:
    source, target = deep_video(tmp_path / "in.mkv", count=9), tmp_path / "out.mp4"
    settings = RefineSettings(size=TargetSize("keep"), steps=1)
    refine_video(tiny_networks, source, target, settings, FileOptions(segment_chunks=1))
    with av.open(str(target)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("hevc", "yuv420p10le")
        assert len(list(container.decode(video=0))) == 9
    refined = codes(target)
    assert any((each % 4 != 0).any() for each in refined)  # steps that 8 bits don't have


def combed(path: Path, *, count: int = 8) -> Path:
    """A bright bar that moves 6 pixels between the two halves of each picture."""
    with av.open(str(path), "w") as container:
        # interlaced=1: x264 codes halves, and marks the frames.
        stream = container.add_stream("libx264", rate=Fraction(25), options={"crf": "1", "x264-params": "tff=1"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for index in range(count):
            pixels = np.full((64, 96, 3), 30, np.uint8)
            for half in (0, 1):
                left = 4 + 10 * index + 5 * half
                pixels[half::2, left : left + 12] = 220
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def comb(frames: list[np.ndarray]) -> float:
    """How much neighbouring rows differ where every second one agrees."""
    stack = np.stack(frames).astype(int)
    near, far = np.abs(np.diff(stack, axis=1)), np.abs(stack[:, 2:] - stack[:, :-2])
    return float(near.mean() - far.mean())


def test_interlaced_pictures_become_whole_ones(tmp_path: Path) -> None:
    source = combed(tmp_path / "in.mp4")
    assert any("interlaced" in text for text in open_clip(source).notes)
    whole = open_clip(source, deinterlace=True)
    assert whole.deinterlaced and not whole.notes
    copy(source, tmp_path / "as-it-is.mkv")
    copy(source, tmp_path / "out.mkv", deinterlace=True)
    before, after = read(tmp_path / "as-it-is.mkv"), read(tmp_path / "out.mkv")
    assert after.times == before.times and len(after.frames) == 8
    assert {late - early for early, late in pairwise(after.times)} == {Fraction(1, 25)}
    assert comb(before.frames) > 10 and comb(after.frames) < 1


def test_whole_pictures_are_left_alone_by_the_deinterlacer(tmp_path: Path) -> None:
    source = make_video(tmp_path / "in.mp4", 4)
    clip = open_clip(source, deinterlace=True)
    assert not clip.deinterlaced
    assert all(map(torch.equal, clip.frames(), open_clip(source).frames()))
