"""`refine --try`: a tenth of the picture as it is within the whole result, and what all of it will take."""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_videos import make_video, ramps, read
from torch.utils.flop_counter import FlopCounterMode

from flashvideo.commands import jobs, run_refine
from flashvideo.commands import main as command_line
from flashvideo.commands.refine import add_refine
from flashvideo.commands.terminal import CANCELLED, DAMAGED
from flashvideo.config import TEXT_TOKENS
from flashvideo.degradation import auto_strength
from flashvideo.errors import CommandError
from flashvideo.frames import PictureSize, TargetSize
from flashvideo.planner.trial import whole_run
from flashvideo.refiner import Networks, outputs
from flashvideo.refiner import run as refiner_run
from flashvideo.refiner.files import WORK_ENDING, FileOptions
from flashvideo.refiner.run import ENCODE, PHASES, RefineRun, RefineSettings
from flashvideo.refiner.trial import CUT, Crop, plan_crop, trial_path, try_file
from flashvideo.refiner.windows import frame_noise
from flashvideo.refiner.work_folder import MARKER, MemoryWork
from flashvideo.video_files import open_clip

KEEP = TargetSize("keep")
ONE_STEP = RefineSettings(KEEP, steps=1, cfg=1.0, color_match="none")
FAST = ("--steps", "1", "--device", "cpu")
MEDIA = Path(__file__).resolve().parents[1] / "data" / "media"
SMALL_CROP = Crop(48, 96, 128, 128)  # of 320x224


def refine(*arguments: str | Path) -> int:
    """Run the command; its exit code."""
    parser = argparse.ArgumentParser()
    add_refine(parser.add_subparsers())
    options = parser.parse_args(["refine", *map(str, arguments)])
    return options.run(options)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """All files below a folder, and when they were changed."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    ("size", "place", "tile", "crop"),
    [
        ((1080, 1920), (50, 50), 0, (368, 656, 336, 608)),
        ((1920, 1080), (50, 50), 0, (656, 368, 608, 336)),
        ((1080, 1920), (0, 100), 0, (736, 0, 336, 608)),
        ((1080, 1920), (100, 0), 0, (0, 1312, 336, 608)),
        ((1080, 1920), (50, 50), 768, (160, 576, 768, 768)),
        ((2160, 3840), (50, 50), 768, (704, 1312, 768, 1216)),
        ((256, 448), (50, 50), 0, (64, 160, 128, 144)),
        ((130, 448), (50, 50), 0, (0, 160, 130, 144)),  # no room for another position
        ((90, 50), (50, 50), 0, (0, 0, 90, 50)),
    ],
)
def test_the_crop_is_a_tenth_in_the_pictures_shape_on_the_networks_grid(
    size: tuple[int, int], place: tuple[float, float], tile: int, crop: tuple[int, int, int, int]
) -> None:
    planned = plan_crop(PictureSize(*size), place, tile)
    assert planned == crop
    assert planned.top % 16 == planned.left % 16 == 0
    assert planned.top + planned.height <= size[0] and planned.left + planned.width <= size[1]


def test_the_refiner_gets_the_whole_pictures_frames_noise_and_strength_at_that_place(
    tiny_networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit. The strength follows from the size of the whole."""
    runs: list[RefineRun] = []
    begin = RefineRun.run
    monkeypatch.setattr(RefineRun, "run", lambda run, deliver: runs.append(run) or begin(run, deliver))
    source = make_video(tmp_path / "in.mp4", 7, size=(112, 160))
    settings = RefineSettings(TargetSize("scale", scale=2.0), strength=None, steps=1, seed=3, window=5, overlap=0)
    trial = try_file(tiny_networks, source, tmp_path / "out.mp4", settings, FileOptions())
    [part] = runs
    whole = RefineRun(tiny_networks, open_clip(source), PictureSize(224, 320), settings, MemoryWork(ENCODE))
    assert (trial.crop, trial.size, trial.frames, trial.count) == (SMALL_CROP, (224, 320), 5, 7)
    assert part.strength == whole.strength == auto_strength(224, 320) != auto_strength(128, 128)
    assert trial.settings == replace(part.settings, size=settings.size)
    prepared, _ = next(whole._prepared([5], 0))
    assert torch.equal(part.clip.tensor, torch.stack([SMALL_CROP.of(picture) for picture in prepared]))
    noise = frame_noise((16, 28, 40), 3, 1)[:, 6:22, 12:28]
    assert torch.equal(part._noise((16, 16, 16), 3, 1), noise)


