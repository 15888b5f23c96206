"""A file gets its name when it is complete, and nobody else's file, link, device or folder is touched."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flashvideo import atomic_files
from flashvideo.atomic_files import (
    WriteError,
    check_target,
    file_size,
    remove_abandoned,
    whole_file,
    write_problem,
    write_whole,
)

ROOT = Path(__file__).resolve().parents[2]


def put(target: Path, data: bytes = b"new", *, replace: bool = True) -> None:
    write_whole(target, lambda part: part.write_bytes(data), replace=replace)


def test_a_file_gets_its_name_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")
    with whole_file(target) as part:
        part.write_bytes(b"half")
        assert target.read_bytes() == b"old"
        assert part.parent == tmp_path
        part.write_bytes(b"whole")
    assert target.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt(), ValueError("bad")])
def test_a_failure_keeps_the_old_file_and_nothing_else(error: BaseException, tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")
    with pytest.raises(type(error)), whole_file(target) as part:
        part.write_bytes(b"half")
        raise error
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["out.bin.part", "out.part.bin", "part-out.bin", ".out.bin.part"])
def test_other_half_files_stay(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"a stranger's")
    put(tmp_path / "out.bin")
    assert (tmp_path / name).read_bytes() == b"a stranger's"


def test_two_writers_at_a_time_never_share_a_half_file(tmp_path: Path) -> None:
    target, size = tmp_path / "out.bin", 200_000
    threads = [threading.Thread(target=put, args=(target, bytes([value]) * size)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    data = target.read_bytes()
    assert len(data) == size
    assert len(set(data)) == 1
    assert list(tmp_path.iterdir()) == [target]


def test_a_name_that_is_taken_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even through a link: what would get the half file's name is made exclusively."""
    monkeypatch.setattr(atomic_files.secrets, "token_hex", lambda _: "0" * 16)
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / f"out.bin.{'0' * 16}.part").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError):
        put(tmp_path / "out.bin")
    assert (tmp_path / "precious").read_bytes() == b"precious"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX's kinds of files")
@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe", "socket", "device"])
def test_only_regular_files_are_replaced(kind: str, tmp_path: Path) -> None:
    target, other = tmp_path / "out.bin", tmp_path / "other"
    other.write_bytes(b"other")
    held = None
    if kind == "link":
        target.symlink_to(other)
    elif kind == "dangling link":
        target.symlink_to(tmp_path / "nowhere")
    elif kind == "folder":
        target.mkdir()
    elif kind == "pipe":
        os.mkfifo(target)
    elif kind == "socket":
        held = socket.socket(socket.AF_UNIX)
        held.bind(str(target))
    else:
        target = Path(os.devnull)
    before = target.lstat()
    for refuse in (put, lambda path: check_target(path, force=True)):
        with pytest.raises(WriteError, match=rf"{target.name} is a {kind.split()[-1]}"):
            refuse(target)
    assert target.lstat().st_ino == before.st_ino
    assert target.lstat().st_mode == before.st_mode
    assert other.read_bytes() == b"other"
    assert not (tmp_path / "nowhere").exists()
    if held is not None:
        held.close()


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_came_in_the_meantime_stays(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`links`: whether the disk has hard links."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no hard links")))
    target = tmp_path / "out.bin"
    with pytest.raises(WriteError, match="in the meantime"), whole_file(target, replace=False) as part:
        part.write_bytes(b"mine")
        target.write_bytes(b"theirs")
    assert target.read_bytes() == b"theirs"
    target.unlink()
    put(target, b"mine", replace=False)
    assert target.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX's")
def test_a_kill_blocks_no_later_run(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    code = (
        "import sys, os, signal; from pathlib import Path; from flashvideo.atomic_files import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as part:\n"
        "    part.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    child = subprocess.run([sys.executable, "-c", code, str(target)], cwd=ROOT, check=False)
    assert child.returncode == -signal.SIGKILL
    assert not target.exists()
    check_target(target)
    put(target)
    assert target.read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 2
    theirs = tmp_path / f"other.bin.{'0' * 16}.part"
    theirs.write_bytes(b"of another target")
    with whole_file(target) as part:
        remove_abandoned(target)
        assert set(tmp_path.iterdir()) == {target, part, theirs}  # what is being written stays
    remove_abandoned(target)
    assert set(tmp_path.iterdir()) == {target, theirs}


def test_the_longest_name_that_a_disk_allows(tmp_path: Path) -> None:
    target = tmp_path / ("ä" * 125 + ".bin")  # 254 bytes
    put(target)
    assert target.read_bytes() == b"new"


def test_what_a_target_can_be(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"")
    check_target(tmp_path / "new")
    check_target(tmp_path / "there", force=True)
    with pytest.raises(WriteError, match="exists already"):
        check_target(tmp_path / "there")
    with pytest.raises(WriteError, match="There is no folder"):
        check_target(tmp_path / "gone" / "new")
    os.link(tmp_path / "there", tmp_path / "same")
    with pytest.raises(WriteError, match="is the file to be read"):
        check_target(tmp_path / "same", force=True, source=tmp_path / "there")


def test_sizes_and_reasons_in_words() -> None:
    assert [file_size(size) for size in (12, 4_000, 3.4e6, 2.25e9)] == ["12 bytes", "4 kB", "3 MB", "2.2 GB"]
    assert write_problem(OSError(28, "No space left on device")) == "the disk is full"
    wrapped = RuntimeError("I/O error: No space left on device (os error 28)")
    assert write_problem(wrapped) == "the disk is full"
    assert write_problem(ValueError("no system's error")) is None
