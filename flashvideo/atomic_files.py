"""Files that are there as a whole or not at all, and folders that one program holds at a time."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout  # torch requires it

from .errors import CommandError

LOCK = "in-use.lock"
HASH_BLOCK = 8 * 2**20
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # what a disk says that knows none
log = logging.getLogger(__name__)

# Called with a phase ("checksum", "convert"), the bytes done and all bytes.
Progress = Callable[[str, int, int], None]


def write_whole(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file beside `target`, which takes its place at the end and not before."""
    part = target.with_name(f"{target.stem}.part{target.suffix}")
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def sha256(path: Path, progress: Progress) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
            done += len(block)
            progress("checksum", done, total)
    return digest.hexdigest()


class InUseError(CommandError):
    """Another program is at work in the folder."""


def lock_folder(path: Path) -> FileLock:
    """Hold an existing folder until the lock's `release()`, or the end of the program. Raises InUseError.

    Where the disk knows no locks, as some network drives, a warning is logged and the folder isn't held.
    """
    lock = FileLock(path / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InUseError(f"{path} is in use: another program is at work there.") from error
    except (OSError, NotImplementedError) as error:  # the latter from filelock before its own way out
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        log.warning("%s can't be locked (%s): don't start a second program that works there.", path, error)
    return lock


@contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Hold an existing folder as `lock_folder` does, as long as the context lasts."""
    lock = lock_folder(path)
    try:
        yield
    finally:
        lock.release()
