"""`torchrun ... -m flashvideo refine|generate`: real processes, one voice, whole files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")
from forked import Pipe, fork
from on_ranks import Run, free_port
from patience import finished, joined
from small_videos import make_video, read

from flashvideo.commands.main import main
from flashvideo.errors import CommandError
from flashvideo.parallel.launch import Meeting, own_device

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600  # seconds; far beyond what it takes, even on a busy machine
REFINE = ("--scale", "2", "--steps", "2", "--device", "cpu", "--crf", "0", "--prompt", "a red circle")


def torchrun(folder: Path, size: int, *words: str | Path) -> str:
    """Run a command as users start it; returns what it wrote to standard output."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={size}", f"--master-port={free_port()}"]
    command = [sys.executable, *launcher, "-m", "flashvideo", *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        output, errors = finished(process)
    assert process.returncode == 0, errors
    return output


GENERATE = ("--frames", "5", "--draft-size", "64x48", "--draft-steps", "3", *REFINE[:-2])


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one process generates."""
    folder = tmp_path_factory.mktemp("one")
    assert main(["generate", "a red circle", str(folder / "out.mkv"), *GENERATE]) == 0
    return folder


@pytest.mark.slow
def test_generate_on_two_processes_makes_the_files_of_one(one_process: Path, tmp_path: Path) -> None:
    words = ("generate", "a red circle", tmp_path / "out.mkv", *GENERATE)
    output = torchrun(tmp_path, 2, *words, "--shard-weights")
    assert output.count("the draft") == output.count("refined") == 1
    for name in ("out.mkv", "out.mkv.draft.mkv"):
        mine, theirs = read(tmp_path / name), read(one_process / name)
        assert mine.times == theirs.times
        off = np.abs(np.subtract(mine.frames, theirs.frames, dtype=np.int16))
        # Latents rest in half precision, where rounding may turn either way.
        assert off.max() <= 8 and (off > 2).mean() < 0.001
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mkv", "out.mkv.draft.mkv"]


@pytest.mark.slow
def test_a_killed_process_ends_all_with_one_sentence_and_the_run_resumes(tmp_path: Path) -> None:
    source, target = make_video(tmp_path / "in.mp4", 29), tmp_path / "out.mkv"
    words = ("refine", source, target, *REFINE, "--window", "9", "--overlap", "4")
    run = Run(tmp_path, 3, *words)
    run.wait_for(lambda text: "refine:" in text)
    run.processes[2].kill()
    assert run.wait() == [1, 1, -signal.SIGKILL]
    assert run.sentences()[-1] == "The run has ended because one of its processes did. The same command resumes it."
    assert "".join(run.sentences()).count("The run has ended") == 1 and "Traceback" not in run.error.read_text()
    assert not target.exists() and not list(tmp_path.rglob("*.part"))
    run = Run(tmp_path, 3, *words)
    assert run.wait() == [0, 0, 0]
    assert "encode:" not in run.error.read_text()  # that was done
    assert len(read(target).frames) == 29


@pytest.mark.slow
def test_a_mistake_is_reported_once_before_the_work(tmp_path: Path) -> None:
    source, target = make_video(tmp_path / "in.mp4", 5), tmp_path / "out.mkv"
    target.write_bytes(b"mine")
    for words, sentence in (
        (("refine", source, target, *REFINE), "out.mkv"),
        (("models",), "Only refine, generate and train run on several processes"),
    ):
        run = Run(tmp_path, 2, *words)
        assert 1 in run.wait()
        assert len(run.sentences()) == 1 and sentence in run.sentences()[0], run.error.read_text()
    assert target.read_bytes() == b"mine"


@pytest.mark.parametrize("has_reported", [True, False])
def test_one_reports_even_when_rank_0_has_ended(has_reported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other asks long after rank 0, which keeps the store, has left; or rank 0 was killed in silence."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    here, there = Pipe()
    rank_0 = fork(report_and_stay, {**place, "RANK": "0"}, has_reported, there)
    for name, value in {**place, "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    meeting = Meeting()
    assert here.recv() is True
    assert meeting.has_heard(PATIENCE if has_reported else 0.0) == has_reported
    rank_0.kill()
    assert joined(rank_0) == -signal.SIGKILL
    assert meeting.may_report() != has_reported


def report_and_stay(place: dict[str, str], reports: bool, other: Connection) -> None:
    """Rank 0: say whether it may report, or report nothing, until it is killed."""
    os.environ.update(place)
    meeting = Meeting()
    other.send(meeting.may_report() if reports else True)
    other.poll(None)


# While Python ends, an object waits until rank 0 is gone, and then long enough to notice it.
ENDS_SLOWLY = """
import os, sys, time
from flashvideo.parallel.launch import Meeting
class Last:
    read, sleep = os.read, time.sleep
    def __del__(self):
        self.read(0, 1), self.sleep(1)
meeting = Meeting()
sys.modules["last"] = Last()
print("ends", flush=True)
"""


def test_a_process_ends_well_while_rank_0_leaves() -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    here, there = Pipe()
    rank_0 = fork(report_and_stay, {**place, "RANK": "0"}, False, there)
    env = {**os.environ, **place, "RANK": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", ENDS_SLOWLY], env=env, **pipes) as rank_1:
        assert rank_1.stdout.readline() == "ends\n"
        assert here.recv() is True
        rank_0.kill()
        joined(rank_0)
        rank_1.communicate("x", timeout=PATIENCE)
    assert rank_1.returncode == 0


@pytest.mark.parametrize(("name", "cards", "place", "device"), [
    (None, 0, "1", "cpu"), ("cpu", 4, "1", "cpu"), (None, 4, "1", "cuda:1"), ("cuda", 2, "0", "cuda:0"),
])  # fmt: skip
def test_each_process_takes_a_card_of_its_own(
    name: str | None, cards: int, place: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: cards > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: cards)
    monkeypatch.setenv("LOCAL_RANK", place)
    assert own_device(name) == device


@pytest.mark.parametrize(("name", "cards", "words"), [
    ("cuda:1", 4, "take a card each"), ("mps", 0, "take a card each"), (None, 2, "--nproc-per-node 2"),
])  # fmt: skip
def test_what_processes_cannot_share_is_refused(
    name: str | None, cards: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: cards > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: cards)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(CommandError, match=words):
        own_device(name)


def test_shared_weights_need_several_processes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = make_video(tmp_path / "in.mp4", 1)
    assert main(["refine", str(source), str(tmp_path / "out.mkv"), "--shard-weights"]) == 1
    assert capsys.readouterr().err.count("start the command with torchrun") == 1
