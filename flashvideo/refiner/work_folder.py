"""What a long run stores beside its result, so that it can be interrupted at any time and resumed later.

Every file is written whole or not at all. A state (the progress, and the tensors that resuming needs) takes effect
when state.json names it; until then the previous state counts. A lock keeps a second program out of the folder; it ends
with its program, killed or not. A folder without the marker file isn't ours: it is neither used nor emptied. In our own
folders only files that a run writes are deleted.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..atomic_files import LOCK, PART, SPARE_SPACE, InUseError, lock_folder, write_problem, write_whole
from ..errors import CommandError

MARKER = "flashvideo-unfinished-run.txt"
SETTINGS = "settings.json"
STATE = "state.json"
RESULT = "result.json"  # identifies the result, written just before the result gets its name
_MARKER_TEXT = "An unfinished run of FlashVideo. The same command resumes it; delete the folder to drop it.\n"
SAVE_SHARE = 20  # saving a state takes at most about 1/20 of the time
_SECONDS_A_BYTE = 2e-9  # of writing, before it was measured

_FOLDERS = re.compile(r"snapshot-\d+|encoded|refined|statistics|segments")  # names that a run uses
_PARTS = re.compile(r".+\.[0-9a-f]{16}\.part")  # names that `atomic_files` gives
_ELSEWHERE, _ANEW = "--work DIR chooses another folder.", "--anew starts over."

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class WorkProgress:
    """Progress of a run: `done` steps of a phase, and the tensors that the next step needs."""

    phase: str
    done: int
    tensors: Tensors


@dataclass
class MemoryWork:
    """Stores a run's tensors in memory, until the run ends."""

    start: str
    _kept: dict[tuple[str, int], Tensors] = field(default_factory=dict)

    def progress(self) -> WorkProgress:
        """A run in memory always begins at its start."""
        return WorkProgress(self.start, 0, {})

    def save(self, phase: str, done: int, tensors: Callable[[], Tensors], *, always: bool = False) -> bool:
        """Does nothing: memory is always up to date."""
        return True

    def put(self, kind: str, index: int, tensors: Tensors) -> None:
        """Store tensors by kind and number."""
        self._kept[kind, index] = dict(tensors)

    def get(self, kind: str, index: int) -> Tensors:
        """Return stored tensors."""
        return self._kept[kind, index]

    def drop(self, kind: str, index: int) -> None:
        """Delete stored tensors, if any."""
        self._kept.pop((kind, index), None)


