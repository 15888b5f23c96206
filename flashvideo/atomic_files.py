"""Atomic writes, folder locks and checks of free space.

The only module that writes a final name. A file is written under a new name in the target's folder, which is created
exclusively, so that no other file is overwritten, and gets the target's name when it is complete and on the disk. A
target is a regular file or doesn't exist: links, devices, pipes and folders are refused. Whoever writes a file keeps it
locked, where the system can, so that what a killed program has left is known from what another is writing.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout  # torch requires it

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

from .errors import CommandError
from .progress import Progress

LOCK = "in-use.lock"
PART = ".part"  # ending of what is being written
SPARE_SPACE = 64 * 2**20  # bytes that every large file leaves free
HASH_BLOCK = 8 * 2**20
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # of a disk that has none
_NO_HARD_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES}
_LONGEST_NAME = 200  # bytes of the target's name in a part's: file systems allow 255 in all
_OLD = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_NEW = _OLD | os.O_CREAT | os.O_EXCL
_KINDS = (
    (stat.S_ISLNK, "a link: give the name of the file itself"),
    (stat.S_ISDIR, "a folder: give a file name"),
    (stat.S_ISCHR, "a device, not a file"),
    (stat.S_ISBLK, "a device, not a file"),
    (stat.S_ISFIFO, "a pipe, not a file"),
    (stat.S_ISSOCK, "a socket, not a file"),
)
log = logging.getLogger(__name__)


class WriteError(CommandError):
    """A file can't be written; the message says why."""


@contextmanager
def whole_file(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield the path of an empty file beside `target` to write to; it is renamed to `target` at the end.

    It is removed if the context ends with an error. Raises OSError, and WriteError if `target` is not a regular file,
    now or at the end, or with `replace` false if it exists at the end; then it stays.
    """
    check_regular(target)
    part, held = _new_part(target)
    try:
        yield part
        place_whole(part, target, replace=replace)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        if held is not None:
            os.close(held)


def write_whole(target: Path, write: Callable[[Path], object], *, replace: bool = True) -> None:
    """Write a file with `write` that is renamed to `target` at the end; see `whole_file`."""
    with whole_file(target, replace=replace) as part:
        write(part)


def place_whole(part: Path, target: Path, *, replace: bool = True) -> None:
    """Rename a complete file on the same disk to `target`, as `whole_file` does at its end."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    check_regular(target)
    if replace:
        part.replace(target)
    else:
        _place_new(part, target)
    _sync_folder(target.parent)


def remove_abandoned(target: Path) -> None:
    """Delete unfinished files that a killed program has left beside `target`; those that are being written stay.

    Does nothing where the system or the disk has no locks to know them by.
    """
    pattern = re.compile(re.escape(_part_stem(target)) + r"\.[0-9a-f]{16}" + re.escape(PART))
    with suppress(OSError):
        for part in [each for each in target.parent.iterdir() if pattern.fullmatch(each.name)]:
            with suppress(OSError):
                _remove_unless_written(part)


def _remove_unless_written(part: Path) -> None:
    if not stat.S_ISREG(part.lstat().st_mode):
        return
    descriptor = os.open(part, _OLD)
    try:
        if _lock(descriptor):
            part.unlink()
    finally:
        os.close(descriptor)


def _new_part(target: Path) -> tuple[Path, int | None]:
    """A new empty file beside `target`, and a descriptor that keeps it locked until closed; None without locks."""
    while True:
        part = target.with_name(f"{_part_stem(target)}.{secrets.token_hex(8)}{PART}")
        try:
            descriptor = os.open(part, _NEW, 0o666)
        except OSError as error:
            error.filename = str(target)  # the name that the user knows
            raise
        if fcntl is None:  # on Windows nobody could rename a file that is open
            os.close(descriptor)
            return part, None
        _lock(descriptor, wait=True)
        if part.exists():  # until it was locked, another program could take it for abandoned
            return part, descriptor
        os.close(descriptor)


def _part_stem(target: Path) -> str:
    return os.fsencode(target.name)[:_LONGEST_NAME].decode(errors="ignore")


def _lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file until it is closed; whether that worked."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _place_new(part: Path, target: Path) -> None:
    try:
        os.link(part, target)  # unlike a rename, it never replaces
    except FileExistsError:
        raise WriteError(f"Another program has made {target} in the meantime.") from None
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if os.path.lexists(target):
            raise WriteError(f"Another program has made {target} in the meantime.") from None
        part.rename(target)
    else:
        part.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a new name survive a power failure, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_regular(target: Path) -> None:
    """Raise WriteError if `target` exists and is not a regular file."""
    try:
        mode = target.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    for is_kind, kind in _KINDS:
        if is_kind(mode):
            raise WriteError(f"{target} is {kind}.")


def check_target(target: Path, *, force: bool = False, source: Path | None = None) -> None:
    """Raise WriteError unless a file can be written there; `force` allows to replace one, but never `source`."""
    if not target.parent.is_dir():
        raise WriteError(f"There is no folder {target.parent} to write to.")
    if not os.access(target.parent, os.W_OK):
        raise WriteError(f"The folder {target.parent} can't be written to.")
    if source is not None and target.exists() and target.samefile(source):
        raise WriteError(f"{target} is the file to be read: give the new file another name.")
    check_regular(target)
    if target.exists() and not force:
        raise WriteError(f"{target} exists already.", hint="--force replaces it.")


def check_space(folder: Path, needed: int, what: str, hint: str = "") -> None:
    """Raise WriteError unless the disk of an existing folder has room for `needed` bytes more; `what` needs them."""
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_SPACE:
        raise WriteError(
            f"{folder} has {file_size(free)} free, and {what} needs {file_size(needed + SPARE_SPACE)} there.", hint
        )


def file_size(nbytes: float) -> str:
    """A file's size as text: units of 1000, as disks and web pages count."""
    for unit, size, digits in (("GB", 1e9, 1), ("MB", 1e6, 0), ("kB", 1e3, 0)):
        if nbytes >= size:
            return f"{nbytes / size:.{digits}f} {unit}"
    return f"{nbytes:.0f} bytes"


def write_problem(error: BaseException | None) -> str | None:
    """The operating system's reason under what PyTorch and safetensors raise on top of it; None if there is none."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (match := re.search(r"os error (\d+)", str(error))):  # of safetensors
            number = int(match[1])
        if number is not None:
            return "the disk is full" if number in NO_SPACE else os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


def sha256(path: Path, progress: Progress) -> str:
    """SHA-256 of a file, in hexadecimal; progress in bytes."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
            done += len(block)
            progress(done, total)
    return digest.hexdigest()


class InUseError(CommandError):
    """Another program uses the folder."""


def lock_folder(path: Path) -> FileLock:
    """Lock an existing folder until the lock's `release()`, or the end of the program. Raises InUseError.

    Where the disk has no locks, as some network drives, a warning is logged and the folder isn't locked.
    """
    lock = FileLock(path / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InUseError(f"{path} is in use: another program is at work there.") from error
    except (OSError, NotImplementedError) as error:  # the latter from versions of filelock without a fallback
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        log.warning("%s can't be locked (%s): don't start a second program that works there.", path, error)
    return lock


@contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Lock an existing folder as `lock_folder` does, as long as the context lasts."""
    lock = lock_folder(path)
    try:
        yield
    finally:
        lock.release()