def test_the_file_shows_that_place_of_the_source_without_its_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """By Nano. The source's colours grow by 0.6 of 255 a pixel to the right, and by 0.8 downwards."""
    source = make_video(tmp_path / "in.mp4", 7, size=(224, 320), sound="aac")
    options = ("--keep-size", "--window", "5", *FAST)
    assert refine(source, tmp_path / "out.mp4", "--try", *options) == 0
    said = capsys.readouterr().out
    assert "out.try.mp4: 128x128 of 320x224 pixels (23%), from 96,48 on; 5 of 7 frames; strength 60" in said
    assert "The test took " in said and "All of it will take about " in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.try.mp4"]
    refined = read(tmp_path / "out.try.mp4")
    assert (len(refined.frames), refined.sound, refined.rate) == (5, [], Fraction(24))
    assert refined.times == [Fraction(index, 24) for index in range(5)]
    for index, frame in enumerate(refined.frames):
        expected = ramps(index, 224, 320)[48:176, 96:224].astype(float)
        assert np.abs(frame.mean((0, 1)) - expected.mean((0, 1))).max() < 2
    assert refine(source, tmp_path / "out.mp4", "--try-at", "0,100", *options, "--window", "1", "--overlap", "0") == 0
    assert "from 0,96 on" in capsys.readouterr().out
    elsewhere = read(tmp_path / "out.try.mp4").frames[0].mean((0, 1))
    assert np.abs(elsewhere - ramps(0, 224, 320)[96:, :128].mean((0, 1))).max() < 2


def test_of_a_picture_as_small_as_a_tile_the_trial_is_the_result(clip: Path, tmp_path: Path) -> None:
    options = ("--keep-size", "--sound", "none", *FAST)
    for _ in range(2):
        assert refine(clip, tmp_path / "out.mp4", "--try", *options) == 0
    assert refine(clip, tmp_path / "out.mp4", *options) == 0
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "out.try.mp4").read_bytes()


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A video of five frames of 48x32."""
    return make_video(tmp_path / "in.mp4", 5)


def test_results_and_unfinished_work_stay_as_they_are(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial doesn't finish the run, and the run doesn't take the trial for its result."""
    target, work = tmp_path / "out.mp4", tmp_path / f"out.mp4{WORK_ENDING}"
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "encode_segment", interrupted)
        assert refine(clip, target, "--keep-size", *FAST) == CANCELLED
    before = contents(tmp_path)
    assert (work / MARKER).is_file()
    assert refine(clip, target, "--keep-size", "--try", "--anew", "--force", *FAST) == 0
    after = contents(tmp_path)
    assert after.pop("out.try.mp4") and after == before
    assert refine(clip, target, "--keep-size", *FAST) == 0
    before = contents(tmp_path)
    assert refine(clip, target, "--keep-size", "--try", *FAST) == 0
    after = contents(tmp_path)
    assert after["out.mp4"] == before["out.mp4"] and after.keys() == before.keys()


def interrupted(*_args: object, **_more: object) -> None:
    """Ctrl+C."""
    raise KeyboardInterrupt


