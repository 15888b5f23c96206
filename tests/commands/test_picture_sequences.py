"""Numbered pictures in and out: names, numbers, depth, light and metadata stay; each is whole; runs resume."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin
from small_videos import make_video, ramps, read

from flashvideo.commands.main import main
from flashvideo.errors import CommandError
from flashvideo.frames import TargetSize
from flashvideo.refiner import RefineSettings, files, outputs
from flashvideo.refiner.files import FileOptions, refine_video
from flashvideo.video_files import open_sequence, sequence_identity
from flashvideo.video_files.picture_metadata import exr_depth, with_metadata

ROOT = Path(__file__).resolve().parents[2]
KEEP = RefineSettings(TargetSize("keep"), steps=1)


def picture(path: Path, pixels: np.ndarray, codec: str, layout: str, **options: str) -> Path:
    """Write one picture through FFmpeg."""
    source = {"f": "gbrpf32le", "u": "rgb48le"}[pixels.dtype.kind]
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=source)
    context = av.CodecContext.create(codec, "w")
    context.height, context.width, context.pix_fmt, context.time_base = *pixels.shape[:2], layout, Fraction(1, 24)
    context.options = options
    if layout != source:
        frame = frame.reformat(format=layout)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(bytes(each) for each in [*context.encode(frame), *context.encode(None)]))
    return path


def deep(index: int, height: int = 32, width: int = 48) -> np.ndarray:
    """16 bits a colour, with steps that 8 bits don't have."""
    return (ramps(index, height, width).astype(np.uint16) << 8) + np.arange(width, dtype=np.uint16)[:, None] * 4


def light(index: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Light from 0 to 40 times white."""
    return (ramps(index, height, width) / np.float32(220)) ** 8 * np.float32(40)


def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run give back its source's frames, so that what files do to them is seen alone."""

    class Same:
        segments = 2

        def __init__(self, networks: object, clip: object, *_: object, **__: object) -> None:
            self.clip = clip

        def disk_bytes(self) -> int:
            return 0

        def main_bytes(self) -> int:
            return 0

        def run(self, write: object) -> None:
            frames = [frame.float() / (255 if not frame.is_floating_point() else 1) for frame in self.clip.frames()]
            half = len(frames) // 2
            for number, part in enumerate((frames[:half], frames[half:])):
                write(number, (frame[None] for frame in part))

    monkeypatch.setattr(files, "RefineRun", Same)


def decoded(path: Path, layout: str) -> np.ndarray:
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).reformat(format=layout).to_ndarray()


@pytest.mark.parametrize(("ending", "codec", "layout"), [(".png", "png", "rgb48be"), (".tif", "tiff", "rgb48le")])
def test_sixteen_bits_come_out_as_they_went_in(
    ending: str, codec: str, layout: str, tiny_networks: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity(monkeypatch)
    for index in range(5):
        picture(tmp_path / "in" / f"shot.{1001 + index:04d}{ending}", deep(index), codec, layout)
    refine_video(tiny_networks, tmp_path / "in" / f"shot.%04d{ending}", tmp_path / "out" / f"shot.%04d{ending}", KEEP)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"shot.{1001 + n}{ending}" for n in range(5)]
    for index in range(5):
        after = decoded(tmp_path / "out" / f"shot.{1001 + index}{ending}", "rgb48le").astype(int)
        assert np.abs(after - deep(index)).max() <= 1


