"""`python -m flashvideo refine`: what it takes, what it writes, and what it says."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save, save_file

from flashvideo.atomic_files import in_use
from flashvideo.checkpoints import CheckpointError
from flashvideo.commands.refine import add_refine
from flashvideo.commands.terminal import CANCELLED, DAMAGED, REFUSED
from flashvideo.config import NANO_STRENGTH
from flashvideo.degradation import auto_strength
from flashvideo.errors import CommandError
from flashvideo.nano import NANO_FOLDER, nano_state
from flashvideo.refiner import files as refine_files
from flashvideo.refiner import outputs, work_folder
from flashvideo.refiner.files import WORK_ENDING
from flashvideo.refiner.run import RefineRun

ROOT = Path(__file__).resolve().parents[2]
FAST = ("--keep-size", "--steps", "1", "--device", "cpu")


def refine(*arguments: str | Path) -> int:
    """Run the command; its exit code."""
    parser = argparse.ArgumentParser()
    add_refine(parser.add_subparsers())
    options = parser.parse_args(["refine", *map(str, arguments)])
    return options.run(options)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A video of five frames of 32x16."""
    return make_clip(tmp_path / "in.mp4")


def make_clip(path: Path, count: int = 5) -> Path:
    """Write a short video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 16, 32, "yuv420p"
        for index in range(count):
            pixels = np.full((16, 32, 3), 40 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def shape_of(path: Path) -> tuple[int, int, int]:
    """Frames, height and width of a video."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return len(frames), frames[0].height, frames[0].width


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        (["--keep-size"], (5, 16, 32)),
        (["--scale", "1.5"], (5, 24, 48)),
        (["--short-side", "20"], (5, 20, 40)),
        (["--exact", "18x34"], (5, 34, 18)),
    ],
)
def test_every_way_to_say_the_size(size: list[str], shape: tuple[int, int, int], clip: Path, tmp_path: Path) -> None:
    assert refine(clip, tmp_path / "out.mp4", *size, "--steps", "1", "--device", "cpu") == 0
    assert shape_of(tmp_path / "out.mp4") == shape
    assert not (tmp_path / "out.mp4.unfinished").exists()