def test_nothing_is_left_of_a_trial_that_is_cancelled(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = contents(tmp_path)
    monkeypatch.setattr(outputs, "encode_segment", interrupted)
    monkeypatch.setattr(outputs, "encode_pictures", interrupted)
    for target in ("out.mp4", "new/%04d.png"):
        command = ["refine", clip, tmp_path / target, "--keep-size", "--try", *FAST]
        assert command_line.main(list(map(str, command))) == CANCELLED
        assert "Cancelled; nothing was written." in capsys.readouterr().err
        assert contents(tmp_path) == before and not (tmp_path / "new").exists()


def test_of_numbered_pictures_all_are_written_or_none(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = outputs.with_metadata, []

    def second_is_interrupted(*arguments: object) -> bytes:
        written.append(arguments)
        return interrupted() if len(written) == 2 else write(*arguments)

    (tmp_path / "shot").mkdir()
    for number in (7, 8, 9):
        Image.fromarray(ramps(number, 20, 30)).save(tmp_path / "shot" / f"{number:04}.png")
    command = (tmp_path / "shot" / "%04d.png", tmp_path / "new" / "%04d.png", "--try", "--keep-size", *FAST)
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "with_metadata", second_is_interrupted)
        with pytest.raises(KeyboardInterrupt):
            refine(*command)
    assert len(written) == 2 and not (tmp_path / "new").exists()
    assert refine(*command, "--window", "1") == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["0007.try.png"]
    assert refine(*command) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [f"{n:04}.try.png" for n in (7, 8, 9)]
    with Image.open(tmp_path / "new" / "0008.try.png") as image:
        assert image.size == (30, 20)


def test_the_estimate_follows_from_the_planners_operations(tiny_networks: Networks, tmp_path: Path) -> None:
    """The clock counts operations: so the whole run's are told from the trial's, as its seconds would be.

    5%: on a processor each convolution takes one frame more than the formulas tell; stage II's are exact.
    """
    networks = replace(tiny_networks, context=torch.randn(1, TEXT_TOKENS, 8))
    source = make_video(tmp_path / "in.mp4", 14, size=(128, 256))
    settings = replace(ONE_STEP, steps=2, cfg=7.0, window=9, overlap=4)
    with operations() as counter:
        clock = counter.get_total_flops
        trial = try_file(networks, source, tmp_path / "out.mp4", settings, FileOptions(), clock=clock)
    assert trial.total == sum(trial.seconds.values()) and trial.seconds[CUT] == 0
    with operations() as counter:
        run = RefineRun(networks, open_clip(source), PictureSize(128, 256), settings, MemoryWork(ENCODE))
        run.run(lambda _, chunks: deque(chunks, maxlen=0))
    counted = counter.get_total_flops()
    assert counted > 3 * trial.total
    assert whole_run(trial, networks).seconds == pytest.approx(counted, rel=0.05)


def operations() -> FlopCounterMode:
    """PyTorch's counter, with the attention of processors, which it doesn't know."""

    def attention(q: tuple[int, ...], k: tuple[int, ...], *_rest: object, **_more: object) -> int:
        batch, heads, queries, width = q
        return 4 * batch * heads * queries * k[2] * width

    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={operator: attention})


def test_the_estimate_scales_each_phase_by_its_own_work(tiny_networks: Networks, tmp_path: Path) -> None:
    """With times made up: frames are upscaled twice in the whole run, what is outside the phases stays."""
    source = make_video(tmp_path / "in.mp4", 1, size=(224, 320))
    trial = try_file(tiny_networks, source, tmp_path / "out.mp4", ONE_STEP, FileOptions())
    trial = replace(trial, count=10, frames=5, seconds={CUT: 3.0, **dict.fromkeys(PHASES, 0.0)}, total=4.0)
    assert whole_run(trial, tiny_networks).seconds == pytest.approx(1 + 3 * 2 * 3)  # with `measure` three times
    no_measuring = {phase: 0.0 for phase in (CUT, *PHASES) if phase != "measure"} | {CUT: 3.0}
    assert whole_run(replace(trial, seconds=no_measuring), tiny_networks).seconds == pytest.approx(1 + 3 * 2 * 2)
    trial = replace(trial, count=1, frames=1, crop=Crop(0, 0, 112, 320), seconds={CUT: 0.0, "decode": 1.0}, total=1.0)
    assert whole_run(trial, tiny_networks).seconds == pytest.approx(2, rel=0.02)  # half the picture


