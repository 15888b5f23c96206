"""Video files in, video files out: frames, times and sound as they were, and a run that survives its end."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from small_videos import SOUND_RATE, add_sound, make_video, ramps, read, turn_clockwise

from flashvideo.errors import CommandError
from flashvideo.frames import PictureSize, TargetSize
from flashvideo.refiner import Networks, RefineSettings, refine_frames
from flashvideo.refiner.files import WORK_ENDING, FileOptions, refine_picture, refine_video
from flashvideo.refiner.pictures import read_picture
from flashvideo.refiner.work_folder import WorkFolder
from flashvideo.video_files import UPRIGHT, open_clip

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = RefineSettings(TargetSize("keep"), window=17, overlap=8, steps=2)

# What a child process does: refine IN to OUT with `tiny_networks`, and print its progress and memory.
CHILD = """
import resource, sys
from pathlib import Path
sys.path.append("tests")
from flashvideo.frames import TargetSize
from flashvideo.refiner.run import RefineSettings
from flashvideo.refiner.files import FileOptions, refine_video
from small_models import tiny_networks

def report(phase, done, total):
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    print(phase, done, pages * resource.getpagesize(), flush=True)

settings = RefineSettings(TargetSize("keep"), window=17, overlap=8, steps=2)
source, target, segment = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
refine_video(tiny_networks(), source, target, settings, FileOptions(segment_chunks=segment), report)
"""


def test_too_little_main_memory_is_told_before_the_work_starts(
    tiny_networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, told = make_video(tmp_path / "in.mp4", 9, Fraction(8)), tmp_path / "out.mp4", []
    options = FileOptions(warn=lambda text: told.append((text, target.exists())))
    refine_video(tiny_networks, source, target, SETTINGS, options)
    assert not told  # whole pictures: there is no limit
    monkeypatch.setattr("flashvideo.refiner.files.main_memory", lambda: 1000)
    target.unlink()
    refine_video(replace(tiny_networks, vae_memory=1e5), source, target, SETTINGS, options)
    ((text, finished),) = told
    assert "GiB in main memory" in text
    assert not finished
    assert target.is_file()


@pytest.mark.parametrize(
    ("rate", "ending", "sound"),
    [
        (Fraction(8), ".mp4", ""),
        (Fraction(16), ".mkv", "flac"),
        (Fraction(24), ".mp4", "aac"),
        (Fraction(24000, 1001), ".mov", "pcm_s16le"),
        (Fraction(30000, 1001), ".mp4", "aac"),
    ],
)
def test_frames_times_and_sound_are_the_sources(
    rate: Fraction, ending: str, sound: str, tiny_networks: Networks, tmp_path: Path
) -> None:
    source = make_video(tmp_path / f"in{ending}", 38, rate, sound=sound)
    target = tmp_path / f"out{ending}"
    refine_video(tiny_networks, source, target, SETTINGS, FileOptions(segment_chunks=2))

    before, after = read(source), read(target)
    assert len(after.frames) == 38
    assert after.rate == before.rate
    assert after.times == before.times
    assert bool(before.sound) == bool(sound)
    assert after.sound == before.sound
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name, target.name]


def test_a_file_comes_out_as_its_frames_do(tiny_networks: Networks, tmp_path: Path) -> None:
    """Reading, the segments and writing add nothing of their own but what H.264 rounds."""
    source = make_video(tmp_path / "in.mp4", 21)
    refine_video(tiny_networks, source, tmp_path / "out.mp4", SETTINGS, FileOptions(crf=0, segment_chunks=2))
    clip = torch.stack(list(open_clip(source).frames()))
    expected = (refine_frames(tiny_networks, clip, SETTINGS) * 255).round().numpy()
    # Colours are kept at half size: what can be compared is the mean over 2x2 pixels. So read, PyAV rounds down.
    for frame, wanted in zip(read(tmp_path / "out.mp4").frames, expected, strict=True):
        cells = [part.reshape(16, 2, 24, 2, 3).mean((1, 3)) for part in (frame.astype(float), wanted)]
        assert np.abs(cells[0] - cells[1]).mean() < 2.5


def test_uneven_times_stay_uneven(tiny_networks: Networks, tmp_path: Path) -> None:
    times = [0, 1, 2, 5, 6, 10, 11, 12, 13, 20, 21, 22, 23, 24, 25, 40, 41, 42, 43, 44, 47, 50]
    source = make_video(tmp_path / "in.mp4", len(times), times=times)
    refine_video(tiny_networks, source, tmp_path / "out.mp4", SETTINGS, FileOptions(segment_chunks=2))
    assert read(tmp_path / "out.mp4").times == [Fraction(time, 24) for time in times]


@pytest.mark.parametrize(("count", "size"), [(1, (32, 48)), (2, (31, 48)), (6, (17, 33))])
def test_any_length_and_any_size_even_odd_ones(
    count: int, size: tuple[int, int], tiny_networks: Networks, tmp_path: Path
) -> None:
    source = make_video(tmp_path / "in.mp4", count, size=size)
    refine_video(tiny_networks, source, tmp_path / "out.mp4", SETTINGS)
    frames = read(tmp_path / "out.mp4").frames
    assert len(frames) == count
    assert frames[0].shape == (*size, 3)


@pytest.mark.parametrize("size", [TargetSize(short_side=18), TargetSize("scale", scale=0.75)])
def test_a_video_has_even_sides_unless_its_size_was_asked_for(
    size: TargetSize, tiny_networks: Networks, tmp_path: Path
) -> None:
    """24x26 with a short side of 18 would be 18x19.5; 0.75 of it 18x19.5, too. Players want 4:2:0."""
    source, warnings = make_video(tmp_path / "in.mp4", 2, size=(24, 26)), []
    options = FileOptions(warn=warnings.append)
    refine_video(tiny_networks, source, tmp_path / "out.mp4", replace(SETTINGS, size=size), options)
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width, stream.pix_fmt) == (18, 20, "yuv420p")
    assert warnings == []


def test_an_odd_size_that_was_asked_for_is_kept_with_a_warning(tiny_networks: Networks, tmp_path: Path) -> None:
    source, warnings = make_video(tmp_path / "in.mp4", 2), []
    settings = replace(SETTINGS, size=TargetSize("exact", width=33, height=18))
    refine_video(tiny_networks, source, tmp_path / "out.mp4", settings, FileOptions(warn=warnings.append))
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width, stream.pix_fmt) == (18, 33, "yuv444p")
    assert "33x18 has an odd side" in warnings[0]


def test_a_turned_video_comes_out_upright(tiny_networks: Networks, tmp_path: Path) -> None:
    source = make_video(tmp_path / "in.mp4", 5)
    straight = next(open_clip(source).frames())
    turn_clockwise(source)

    clip = open_clip(source)
    assert (clip.height, clip.width) == (48, 32)
    assert torch.equal(next(clip.frames()), straight.rot90(-1))
    refine_video(tiny_networks, source, tmp_path / "out.mp4", SETTINGS)
    assert open_clip(tmp_path / "out.mp4").orientation == UPRIGHT
    assert read(tmp_path / "out.mp4").frames[0].shape == (48, 32, 3)


@pytest.fixture(scope="module")
def refined(tiny_networks: Networks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A video, and what comes out if nothing stops its run."""
    folder = tmp_path_factory.mktemp("refined")
    source, target = make_video(folder / "in.mp4", 60, sound="aac"), folder / "out.mp4"
    refine_video(tiny_networks, source, target, SETTINGS, FileOptions(segment_chunks=2))
    return source, target


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["refine", "decode"])
def test_a_killed_run_goes_on_and_ends_with_the_same_file(
    phase: str, refined: tuple[Path, Path], tiny_networks: Networks, tmp_path: Path
) -> None:
    (source, whole), options = refined, FileOptions(segment_chunks=2)
    target = tmp_path / "out.mp4"
    command = [sys.executable, "-c", CHILD, str(source), str(target), "2"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        for number, _ in enumerate(line for line in child.stdout if line.startswith(phase)):
            if number == 2:
                child.send_signal(signal.SIGKILL)
                break
    assert child.returncode == -signal.SIGKILL
    assert not target.exists()
    assert (tmp_path / f"out.mp4{WORK_ENDING}").is_dir()

    seen = []
    refine_video(tiny_networks, source, target, SETTINGS, options, lambda *at: seen.append(at))
    phases = [at[0] for at in seen]
    assert phase == next(name for name in phases if name != "read")  # nothing that was done is done again
    assert target.read_bytes() == whole.read_bytes()
    assert not (tmp_path / f"out.mp4{WORK_ENDING}").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read from /proc")
def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    source = make_video(tmp_path / "in.mp4", 240)
    command = [sys.executable, "-c", CHILD, str(source), str(tmp_path / "out.mp4"), "4"]
    lines = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    for phase in ("encode", "refine", "decode"):
        memory = [int(line.split()[2]) for line in lines if line.startswith(phase)]
        # From a fifth on: the allocator and the codec have then what they need.
        assert max(memory[len(memory) // 5 :]) < 1.05 * memory[len(memory) // 5], phase


def test_a_picture_is_refined_too(tiny_networks: Networks, tmp_path: Path) -> None:
    Image.fromarray(ramps(0, 33, 47)).save(tmp_path / "in.png")
    settings = RefineSettings(TargetSize("scale", scale=2))
    refine_picture(tiny_networks, tmp_path / "in.png", tmp_path / "out.png", settings)
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (94, 66)


def test_the_size_is_resolved_once(tiny_networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve, asked = TargetSize.resolve, []

    def count(size: TargetSize, height: int, width: int) -> PictureSize:
        asked.append((height, width))
        return resolve(size, height, width)

    monkeypatch.setattr(TargetSize, "resolve", count)
    settings = replace(SETTINGS, strength=None)  # the notice on the strength needs the size too
    Image.fromarray(ramps(0, 16, 32)).save(tmp_path / "in.png")
    refine_picture(tiny_networks, tmp_path / "in.png", tmp_path / "out.png", settings)
    assert asked == [(16, 32)]
    asked.clear()
    refine_video(tiny_networks, make_video(tmp_path / "in.mp4", 1), tmp_path / "out.mp4", settings)
    assert len(asked) == 1


def test_what_cannot_be_done_is_said_before_the_work(tiny_networks: Networks, tmp_path: Path) -> None:
    source = make_video(tmp_path / "in.mp4", 5, sound="aac")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "there.mp4").write_text("something else")
    tone = tmp_path / "tone.mp4"
    with av.open(str(tone), "w") as container:
        add_sound(container, container.add_stream("aac", rate=SOUND_RATE), 0.2)
    unusual = make_video(tmp_path / "in.mkv", 5, sound="wavpack")
    for first, second, words in (
        (tmp_path / "nothing.mp4", "out.mp4", "no file"),
        (tmp_path / "text.mp4", "out.mp4", "can't be read as a video"),
        (tone, "out.mp4", "holds no pictures"),
        (source, "there.mp4", "exists already"),
        (source, "in.mp4", "the file to be read"),
        (source, "out.avi", r"should end in \.mp4"),
        (source, "nowhere/out.mp4", "no folder"),
        (unusual, "out.mp4", "as it is"),
    ):
        with pytest.raises(CommandError, match=words):
            refine_video(tiny_networks, first, tmp_path / second, SETTINGS)
    assert (tmp_path / "there.mp4").read_text() == "something else"
    assert not list(tmp_path.glob(f"*{WORK_ENDING}"))


def test_other_settings_do_not_go_on_with_an_unfinished_run(tiny_networks: Networks, tmp_path: Path) -> None:
    source, target = make_video(tmp_path / "in.mp4", 9), tmp_path / "out.mp4"

    def stop(phase: str, _done: float, _total: int) -> None:
        if phase == "refine":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refine_video(tiny_networks, source, target, SETTINGS, on_progress=stop)
    other = RefineSettings(TargetSize("keep"), window=17, overlap=8, steps=3)
    with pytest.raises(CommandError, match="steps was 2, now 3"):
        refine_video(tiny_networks, source, target, other)
    refine_video(tiny_networks, source, target, other, FileOptions(anew=True))
    assert target.is_file()


def test_a_folder_of_somebody_elses_is_never_emptied(tiny_networks: Networks, tmp_path: Path) -> None:
    source, folder = make_video(tmp_path / "in.mp4", 5), tmp_path / f"out.mp4{WORK_ENDING}"
    folder.mkdir()
    (folder / "settings.json").write_text("{}")
    (folder / "thesis.part").write_text("precious")
    for options in (FileOptions(), FileOptions(anew=True, force=True)):
        with pytest.raises(CommandError, match="is not used"):
            refine_video(tiny_networks, source, tmp_path / "out.mp4", SETTINGS, options)
    assert sorted(path.name for path in folder.iterdir()) == ["settings.json", "thesis.part"]
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CommandError, match="in the way"):
        refine_video(tiny_networks, source, tmp_path / "out.mp4", SETTINGS)
    assert not (tmp_path / "out.mp4").exists()


def test_what_others_put_into_a_work_folder_stays(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "work", {}, "encode")
    work.save("encode", 1, lambda: {"state": torch.zeros(4)}, always=True)
    (tmp_path / "work" / "notes.txt").write_text("precious")
    (tmp_path / "work" / "film.part").write_text("precious")
    work.remove()
    assert sorted(path.name for path in (tmp_path / "work").iterdir() if path.suffix != ".lock") == [
        "film.part",
        "notes.txt",
    ]


def test_a_kill_before_the_clean_up_blocks_nothing(
    tiny_networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, notes = make_video(tmp_path / "in.mp4", 5), tmp_path / "out.mp4", []
    with monkeypatch.context() as killed:
        killed.setattr(WorkFolder, "remove", lambda _: None)  # as if killed just before it
        refine_video(tiny_networks, source, target, SETTINGS)
    result = target.read_bytes()
    assert (tmp_path / f"out.mp4{WORK_ENDING}").is_dir()
    refine_video(tiny_networks, source, target, SETTINGS, FileOptions(note=notes.append))
    assert "is complete" in notes[-1]
    assert target.read_bytes() == result
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]
    with pytest.raises(CommandError, match="exists already"):  # as for any other file
        refine_video(tiny_networks, source, target, SETTINGS)


@pytest.mark.parametrize("name", ["state.json", "settings.json"])
@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"[" * 100_000, b"\xff\xfe"])
def test_a_damaged_state_is_named(damage: bytes, name: str, tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "work", {}, "encode")
    work.save("encode", 1, dict, always=True)
    work.close()
    (tmp_path / "work" / name).write_bytes(damage)
    with pytest.raises(CommandError, match=rf"{name} is damaged"):
        WorkFolder(tmp_path / "work", {}, "encode")
    with closing(WorkFolder(tmp_path / "work", {}, "encode", anew=True)) as work:
        assert work.progress().done == 0


