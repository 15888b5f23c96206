"""What a long run keeps beside its result, so that it can be ended at any moment and go on later.

Every file is written whole or not at all. A state (how far the run is, and the tensors that it needs to go on) takes
effect when state.json names it, and until then the state before it counts. Two programs never work in one folder: the
lock of one that was killed is free again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..atomic_files import LOCK, lock_folder
from ..errors import CommandError

SETTINGS = "settings.json"
STATE = "state.json"
SAVE_SHARE = 20  # saving a state takes at most about 1/20 of the time
_SECONDS_A_BYTE = 2e-9  # of a disk that wasn't timed yet
_SPARE_SPACE = 2**28  # bytes that a state leaves free

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Progress:
    """How far a run is: `done` steps of a phase, and the tensors with which the next one begins."""

    phase: str
    done: int
    tensors: Tensors


@dataclass
class MemoryWork:
    """Keeps a run's tensors in memory, and nothing beyond its end."""

    start: str
    _kept: dict[tuple[str, int], Tensors] = field(default_factory=dict)

    def progress(self) -> Progress:
        """Return the start of the run."""
        return Progress(self.start, 0, {})

    def save(self, phase: str, done: int, tensors: Callable[[], Tensors], *, always: bool = False) -> bool:
        """Nothing is to be done: what is in memory is up to date."""
        return True

    def put(self, kind: str, index: int, tensors: Tensors) -> None:
        """Keep tensors under a kind and a number."""
        self._kept[kind, index] = dict(tensors)

    def get(self, kind: str, index: int) -> Tensors:
        """Return what was put there."""
        return self._kept[kind, index]

    def drop(self, kind: str, index: int) -> None:
        """Forget what was put there, if anything was."""
        self._kept.pop((kind, index), None)


class WorkFolder:
    """The same in a folder: survives the end of the program, whatever ends it."""

    def __init__(self, path: Path, settings: Mapping[str, Any], start: str, *, anew: bool = False) -> None:
        """Open or create it. `settings` (JSON) say what the run is; `start` is its first phase.

        Raises InUseError if another program works there, and CommandError if it holds a run with other settings and
        `anew`, which starts over, is not set. To be closed.
        """
        self.path, self.start = path, start
        path.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(path)
        try:
            self._open(json.loads(json.dumps(settings)), anew)
        except BaseException:
            self.close()
            raise

    def _open(self, settings: Mapping[str, Any], anew: bool) -> None:
        path = self.path
        if anew:
            self._empty()
        self.fresh = not (path / SETTINGS).is_file()  # nothing was there to go on with
        if not self.fresh:
            _check_same(path, settings)
        else:
            _write(path / SETTINGS, lambda part: part.write_text(json.dumps(settings, indent=1)))
        self._saved = time.monotonic()
        self._cost: dict[str, float] = {}  # seconds that saving took, by phase
        self._snapshot = -1
        if (path / STATE).is_file():
            self._snapshot = json.loads((path / STATE).read_text())["snapshot"]
        self._tidy()

    def progress(self) -> Progress:
        """How far the run is."""
        if self._snapshot < 0:
            return Progress(self.start, 0, {})
        state = json.loads((self.path / STATE).read_text())
        return Progress(state["phase"], state["done"], _Snapshot(self._folder(), state["names"]))

    def save(self, phase: str, done: int, tensors: Callable[[], Tensors], *, always: bool = False) -> bool:
        """Save how far the run is; returns whether it was saved.

        Unless `always` is set it is not where that would take too much of the time or room.
        """
        begin, kept = time.monotonic(), tensors()
        size = sum(tensor.nbytes for tensor in kept.values())
        cost = self._cost.get(phase, size * _SECONDS_A_BYTE)
        soon = begin - self._saved < SAVE_SHARE * cost
        if not always and (soon or shutil.disk_usage(self.path).free < size + _SPARE_SPACE):
            return False
        before, self._snapshot = self._folder(), self._snapshot + 1
        folder = self._folder()
        folder.mkdir()
        names = []
        for name, tensor in kept.items():  # one at a time: together they may not fit the memory
            _write_tensors(folder / f"{len(names)}.safetensors", {name: tensor})
            names.append(name)
        state = {"phase": phase, "done": done, "snapshot": self._snapshot, "names": names}
        _write(self.path / STATE, lambda part: part.write_text(json.dumps(state)))
        shutil.rmtree(before, ignore_errors=True)
        self._saved = time.monotonic()
        if kept:
            self._cost[phase] = self._saved - begin
        return True

    def put(self, kind: str, index: int, tensors: Tensors) -> None:
        """Keep tensors under a kind and a number."""
        path = self._file(kind, index)
        path.parent.mkdir(exist_ok=True)
        _write_tensors(path, tensors)

    def get(self, kind: str, index: int) -> Tensors:
        """Return what was put there. Raises CommandError if it isn't there any more."""
        return _read_tensors(self._file(kind, index))

    def drop(self, kind: str, index: int) -> None:
        """Delete what was put there, if anything was."""
        self._file(kind, index).unlink(missing_ok=True)

    def remove(self) -> None:
        """Close the folder and delete it."""
        self._empty()
        self.close()
        with suppress(OSError):  # another program may have come
            (self.path / LOCK).unlink(missing_ok=True)
            self.path.rmdir()

    def close(self) -> None:
        """Let another program work here."""
        self._lock.release()

    def _folder(self) -> Path:
        return self.path / f"snapshot-{self._snapshot}"

    def _file(self, kind: str, index: int) -> Path:
        return self.path / kind / f"{index:06}.safetensors"

    def _empty(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink(missing_ok=True)

    def _tidy(self) -> None:
        """Delete what an interruption left unfinished."""
        for folder in self.path.glob("snapshot-*"):
            if folder != self._folder():
                shutil.rmtree(folder, ignore_errors=True)
        for part in self.path.rglob("*.part"):
            part.unlink(missing_ok=True)


class _Snapshot(Mapping):
    """The tensors of a state, read one by one."""

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


def _check_same(path: Path, settings: Mapping[str, Any]) -> None:
    before = json.loads((path / SETTINGS).read_text())
    names = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
    if names:
        changes = ", ".join(f"{name} was {before.get(name)}, now {settings.get(name)}" for name in names)
        raise CommandError(
            f"{path} holds an unfinished run with other settings ({changes}). Give the same settings to go on with it.",
            hint="--anew starts over.",
        )


def _write_tensors(path: Path, tensors: Tensors) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        _write(path, lambda part: save_file(plain, part))
    except (OSError, SafetensorError) as error:  # safetensors' is no OSError where the disk is full
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"{path} can't be written: {reason}. The same command goes on with it.") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CommandError(f"{path} is missing or damaged: delete the folder {path.parent} to start over.") from error


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside `path` and let it take its place when it is whole and on the disk."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)
