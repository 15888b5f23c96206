"""`python -m flashvideo refine FOLDER OUT --ray`: a real cluster, workers that are killed, a head that is replaced."""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

pytest.importorskip("av")
from forked import fork
from patience import joined
from ray_head import PATIENCE, Head, started_head
from small_videos import make_video

from flashvideo.arguments import Parser
from flashvideo.commands.main import main
from flashvideo.commands.on_workers import farm_options
from flashvideo.commands.options import add_farm_options
from flashvideo.commands.refine import add_refine
from flashvideo.commands.terminal import CANCELLED, REFUSED
from flashvideo.errors import CommandError
from flashvideo.parallel.farm import FarmOptions, shared_out

ROOT = Path(__file__).resolve().parents[2]
FAST = ("--scale", "2", "--steps", "1", "--device", "cpu")
DAMAGED = "damaged.mp4"


def refine(*arguments: str | Path) -> int:
    """Run the command in this process; its exit code."""
    parser = argparse.ArgumentParser()
    add_refine(parser.add_subparsers())
    options = parser.parse_args(["refine", *map(str, arguments)])
    return options.run(options)


def folder_of_clips(folder: Path, count: int) -> Path:
    """Videos of 5 to 13 frames of 32x32."""
    folder.mkdir()
    for index in range(count):
        make_video(folder / f"clip{index:02}.mp4", 5 + 4 * (index % 3), size=(32, 32))
    return folder