def test_a_state_of_other_kinds_is_damaged(tmp_path: Path) -> None:
    WorkFolder(tmp_path / "work", {}, "encode").close()
    (tmp_path / "work" / "state.json").write_text('{"snapshot": "x", "done": 0, "names": [], "phase": "encode"}')
    with pytest.raises(CommandError, match=r"state\.json is damaged"):
        WorkFolder(tmp_path / "work", {}, "encode")


def test_a_run_of_another_version_says_so(tmp_path: Path) -> None:
    WorkFolder(tmp_path / "work", {"format": 5}, "encode").close()
    with pytest.raises(CommandError, match="another version of FlashVideo"):
        WorkFolder(tmp_path / "work", {"format": 6}, "encode")


@pytest.mark.parametrize("name", ["in.part.png", "in.png.part.png"])
def test_a_picture_whose_name_is_like_a_half_files_survives(name: str, tiny_networks: Networks, tmp_path: Path) -> None:
    Image.fromarray(ramps(0, 32, 48)).save(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    refine_picture(tiny_networks, tmp_path / name, tmp_path / "in.png", SETTINGS)
    assert (tmp_path / name).read_bytes() == before
    with Image.open(tmp_path / "in.png") as image:
        assert image.size == (48, 32)


def test_too_little_room_on_the_disk_is_said_before_the_work(
    tiny_networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_video(tmp_path / "in.mp4", 9)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("flashvideo.atomic_files.shutil.disk_usage", lambda path: usage)
    with pytest.raises(CommandError, match="free, and this run needs"):
        refine_video(tiny_networks, source, tmp_path / "out.mp4", SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


# Pictures


def test_a_pictures_colour_profile_goes_with_it(tiny_networks: Networks, tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # any that isn't sRGB's
    for ending in (".jpg", ".png", ".webp", ".tif"):
        source, target = tmp_path / f"in{ending}", tmp_path / f"out{ending}"
        Image.fromarray(ramps(0, 32, 48)).save(source, icc_profile=profile)
        refine_picture(tiny_networks, source, target, SETTINGS)
        with Image.open(target) as image:
            assert image.info["icc_profile"] == profile
    grey = Image.fromarray(ramps(0, 32, 48)).convert("L")
    grey.save(tmp_path / "grey.png", icc_profile=profile)
    refine_picture(tiny_networks, tmp_path / "grey.png", tmp_path / "colours.png", SETTINGS)
    with Image.open(tmp_path / "colours.png") as image:
        assert "icc_profile" not in image.info  # a grey one's means nothing to colours


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_deep_grey_keeps_its_levels(ending: str, tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 48).astype(np.uint16)[None].repeat(32, 0)
    Image.fromarray(levels).save(tmp_path / f"in{ending}")
    pixels = read_picture(tmp_path / f"in{ending}").pixels.numpy()
    assert np.array_equal((pixels * 65535).round(), np.repeat(levels[..., None], 3, axis=2))


def test_pictures_of_32_bits_are_refused(tiny_networks: Networks, tmp_path: Path) -> None:
    Image.fromarray(np.ones((32, 48), np.float32)).save(tmp_path / "in.tif")
    with pytest.raises(CommandError, match="32 bits a pixel"):
        refine_picture(tiny_networks, tmp_path / "in.tif", tmp_path / "out.tif", SETTINGS)
    assert not (tmp_path / "out.tif").exists()