@pytest.mark.parametrize(("part", "warns"), [("vae", True), ("footage_vae", False)])
def test_a_vae_that_does_not_belong_to_the_model_is_named(
    part: str, warns: bool, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The refiner for real footage, with each VAE of the pack, as files."""
    files = ("--model", NANO_FOLDER / "footage_stage2.safetensors", "--vae", NANO_FOLDER / f"{part}.safetensors")
    assert refine(clip, tmp_path / "out.mp4", *FAST, *files) == 0
    assert ("and the VAE of FlashVideo-Nano for drawn scenes" in capsys.readouterr().err) == warns


def test_bars_count_windows_and_frames(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    refine(clip, tmp_path / "out.mp4", *FAST)
    said = capsys.readouterr()
    assert f"{tmp_path / 'out.mp4'}: refined" in said.out
    for words in ("read: 100%", "encode: 100%", "refine: 100%", "decode: 100%", "window/s"):
        assert words in said.err


def test_a_folder_of_videos_goes_to_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    make_clip(source / "a.mp4")
    make_clip(source / "b.mkv")
    (source / "broken.mp4").write_text("no video")
    (source / "notes.txt").write_text("not meant")
    assert refine(source, target, *FAST) == 1
    assert sorted(path.name for path in target.iterdir()) == ["a.mp4", "b.mkv"]
    assert "broken.mp4" in capsys.readouterr().err
    (source / "broken.mp4").unlink()
    assert refine(source, target, *FAST) == 0
    assert "a.mp4 exists already and is left as it is" in capsys.readouterr().out


def test_two_programs_share_a_folder_of_videos(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Each leaves to the other what that one has begun, or done since both looked into the folder."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        make_clip(source / name)
    theirs = target / f"a.mp4{WORK_ENDING}"
    theirs.mkdir(parents=True)
    (theirs / work_folder.MARKER).write_text("a work folder")
    (theirs / "part").write_text("theirs")
    done = target / "c.mp4"

    def finish_c(*_at: object) -> None:
        done.write_text("theirs")

    with in_use(theirs), pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashvideo.commands.run_refine.ProgressBars.close", finish_c)  # after a.mp4 was passed over
        assert refine(source, target, *FAST) == 0
    told = capsys.readouterr()
    assert f"a.mp4: {theirs} is in use: another program is at work there." in told.err
    assert "c.mp4 exists already and is left as it is" in told.out
    assert (theirs / "part").read_text() == done.read_text() == "theirs"
    assert sorted(path.name for path in target.iterdir()) == [theirs.name, "b.mp4", "c.mp4"]
    with in_use(theirs):
        assert refine(source / "a.mp4", target / "a.mp4", *FAST) == 1  # alone it is what was asked for
    done.unlink()
    (theirs / "part").unlink()
    assert refine(source, target, *FAST) == 0  # what the other one leaves behind is taken up
    assert sorted(path.name for path in target.iterdir()) == ["a.mp4", "b.mp4", "c.mp4"]


def test_two_clips_of_one_name_go_to_two_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    make_clip(source / "clip.avi")
    make_clip(source / "clip.mp4", count=1)
    for _ in range(2):
        assert refine(source, target, *FAST) == 0
        assert sorted(path.name for path in target.iterdir()) == ["clip.mp4", "clip.mp4.mp4"]
    assert [shape_of(path)[0] for path in sorted(target.iterdir())] == [5, 1]
    assert capsys.readouterr().out.count("exists already") == 2


def test_the_work_folder_may_be_the_results(clip: Path, tmp_path: Path) -> None:
    assert refine(clip, tmp_path / "out.mp4", "--work", tmp_path, *FAST) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_too_little_memory_for_one_video_is_told_and_the_next_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    make_clip(source / "a.mp4")
    make_clip(source / "b.mp4")
    begin, calls = RefineRun.run, []

    def run(started: RefineRun, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            torch.empty(2**50)  # more than any machine has
        return begin(started, *rest)

    monkeypatch.setattr(RefineRun, "run", run)
    assert refine(source, tmp_path / "out", *FAST) == 1
    told = capsys.readouterr().err
    assert "a.mp4: out of memory. The same command resumes the run." in told
    assert "Traceback" not in told
    assert (tmp_path / "out" / "b.mp4").is_file()


def test_a_name_that_the_terminal_cannot_show_is_no_obstacle(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "kätzchen😀.mp4")
    command = [sys.executable, "-m", "flashvideo", "refine", clip, tmp_path / "kleiner 😀.mp4", *FAST]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kleiner 😀.mp4").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk here that is always full")
def test_a_disk_that_fills_up_on_the_way_is_told(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    # Not save_file itself: newer versions of safetensors put a file in the device's place.
    monkeypatch.setattr(work_folder, "save_file", lambda tensors, _path: Path("/dev/full").write_bytes(save(tensors)))
    assert refine(clip, tmp_path / "out.mp4", *FAST) == 1
    told = capsys.readouterr().err
    assert "can't be written" in told
    assert "The same command resumes the run." in told
    monkeypatch.undo()
    assert refine(clip, tmp_path / "out.mp4", *FAST) == 0


def test_a_picture_goes_to_a_picture(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / "in.png")
    assert refine(tmp_path / "in.png", tmp_path / "out.jpg", *FAST) == 0
    with Image.open(tmp_path / "out.jpg") as image:
        assert image.size == (30, 20)


def test_model_files_give_what_the_built_in_ones_give(clip: Path, tmp_path: Path) -> None:
    """Those for real footage."""
    for part in ("footage_stage2", "footage_vae"):
        state = nano_state(part)
        save_file(state, tmp_path / f"{part}.safetensors", metadata=state.metadata)
    refine(clip, tmp_path / "built_in.mp4", *FAST)
    files = ("--model", tmp_path / "footage_stage2.safetensors", "--vae", tmp_path / "footage_vae.safetensors")
    refine(clip, tmp_path / "files.mp4", *FAST, *files)
    assert (tmp_path / "files.mp4").read_bytes() == (tmp_path / "built_in.mp4").read_bytes()


@pytest.mark.slow
def test_a_prompt_steers(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {
        word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", "medium", "motion", ",", "red", "blue"])
    }
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for prompt in ("red", "blue"):
        target = tmp_path / f"{prompt}.png"
        Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(tmp_path / "in.png")
        options = ("--prompt", prompt, "--tokenizer", tmp_path / "tokenizer.json")
        assert refine(tmp_path / "in.png", target, *FAST, "--color", "none", *options) == 0
    assert (tmp_path / "red.png").read_bytes() != (tmp_path / "blue.png").read_bytes()


def test_cancelling_says_how_to_go_on(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    encode = outputs.encode_segment

    def cancelled(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(outputs, "encode_segment", cancelled)
    assert refine(clip, tmp_path / "out.mp4", *FAST) == CANCELLED
    assert "The same command resumes" in capsys.readouterr().err
    assert not (tmp_path / "out.mp4").exists()
    monkeypatch.setattr(outputs, "encode_segment", encode)
    assert refine(clip, tmp_path / "out.mp4", *FAST) == 0
    assert "encode" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window", "48"], "4n\\+1"),
        (["--strength", "1000"], "0 to 999"),
        (["--steps", "0"], "at least 1 step"),
        (["--scale", "2", "--short-side", "64"], "two sizes"),
        (["--exact", "64"], "such as 1920x1080"),
        (["--tile", "100"], "a tile's side is a multiple of 16"),
        (["--model", "nowhere.safetensors"], "--model and --vae go together"),
        (["--model", "nowhere.safetensors", "--vae", "nowhere.safetensors"], "no file nowhere"),
        (["--device", "abacus"], "no device 'abacus'"),
    ],
)
def test_what_cannot_be_done_is_said_first(options: list[str], words: str, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=words):
        refine(clip, tmp_path / "out.mp4", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_the_draft_model_is_no_refiner(clip: Path, tmp_path: Path) -> None:
    for part in ("stage1", "vae"):
        save_file(nano_state(part), tmp_path / f"{part}.safetensors")
    files = ("--model", tmp_path / "stage1.safetensors", "--vae", tmp_path / "vae.safetensors")
    with pytest.raises((CommandError, CheckpointError), match="stage I"):
        refine(clip, tmp_path / "out.mp4", *FAST, *files)
    save_file({"weight": torch.zeros(1)}, tmp_path / "stage1.safetensors")
    with pytest.raises(CheckpointError):
        refine(clip, tmp_path / "out.mp4", *FAST, *files)


def test_the_strength_suits_the_model_unless_it_is_given(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    nano = nano_state("stage2")
    shallow = {name: tensor for name, tensor in nano.items() if "blocks.3." not in name}
    save_file(nano, tmp_path / "nano.safetensors")
    save_file(shallow, tmp_path / "other.safetensors")
    save_file(nano_state("vae"), tmp_path / "vae.safetensors")
    same, other = (
        ("--model", tmp_path / f"{name}.safetensors", "--vae", tmp_path / "vae.safetensors")
        for name in ("nano", "other")
    )
    own = f"strength {NANO_STRENGTH} (auto, for FlashVideo-Nano)"
    by_size = f"strength {auto_strength(16, 32)} (auto, for 32x16)"
    for options, expected in (
        ((), own), (same, own), ((*same, "--strength", "auto"), own), ((*same, "--preset", "rich"), own),
        (other, by_size), ((*other, "--strength", "auto"), by_size), (("--strength", "500"), None),
    ):  # fmt: skip
        assert refine(clip, tmp_path / "out.mp4", "--force", *FAST, *options) == 0
        said = capsys.readouterr().err
        assert ("strength" in said) == (expected is not None) and (expected or "") in said


def test_the_resampler_suits_the_model_unless_it_is_given(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    monkeypatch.setattr(refine_files, "refine_video", lambda *arguments: used.append(arguments[3].resample) or ())
    for part in ("stage2", "vae"):
        save_file(nano_state(part), tmp_path / f"{part}.safetensors")
    drawn = ("--model", tmp_path / "stage2.safetensors", "--vae", tmp_path / "vae.safetensors")
    for options in ((), drawn, ("--resample", "bilinear"), (*drawn, "--resample", "area")):
        assert refine(clip, tmp_path / "out.mp4", *FAST, *options) == 0
    assert used == ["bicubic", "bilinear", "bilinear", "area"]


def test_the_detail_size_suits_the_model_unless_it_is_given(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    written = {}
    for size in ("auto", "9", "70"):
        assert refine(clip, tmp_path / f"{size}.mp4", *FAST, "--detail-size", size) == 0
        written[size] = (tmp_path / f"{size}.mp4").read_bytes()
        assert ("detail size 9 (auto, for FlashVideo-Nano)" in capsys.readouterr().err) == (size == "auto")
    assert len({*written.values()}) == 3  # 9 alone takes all of the network's detail, auto what the source supports


def test_a_damaged_video_is_refined_as_far_as_it_goes_and_the_exit_code_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    media = Path(__file__).resolve().parents[1] / "data" / "media"
    assert refine(media / "truncated.mp4", tmp_path / "out.mp4", *FAST) == DAMAGED
    assert "53 of 100 frames can't be decoded" in capsys.readouterr().out
    assert shape_of(tmp_path / "out.mp4")[0] == 47


def test_sound_can_be_encoded_anew_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(__file__).resolve().parents[1] / "data" / "media" / "v.wmv"
    assert refine(source, tmp_path / "out.mkv", *FAST) == REFUSED
    assert "--sound aac encodes it anew" in capsys.readouterr().err
    assert refine(source, tmp_path / "out.mkv", *FAST, "--sound", "aac") == 0
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert [track.codec_context.name for track in container.streams] == ["h264", "aac"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc takes no files, from the superuser neither")
@pytest.mark.parametrize("options", [["/proc/out.mp4"], ["out.mp4", "--work", "/proc/work"]])
def test_a_folder_that_takes_no_files_is_refused_before_the_work(
    options: list[str], clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(outputs, "encode_segment", None)
    assert refine(clip, *options, *FAST) == REFUSED
    assert "can't be used for unfinished work: No such file or directory. --work DIR" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file's size")
def test_a_disk_that_takes_no_more_is_named_and_the_run_resumes(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the system's own limit of a file's size: the write itself fails, as on a full disk."""
    import resource

    detailed = (*FAST, "--detail-size", "70")  # else the result is so plain that it fits

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        assert refine(clip, tmp_path / "out.mp4", *detailed) == REFUSED
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("in.mp4: ")]
    assert len(said) == 1 and "File too large" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4.unfinished"]
    assert refine(clip, tmp_path / "out.mp4", *detailed) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]