def results_of_one_process(target: Path, *words: str | Path) -> dict[str, bytes]:
    """What the same command makes without Ray, on one thread as its workers here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([str(word) for word in words]) == 0
    finally:
        torch.set_num_threads(threads)
    return contents(target)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Command:
    """The command line in a process of its own."""

    def __init__(self, folder: Path, *words: str | Path) -> None:
        self.output, self.error = folder / "stdout.txt", folder / "stderr.txt"
        with self.output.open("wb") as output, self.error.open("wb") as error:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flashvideo", *map(str, words)],
                stdout=output, stderr=error, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                # Tests that run in a shell's background ignore Ctrl+C, and so would this.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), start_new_session=True,
            )  # fmt: skip

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(PATIENCE)

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds; the command must not end before."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.error.read_text()
            assert time.monotonic() < end, self.error.read_text()
            time.sleep(0.05)

    def refined(self) -> list[str]:
        """Names of the results that were reported."""
        return [Path(line.partition(": refined")[0]).name for line in self.output.read_text().splitlines()]


@pytest.fixture(scope="module")
def head(request: pytest.FixtureRequest) -> Iterator[Head]:
    yield from started_head(request.config.getoption("--farm-workers"))


def kill_one(head: Head, draw: random.Random) -> bool:
    """Kill a worker that is at work; whether there was one."""
    try:
        draw.choice(head.workers()).kill()
    except (IndexError, psutil.NoSuchProcess):
        return False
    return True


def workers_at(head: Head, clip: str) -> list[psutil.Process]:
    """The workers that hold a file of this clip open."""
    found = []
    for worker in head.workers(""):
        with suppress(psutil.Error):
            found += [worker] if any(clip in file.path for file in worker.open_files()) else []
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kills processes as Linux names them")
def test_every_clip_is_done_once_though_workers_and_the_head_are_killed(
    head: Head, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    count, kills, workers = (request.config.getoption(f"--farm-{name}") for name in ("clips", "kills", "workers"))
    source, target = folder_of_clips(tmp_path / "in", count), tmp_path / "out"
    expected = results_of_one_process(tmp_path / "alone", "refine", source, tmp_path / "alone", *FAST)
    (source / DAMAGED).write_bytes((source / "clip00.mp4").read_bytes()[:200])
    run = Command(tmp_path, "refine", source, target, *FAST, "--ray", head.address, "--workers", workers)
    draw = random.Random(count)
    for number in range(kills):
        run.wait_for(lambda number=number: len(run.refined()) >= number * (count - workers) // kills and head.workers())
        time.sleep(draw.uniform(0, 1))
        run.wait_for(lambda: kill_one(head, draw))
    run.wait_for(lambda: len(run.refined()) >= count // 2)
    head.kill()
    head.start()
    assert run.wait() == REFUSED
    told = run.error.read_text()
    assert contents(target) == expected
    assert sorted(set(run.refined())) == sorted(expected)
    assert f"The head of the Ray cluster {head.address} has ended." in told
    assert told.rstrip().splitlines()[-2] == "These clips failed:"
    assert told.rstrip().splitlines()[-1].startswith(f"  {DAMAGED}: ")
    for word in ("raylet", "Traceback", "WARNING"):
        assert word not in told


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kills processes as Linux names them")
def test_workers_without_a_clip_evaluate_windows_of_a_long_one(head: Head, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    make_video(source / "long.mp4", 49, size=(32, 32))
    make_video(source / "short.mp4", 5, size=(32, 32))
    # So many evaluations that the clip outlasts the half second in which a worker is found free.
    words = ["--keep-size", "--steps", "16", "--device", "cpu", "--window", "9", "--overlap", "4"]
    expected = results_of_one_process(tmp_path / "alone", "refine", source, tmp_path / "alone", *words)
    words += ["--ray", head.address, "--workers", "2"]

    target = tmp_path / "one" / "long.mp4"
    target.parent.mkdir()
    run = Command(tmp_path, "refine", source / "long.mp4", target, *words)
    helpers: list[psutil.Process] = []
    run.wait_for(lambda: helpers.extend(head.workers(".assist")) or helpers)
    (owner,) = (each for each in head.workers("") if each not in helpers)
    helpers[0].kill()
    run.wait_for(lambda: "A worker that helped has ended" in run.error.read_text())
    owner.kill()
    assert run.wait() == 0, run.error.read_text()
    assert "its worker has ended; a new one resumes it" in run.error.read_text()
    assert contents(target.parent) == {"long.mp4": expected["long.mp4"]}

    run = Command(tmp_path, "refine", source, tmp_path / "both", *words)
    owners: list[psutil.Process] = []
    run.wait_for(lambda: owners.extend(workers_at(head, "long.mp4")) or owners)
    owners[0].suspend()  # the other one is free before it has done its windows, however late it began
    run.wait_for(lambda: "short.mp4" in run.refined())
    owners[0].resume()
    run.wait_for(lambda: head.workers(".assist"))
    assert run.wait() == 0, run.error.read_text()
    assert contents(tmp_path / "both") == expected


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="starts a cluster as Linux does")
def test_the_prompts_of_a_file_are_drafted_and_refined_by_workers(head: Head, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text('a red circle\n{"prompt": "a blue square", "seed": 7}\n')
    words = ["--prompts", tmp_path / "prompts.txt", "--draft-size", "32x32", "--frames", "1", "--draft-steps", "2"]
    words += [*FAST, "--tokenizer", tokenizer]
    run = Command(tmp_path, "generate", tmp_path / "many", *words, "--ray", head.address, "--workers", "2")
    assert run.wait() == 0, run.error.read_text()
    made = contents(tmp_path / "many")
    expected = results_of_one_process(tmp_path / "alone", "generate", tmp_path / "alone", *words)
    assert sorted(made) == [f"{number}.mp4{ending}" for number in ("0001", "0002") for ending in ("", ".draft.mkv")]
    for name in ("0001.mp4", "0002.mp4"):
        assert made[name] == expected[name]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="lists processes as Linux names them")
def test_a_cluster_of_the_run_ends_with_ctrl_c_and_leaves_what_the_next_run_resumes(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    source, target = folder_of_clips(tmp_path / "in", 3), tmp_path / "out"
    run = Command(tmp_path, "refine", source, target, *FAST, "--ray", "--workers", "2")
    run.wait_for(lambda: target.is_dir() and list(target.glob("*.unfinished/refined/*")))
    family = psutil.Process(run.process.pid).children(recursive=True)
    clusters = {each for each in map(cluster_folder, family) if each is not None}
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does: all get it
    assert run.wait() == CANCELLED
    assert run.error.read_text().endswith("Cancelled. The same command resumes the run.\n")
    assert not psutil.wait_procs(family, timeout=PATIENCE)[1]
    assert clusters
    assert not any(map(os.path.exists, clusters))
    assert not list(target.glob("*.part"))
    made = results_of_one_process(target, "refine", source, target, *FAST)
    assert made.keys() == {"clip00.mp4", "clip01.mp4", "clip02.mp4"}


def cluster_folder(process: psutil.Process) -> str | None:
    """The folder of the cluster that a process belongs to."""
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return None
    found = re.search(r"[^ =]*/fv-ray-[^/ ]+", words)
    return found[0] if found else None


def test_without_the_option_ray_is_not_imported(tmp_path: Path) -> None:
    folder_of_clips(tmp_path / "in", 1)
    words = ["refine", str(tmp_path / "in"), str(tmp_path / "out"), "--keep-size", *FAST[2:]]
    assert joined(fork(run_without_ray, words)) == 0


def run_without_ray(words: list[str]) -> None:
    """A command and the help in a process that hasn't imported Ray for something else."""
    assert main(words) == 0
    with pytest.raises(SystemExit):
        main(["--help"])
    assert not [name for name in sys.modules if name.partition(".")[0] == "ray"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ray"], r"^A Ray cluster needs the package ray: pip install 'comfyui-flashvideo\[ray\]'\.$"),
        (["--workers", "2"], "^--workers goes with --ray"),
        (["--ray", "--device", "cuda:1"], "each worker takes a card"),
        (["--ray", "--crf", "99"], "--crf must be"),
    ],
)
def test_what_cannot_be_done_is_said_before_ray_is_needed(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it weren't installed
    folder_of_clips(tmp_path / "in", 1)
    with pytest.raises(CommandError, match=words):
        refine(tmp_path / "in", tmp_path / "out", *FAST[:4], *options)
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_is_not_there_and_a_folder_without_videos_are_told_at_once(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    folder_of_clips(tmp_path / "in", 1)
    (tmp_path / "empty").mkdir()
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(CommandError, match=f"^No Ray cluster answers at {address}: "):
            refine(tmp_path / "in", tmp_path / "out", *FAST, "--ray", address)
    with pytest.raises(CommandError, match="holds no videos"):
        refine(tmp_path / "empty", tmp_path / "out", *FAST, "--ray")
    with pytest.raises(CommandError, match="a picture is refined in one piece"):
        refine(tmp_path / "in" / "still.png", tmp_path / "out.png", *FAST, "--ray")
    assert not (tmp_path / "out").exists()


def test_the_address_is_one(capsys: pytest.CaptureFixture) -> None:
    parser = Parser()
    add_farm_options(parser.add_argument_group())
    parser.add_argument("--device")
    with pytest.raises(SystemExit):
        parser.parse_args(["--ray", "clips"])
    assert "takes the address of a cluster's head, such as 10.0.0.1:6379" in capsys.readouterr().err
    assert farm_options(parser.parse_args([])) is None
    assert farm_options(parser.parse_args(["--ray", "head:6379"])) == FarmOptions("head:6379", None, cards=True)
    assert farm_options(parser.parse_args(["--ray", "--workers", "3", "--device", "cpu"])) == FarmOptions(
        None, 3, cards=False
    )


@pytest.mark.parametrize(
    ("nodes", "options", "count", "needs"),
    [
        ([{"CPU": 2}], (None, True), 1, {"num_cpus": 2}),
        ([{"CPU": 16}], (None, True), 4, {"num_cpus": 4}),
        ([{"CPU": 2}], (2, True), 2, {"num_cpus": 1}),
        ([{"CPU": 8}, {"CPU": 16}], (4, True), 4, {"num_cpus": 5}),  # 1 and 3 of them
        ([{"CPU": 64, "GPU": 8}], (None, True), 8, {"num_gpus": 1, "num_cpus": 8}),
        ([{"CPU": 64, "GPU": 8}, {"CPU": 8, "GPU": 2}, {"CPU": 96}], (None, True), 10, {"num_gpus": 1, "num_cpus": 4}),
        ([{"CPU": 64, "GPU": 8}], (3, True), 3, {"num_gpus": 1, "num_cpus": 8}),
        ([{"CPU": 8, "GPU": 1}], (None, False), 2, {"num_cpus": 4}),
    ],
)
def test_a_worker_for_each_card_or_for_so_many_cores(
    nodes: list[dict[str, float]], options: tuple[int | None, bool], count: int, needs: dict[str, int]
) -> None:
    workers, cards = options
    assert shared_out(nodes, FarmOptions(None, workers, cards)) == (count, needs)


def test_more_workers_than_there_is_room_for_are_refused() -> None:
    with pytest.raises(CommandError, match="--workers 9 is too many: the cluster has 8 cards"):
        shared_out([{"CPU": 64, "GPU": 8}], FarmOptions(None, 9, cards=True))
    with pytest.raises(CommandError, match="--workers 3 is too many: the cluster has 2 cores"):
        shared_out([{"CPU": 2}], FarmOptions(None, 3, cards=True))
    with pytest.raises(CommandError, match="no machine to compute on"):
        shared_out([{"CPU": 0}], FarmOptions(None, None, cards=True))