class WorkFolder:
    """The same in a folder: survives interruptions, kills and crashes."""

    def __init__(self, path: Path, settings: Mapping[str, Any], start: str, *, anew: bool = False) -> None:
        """Open or create it. `settings` (JSON) say what the run is; `start` is its first phase.

        Raises InUseError if another program works there, and CommandError if it is not a work folder, can't be written,
        is damaged, or holds a run with other settings while `anew` (start over) is not set. Call `close` or `remove` at
        the end.
        """
        self.path, self.start = path, start
        with _explained(path):
            _claim(path)
            self._lock = lock_folder(path)
        try:
            with _explained(path):
                self._open(json.loads(json.dumps(settings)), anew)
        except BaseException:
            self.close()
            raise

    def _open(self, settings: Mapping[str, Any], anew: bool) -> None:
        path = self.path
        if anew:
            _empty(path)
        self.fresh = not (path / SETTINGS).is_file()  # there was no run to resume
        if not self.fresh:
            _check_same(path, settings)
        else:
            # A program that has just finished may have deleted the marker.
            write_whole(path / MARKER, lambda part: part.write_text(_MARKER_TEXT))
            write_whole(path / SETTINGS, lambda part: part.write_text(json.dumps(settings, indent=1)))
        self._saved = time.monotonic()
        self._cost: dict[str, float] = {}  # seconds that saving took, by phase
        self._snapshot = -1
        if (path / STATE).is_file():
            self._snapshot = self._state()["snapshot"]
        self._tidy()

    def progress(self) -> WorkProgress:
        """The last saved progress."""
        if self._snapshot < 0:
            return WorkProgress(self.start, 0, {})
        state = self._state()
        return WorkProgress(state["phase"], state["done"], _Snapshot(self._folder(), state["names"]))

    def save(self, phase: str, done: int, tensors: Callable[[], Tensors], *, always: bool = False) -> bool:
        """Save the progress; returns whether it was saved.

        Unless `always` is set, it is skipped where it would take too much time or disk space.
        """
        kept = tensors()
        if not always and not self.is_due(phase, sum(tensor.nbytes for tensor in kept.values())):
            return False
        self.write(phase, done, kept)
        return True

    def is_due(self, phase: str, size: int) -> bool:
        """Whether a state of `size` bytes should be saved now: not too soon after the last, and if there is room."""
        cost = self._cost.get(phase, size * _SECONDS_A_BYTE)
        soon = time.monotonic() - self._saved < SAVE_SHARE * cost
        return not soon and shutil.disk_usage(self.path).free >= size + SPARE_SPACE

    def write(self, phase: str, done: int, kept: Tensors) -> None:
        """Save the progress."""
        begin = time.monotonic()
        before, self._snapshot = self._folder(), self._snapshot + 1
        folder = self._folder()
        folder.mkdir(exist_ok=True)
        names = []
        for name, tensor in kept.items():  # one at a time: together they may not fit into memory
            _write_tensors(folder / f"{len(names)}.safetensors", {name: tensor})
            names.append(name)
        state = {"phase": phase, "done": done, "snapshot": self._snapshot, "names": names}
        _write(self.path / STATE, lambda part: part.write_text(json.dumps(state)))
        shutil.rmtree(before, ignore_errors=True)
        self._saved = time.monotonic()
        if kept:
            self._cost[phase] = self._saved - begin

    def put(self, kind: str, index: int, tensors: Tensors) -> None:
        """Store tensors by kind and number."""
        path = self._file(kind, index)
        path.parent.mkdir(exist_ok=True)
        _write_tensors(path, tensors)

    def get(self, kind: str, index: int) -> Tensors:
        """Return stored tensors. Raises CommandError if they are missing or damaged."""
        return _read_tensors(self._file(kind, index))

    def drop(self, kind: str, index: int) -> None:
        """Delete stored tensors, if any."""
        self._file(kind, index).unlink(missing_ok=True)

    def note_result(self, part: Path) -> None:
        """Record a complete file that is about to get its final name, for `is_result_of`."""
        _write(self.path / RESULT, lambda note: note.write_text(json.dumps(_identity(part))))

    def remove(self) -> None:
        """Close the folder and delete it; files that aren't ours stay."""
        _empty(self.path)
        self.close()
        _remove_empty(self.path)

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()

    def _folder(self) -> Path:
        return self.path / f"snapshot-{self._snapshot}"

    def _file(self, kind: str, index: int) -> Path:
        return self.path / kind / f"{index:06}.safetensors"

    def _state(self) -> dict[str, Any]:
        state = _read_json(self.path / STATE)
        known = isinstance(state.get("names"), list) and isinstance(state.get("phase"), str)
        if not known or not all(isinstance(state.get(name), int) for name in ("snapshot", "done")):
            raise _damaged(self.path / STATE)
        return state

    def _tidy(self) -> None:
        """Delete unfinished files of an interrupted run."""
        for folder in self.path.glob("snapshot-*"):
            if folder != self._folder() and _FOLDERS.fullmatch(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
        for path in self.path.rglob(f"*{PART}"):
            if _is_part(path):
                path.unlink(missing_ok=True)


class _Snapshot(Mapping):
    """The tensors of a state, each read when it is used."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self._files = {name: folder / f"{index}.safetensors" for index, name in enumerate(names)}

    def __getitem__(self, name: str) -> Tensor:
        return _read_tensors(self._files[name])[name]

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def is_result_of(target: Path, folder: Path) -> bool:
    """Whether a file is the result of the run in `folder`, which was killed before it could delete the folder."""
    try:
        if target.is_file() and all(path.name == LOCK for path in folder.iterdir()):
            return True  # the last that a run deletes
        return (folder / MARKER).is_file() and _read_json(folder / RESULT) == _identity(target)
    except (CommandError, OSError):
        return False


def discard(folder: Path) -> None:
    """Delete a work folder as `WorkFolder.remove` does, unless another program works there."""
    with suppress(InUseError):
        lock = lock_folder(folder)
        _empty(folder)
        lock.release()
        _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # another program may use it, or the user put a file there
        if all(path.name == LOCK for path in folder.iterdir()):
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()


def _empty(folder: Path) -> None:
    """Delete a run's files. The marker goes last, so that a half-deleted folder is still recognised as ours."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and _FOLDERS.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif _is_part(path):
            path.unlink(missing_ok=True)
    for name in (STATE, SETTINGS, RESULT, MARKER):
        (folder / name).unlink(missing_ok=True)


def _identity(path: Path) -> dict[str, int]:
    facts = path.stat()
    return {"size": facts.st_size, "changed": facts.st_mtime_ns}


def _claim(path: Path) -> None:
    """Create the folder, or check that it is ours. Raises CommandError and OSError."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise CommandError(f"{path} is in the way: this name is needed for a folder.", hint=_ELSEWHERE)
    path.mkdir(parents=True, exist_ok=True)
    if not (path / MARKER).is_file():
        if any(each.name != LOCK for each in path.iterdir() if not _is_part(each)):
            raise CommandError(
                f"{path} is not a folder of an unfinished run (or is one of an older version), so it is not used. "
                "Move or delete it.",
                hint=_ELSEWHERE,
            )
        write_whole(path / MARKER, lambda part: part.write_text(_MARKER_TEXT))


def _is_part(path: Path) -> bool:
    return _PARTS.fullmatch(path.name) is not None and path.is_file() and not path.is_symlink()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn errors of the file system into a message."""
    try:
        yield
    except OSError as error:
        reason = write_problem(error)
        raise CommandError(f"{path} can't be used for unfinished work: {reason}.", _ELSEWHERE) from error


def _check_same(path: Path, settings: Mapping[str, Any]) -> None:
    before = _read_json(path / SETTINGS)
    if before.get("format") != settings.get("format"):
        raise CommandError(f"{path} holds an unfinished run of another version of FlashVideo.", hint=_ANEW)
    names = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
    if names:
        changes = ", ".join(f"{name} was {before.get(name)}, now {settings.get(name)}" for name in names)
        raise CommandError(
            f"{path} holds an unfinished run with other settings ({changes}). Give the same settings to resume it.",
            hint=_ANEW,
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise _damaged(path) from error
    if not isinstance(value, dict):
        raise _damaged(path)
    return value


def _damaged(path: Path) -> CommandError:
    return CommandError(f"{path} is damaged: delete the folder {path.parent} to start over.", hint=f"Or: {_ANEW}")


def _write_tensors(path: Path, tensors: Tensors) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write(path, lambda part: save_file(plain, part))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CommandError(f"{path} is missing or damaged: delete the folder {path.parent} to start over.") from error


def _write(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write_whole(path, write)
    except (OSError, SafetensorError) as error:  # safetensors' is no OSError where the disk is full
        reason = write_problem(error) or error
        raise CommandError(f"{path} can't be written: {reason}. The same command resumes the run.") from error