def test_a_still_is_tried_with_its_transparency(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pixels = ramps(0, 224, 320)
    alpha = np.zeros((224, 320), np.uint8)
    alpha[100:, 150:] = 255
    Image.fromarray(np.dstack([pixels, alpha])).save(tmp_path / "in.png")
    assert refine(tmp_path / "in.png", tmp_path / "out.png", "--try", "--keep-size", *FAST) == 0
    assert "1 of 1 frames" in capsys.readouterr().out
    with Image.open(tmp_path / "out.try.png") as image:
        refined = np.array(image)
    assert refined.shape == (128, 128, 4)
    expected = alpha[48:176, 96:224]
    inside = np.ones_like(expected, bool)
    inside[44:60], inside[:, 46:62] = False, False  # the edge, which follows the refined picture
    assert np.array_equal(refined[..., 3][inside], expected[inside])
    opaque = inside & (expected == 255)
    means = refined[opaque][:, :3].mean(0) - pixels[48:176, 96:224][opaque].mean(0)
    assert np.abs(means).max() < 2
    assert refine(tmp_path / "in.png", tmp_path / "out.jpg", "--try", "--keep-size", *FAST) == 0
    assert "transparency gets lost" in capsys.readouterr().err


def test_a_video_stays_transparent(tmp_path: Path) -> None:
    """Numbered pictures with an edge of alpha: within the crop it is the whole result's, apart from the refiner."""
    (tmp_path / "in").mkdir()
    alpha = np.tile(np.linspace(0, 255, 320).astype(np.uint8), (224, 1))
    for number in range(2):
        Image.fromarray(np.dstack([ramps(number, 224, 320), alpha])).save(tmp_path / "in" / f"{number}.png")
    command = (tmp_path / "in" / "%d.png", tmp_path / "out" / "%d.png", "--try", "--keep-size", *FAST)
    assert refine(*command) == 0
    with Image.open(tmp_path / "out" / "1.try.png") as image:
        refined = np.array(image)
    assert np.abs(refined[..., 3].astype(int) - alpha[48:176, 96:224]).max() <= 6  # of 255


@pytest.fixture
def no_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals come before the networks are loaded."""
    monkeypatch.setattr(jobs, "load_refiner", None)
    monkeypatch.setattr(refiner_run, "RefineRun", None)


@pytest.mark.parametrize(
    ("source", "target", "options", "words"),
    [
        (".", "out", ["--try"], "--try takes one video or picture: name one of those in"),
        (".", "out", ["--try", "--ray"], "one process on one device"),
        ("in.mp4", "out.mp4", ["--try-at", "50"], "--try-at takes two percentages, such as 50,50; got '50'"),
        ("in.mp4", "out.mp4", ["--try-at", "50,101"], "two percentages"),
        ("in.mp4", "out.mp4", ["--try-at", "nan,1"], "two percentages"),
        ("in.mp4", "out.png", ["--try"], "out.png should end in"),
        ("in.mp4", "nowhere/out.mp4", ["--try"], "no folder"),
        ("nowhere.mp4", "out.mp4", ["--try"], "no file"),
        ("in.try.mp4", "in.mp4", ["--try"], "is the file to be read"),
        ("in.mp4", "taken.mp4", ["--try"], "is a folder"),
    ],
)
@pytest.mark.usefixtures("no_networks")
def test_what_cannot_be_tried_is_said_first(
    source: str, target: str, options: list[str], words: str, clip: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken.try.mp4").mkdir()
    (tmp_path / "in.try.mp4").write_bytes(clip.read_bytes())
    before = contents(tmp_path)
    with pytest.raises(CommandError, match=words):
        refine(tmp_path / source, tmp_path / target, *options, *FAST)
    assert contents(tmp_path) == before


def test_several_processes_are_refused(clip: Path, tmp_path: Path) -> None:
    options = argparse.Namespace(ranks=object(), farm=None)
    with pytest.raises(CommandError, match="leave out torchrun"):
        run_refine._try(options, (50.0, 50.0))


def test_a_format_that_the_result_can_not_have_is_refused_though_the_crop_could(
    tiny_networks: Networks, tmp_path: Path
) -> None:
    """Odd sides of the whole."""
    source = make_video(tmp_path / "in.mp4", 1, size=(224, 320))
    settings = replace(ONE_STEP, size=TargetSize("exact", width=401, height=301))
    assert plan_crop(PictureSize(301, 401)).size.even
    with pytest.raises(CommandError, match="needs even sides"):
        try_file(tiny_networks, source, tmp_path / "out.mp4", settings, FileOptions(codec="av1"))
    assert not trial_path(tmp_path / "out.mp4").exists()


def test_damage_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (MEDIA / "truncated.mp4", tmp_path / "out.mp4", "--try", "--keep-size", "--window", "1", *FAST)
    assert refine(*command) == DAMAGED
    assert "53 of 100 frames can't be decoded" in capsys.readouterr().out


@pytest.fixture(autouse=True)
def _quiet_machine() -> Iterator[None]:
    """One thread, so that results are the same to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