@pytest.mark.parametrize("depth", ["half", "float"])
def test_light_keeps_its_highlights_and_its_depth(
    depth: str, tiny_networks: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity(monkeypatch)
    for index in range(3):
        picture(tmp_path / "in" / f"{index}.exr", light(index), "exr", "gbrpf32le", format=depth, compression="none")
    refine_video(tiny_networks, tmp_path / "in" / "%d.exr", tmp_path / "out" / "%d.exr", KEEP)
    for index in range(3):
        path = tmp_path / "out" / f"{index}.exr"
        assert exr_depth(path) == {"half": 16, "float": 32}[depth]
        after = next(open_sequence(path.with_name("%d.exr")).frames(index))
        before = next(open_sequence(tmp_path / "in" / "%d.exr").frames(index))
        assert np.allclose(after, before, atol=2e-3)
        with av.open(str(path)) as container:  # light itself, not as a screen shows it
            frame = next(container.decode(video=0))
        green = np.frombuffer(bytes(frame.planes[0]), np.float16 if "f16" in frame.format.name else np.float32)
        assert np.allclose(green.reshape(32, -1)[:, :48], light(index)[..., 1], rtol=5e-3, atol=1e-4)


def test_light_is_seen_as_on_an_ordinary_screen(tmp_path: Path) -> None:
    flat = np.full((16, 16, 3), 0.18, np.float32)
    picture(tmp_path / "1.exr", flat, "exr", "gbrpf32le")
    assert np.allclose(next(open_sequence(tmp_path / "%d.exr").frames()), 0.18 ** (1 / 2.4), atol=1e-3)
    flat[0, 0] = 40
    picture(tmp_path / "1.exr", flat, "exr", "gbrpf32le")
    shown = next(open_sequence(tmp_path / "%d.exr").frames())
    assert shown[0, 0, 0] == pytest.approx(1, abs=1e-4)
    assert shown[5, 5, 0] == pytest.approx(0.75 * 0.18 ** (1 / 2.4), abs=1e-3)


def test_png_keeps_what_it_says_of_itself(
    tiny_networks: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity(monkeypatch)
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Shot", "A 12")
    texts.add_itxt("Título", "café")
    (tmp_path / "in").mkdir()
    for index in (1, 2):
        image = Image.fromarray(ramps(index, 32, 48))
        image.save(tmp_path / "in" / f"{index}.png", pnginfo=texts, dpi=(300, 300), icc_profile=b"profile")
    refine_video(tiny_networks, tmp_path / "in" / "%d.png", tmp_path / "out" / "%d.png", KEEP)
    with Image.open(tmp_path / "out" / "2.png") as image:
        image.load()
        assert image.info["Shot"] == "A 12" and image.info["Título"] == "café"
        assert image.info["dpi"][0] == pytest.approx(300, abs=0.1) and image.info["icc_profile"] == b"profile"
        assert np.array_equal(np.asarray(image), ramps(2, 32, 48))


@pytest.mark.parametrize("compression", ["none", "zip1", "zip16"])
def test_openexr_keeps_its_attributes_and_stays_readable(compression: str, tmp_path: Path) -> None:
    source = picture(tmp_path / "in.exr", light(0, 40), "exr", "gbrpf32le")
    data = source.read_bytes()
    name = b"owner\0string\0" + struct.pack("<I", 5) + b"us 12"
    end = data.index(b"\0", data.index(b"screenWindowWidth")) + len(b"\0float\0") + 4 + 4
    source.write_bytes(data[:end] + name + data[end:])  # its offsets are wrong now; only its header is read
    plain = picture(tmp_path / "out.exr", light(1, 40), "exr", "gbrpf32le", compression=compression)
    carried = with_metadata(plain.read_bytes(), source)
    assert b"owner\0string\0" in carried and len(carried) == len(plain.read_bytes()) + len(name)
    before = decoded(plain, "gbrpf32le")
    plain.write_bytes(carried)
    assert np.array_equal(decoded(plain, "gbrpf32le"), before)


def test_a_sequence_becomes_a_video_and_a_video_a_sequence(
    tiny_networks: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity(monkeypatch)
    told: list[str] = []
    source = make_video(tmp_path / "in.mkv", 4, sound="aac")
    options = FileOptions(start_number=7, warn=told.append)
    refine_video(tiny_networks, source, tmp_path / "pictures" / "%03d.png", KEEP, options)
    assert [path.name for path in sorted((tmp_path / "pictures").iterdir())] == [f"{n:03d}.png" for n in (7, 8, 9, 10)]
    assert any("no sound" in text for text in told)
    (tmp_path / "pictures" / "009.png").unlink()
    options = FileOptions(fps=12.0, crf=0)
    damage = refine_video(tiny_networks, tmp_path / "pictures" / "%03d.png", tmp_path / "out.mp4", KEEP, options)
    assert damage == ("1 numbers are missing (9); the others keep theirs.",)
    assert read(tmp_path / "out.mp4").times == [0, Fraction(1, 12), Fraction(3, 12)]


def test_a_real_run_resumes_and_leaves_only_pictures(tiny_networks: object, tmp_path: Path) -> None:
    for index in range(9):
        picture(tmp_path / "in" / f"{index:02d}.png", deep(index), "png", "rgb48be")
    pattern, options = tmp_path / "out" / "%02d.png", FileOptions(segment_chunks=1)
    write, written = outputs.whole_file, []

    def killed(target: Path, **choices: object) -> object:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(target)
        return write(target, **choices)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(outputs, "whole_file", killed)
        refine_video(tiny_networks, tmp_path / "in" / "%02d.png", pattern, KEEP, options)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    assert len(before) == 4
    refine_video(tiny_networks, tmp_path / "in" / "%02d.png", pattern, KEEP, options)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert sorted(after) == [f"{index:02d}.png" for index in range(9)]
    assert before.items() <= after.items()  # what was there was not written again


def test_pictures_that_are_there_are_not_replaced(
    tiny_networks: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity(monkeypatch)
    source = tmp_path / "in" / "%d.png"
    for index in range(2):
        picture(tmp_path / "in" / f"{index}.png", deep(index), "png", "rgb48be")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "1.png").write_bytes(b"mine")
    with pytest.raises(CommandError, match=r"1\.png exists already"):
        refine_video(tiny_networks, source, tmp_path / "out" / "%d.png", KEEP)
    assert (tmp_path / "out" / "1.png").read_bytes() == b"mine"
    with pytest.raises(CommandError, match="are the pictures to be read"):
        refine_video(tiny_networks, source, source, KEEP, FileOptions(force=True))
    refine_video(tiny_networks, source, tmp_path / "out" / "%d.png", KEEP, FileOptions(force=True))
    assert decoded(tmp_path / "out" / "1.png", "rgb48le").shape == (32, 48, 3)


def test_a_video_may_have_a_percent_sign_in_its_name(
    tiny_networks: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity(monkeypatch)
    refine_video(tiny_networks, make_video(tmp_path / "50%d.mp4", 2), tmp_path / "100%d.mkv", KEEP)
    assert len(read(tmp_path / "100%d.mkv").frames) == 2


def test_damaged_and_odd_pictures(tmp_path: Path) -> None:
    for index in range(3):
        picture(tmp_path / f"{index}.png", deep(index), "png", "rgb48be")
    (tmp_path / "1.png").write_bytes(b"no picture")
    clip = open_sequence(tmp_path / "%d.png")
    assert clip.numbers == (0, 2) and clip.damage == ("1 of 3 pictures can't be decoded (1.png).",)
    assert clip.times == (0, 2)
    picture(tmp_path / "1.png", deep(0, 16, 16), "png", "rgb48be")
    with pytest.raises(CommandError, match=r"1\.png has another size"):
        open_sequence(tmp_path / "%d.png")
    identity_before = sequence_identity(tmp_path / "%d.png")
    (tmp_path / "1.png").unlink()
    assert sequence_identity(tmp_path / "%d.png") != identity_before
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["0.png", "2.png"]


def test_a_colour_profile_of_png_does_not_end_the_program(tmp_path: Path) -> None:
    """PyAV frees it twice where it is asked for what comes with a frame."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pictures = [Image.fromarray(ramps(index, 32, 48)) for index in range(3)]
    pictures[0].save(tmp_path / "a.png", save_all=True, append_images=pictures[1:], icc_profile=profile)
    pictures[0].save(tmp_path / "1.png", icc_profile=profile)
    lines = ["import gc, pathlib", "from flashvideo.video_files import open_clip, open_sequence", "for _ in range(30):"]
    sources = ("open_clip(pathlib.Path('a.png'))", "open_sequence(pathlib.Path('%d.png'))")
    lines += [f" list({source}.frames())" for source in sources]
    command = [sys.executable, "-c", "\n".join([*lines, " gc.collect()"])]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


@pytest.mark.parametrize(("words", "sentence"), [
    (["none/%d.png", "out/%d.png"], "There is no folder none"),
    (["%d.png", "out/%d.png"], "There are no pictures %d.png"),
    (["in.mkv", "out/%d.jpg"], "numbered pictures are written as .png, .tif, .tiff, .exr"),
    (["in.mkv", "out/%d.exr"], "OpenEXR holds light, which only OpenEXR sources have"),
    (["in.mkv", "no/where/%d.png"], "There is no folder no"),
    (["in.mkv", "out/%d.png", "--codec", "hevc"], "--codec is for video files"),
    (["in.mkv", "out.mp4", "--fps", "24"], "--fps is for numbered pictures"),
    (["in.mkv", "out.mp4", "--start-number", "1"], "--start-number is for numbered pictures"),
    (["in.mkv", "out/%d.png", "--start-number", "-1"], "--start-number must be 0 or more"),
    (["in.mkv", "out/%d.png", "--fps", "nan"], "--fps"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused_in_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "in.mkv", 1)
    try:
        code = main(["refine", *words, "--keep-size", "--device", "cpu"])
    except SystemExit as end:
        code = end.code
    assert code and sentence in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.unfinished"))
