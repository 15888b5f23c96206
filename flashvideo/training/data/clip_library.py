"""Decoded clips on disk: one memory-mapped file of frames each, and a JSON index. Filled once, read by every step.

A library is a folder: index.json (the clips), sources.json (where they came from: package, SHA-256, licence) and
clips/, raw NumPy files of uint8 [T, H, W, 3]. Each file is written whole or not at all, and the index after it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import TrainingError
from ..loop.checkpointing import write_whole
from .decoding import Decoded
from .held_out import TRAIN, split_of

INDEX, SOURCES, FRAMES = "index.json", "sources.json", "clips"
VERSION = 1
_THUMBNAIL = 32  # pixels: size at which cuts are detected
# At a cut thumbnails differ by so many levels of 255 (root mean square) at least, and by more than the changes around
# do: 1.7 times the second largest of the three before and the three after, and 5 levels. Found on fast generated clips.
_CUT, _TIMES, _MORE, _AROUND = 25.0, 1.7, 5.0, 3


@dataclass(frozen=True)
class Clip:
    """A clip's entry in the index. A still is a clip of one frame with rate 0."""

    name: str  # base name of the file that it was read from, as in its package
    sha256: str  # of that file
    frames: int
    height: int
    width: int
    rate: float  # frames a second
    source: str
    licence: str
    cuts: tuple[int, ...] = ()  # frames that another scene begins with
    caption: str = ""

    @property
    def split(self) -> str:
        """One of held_out's splits."""
        return split_of(self.name)

    @property
    def file(self) -> str:
        """Name of its file of frames."""
        return f"{self.sha256[:24]}.npy"

    @property
    def nbytes(self) -> int:
        """Size of its frames."""
        return self.frames * self.height * self.width * 3


@dataclass(frozen=True)
class SourceRecord:
    """A source that is completely in the library."""

    source: str  # as the user named it
    file: str  # that was fetched; empty for a folder
    sha256: str  # of that file
    licence: str
    captions: Mapping[str, str] = field(default_factory=dict)  # of the source, by names of clips


@dataclass(frozen=True)
class Sizes:
    """The largest sizes that are stored."""

    clip_side: int  # pixels of the shorter side of clips, at most
    still_side: int  # and of stills
    longest: int  # frames of a clip, at most


class ClipLibrary:
    """The clips of a folder. Raises TrainingError where the folder holds no library that this version reads."""

    def __init__(self, folder: Path, sizes: Sizes, clips: Iterable[Clip], sources: Iterable[SourceRecord]) -> None:
        """See `open` and `create`."""
        self.folder, self.sizes = folder, sizes
        self.clips = {clip.sha256: clip for clip in clips}
        self.sources = {record.source: record for record in sources}

    @classmethod
    def open(cls, folder: Path | str) -> ClipLibrary:
        """Read an existing library."""
        folder = Path(folder)
        if not (folder / INDEX).is_file():
            raise TrainingError(
                f"{folder} holds no clips yet. Fetch some: python -m flashvideo train fetch --source ... --to {folder}"
            )
        index = _read_json(folder / INDEX)
        sources = _read_json(folder / SOURCES).get("sources", ()) if (folder / SOURCES).is_file() else ()
        try:
            clips = [Clip(**{**entry, "cuts": tuple(entry["cuts"])}) for entry in index["clips"]]
            return cls(folder, Sizes(**index["sizes"]), clips, [SourceRecord(**record) for record in sources])
        except (KeyError, TypeError) as problem:
            raise _damaged(folder / INDEX) from problem

    @classmethod
    def create(cls, folder: Path, sizes: Sizes) -> ClipLibrary:
        """Open a folder's library, or create one. Raises TrainingError if there is one of other sizes."""
        if not (folder / INDEX).is_file():
            return cls(folder, sizes, (), ())
        library = cls.open(folder)
        if library.sizes != sizes:
            raise TrainingError(f"{folder} keeps clips as {library.sizes}, not as {sizes}. Use another folder.")
        return library

    def frames(self, clip: Clip) -> np.ndarray:
        """A clip's frames [T, H, W, 3] uint8, memory-mapped. Raises TrainingError if its file is gone or damaged."""
        path = self.folder / FRAMES / clip.file
        try:
            frames = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as problem:
            raise TrainingError(f"{path}, the frames of {clip.name}, can't be read: fetch them again.") from problem
        if frames.shape != (clip.frames, clip.height, clip.width, 3):
            raise TrainingError(f"{path} doesn't hold the frames of {clip.name}: fetch them again.")
        return frames

    def has(self, sha256: str) -> bool:
        """Whether the frames of a file are here, whole."""
        clip = self.clips.get(sha256)
        if clip is None:
            return False
        path = self.folder / FRAMES / clip.file
        return path.is_file() and path.stat().st_size > clip.nbytes

    def add(self, name: str, sha256: str, decoded: Decoded, *, source: str, licence: str) -> Clip:
        """Store a file's frames, under the name that it was held out by if there is one."""
        if sha256 in self.clips and self.clips[sha256].split != TRAIN:
            name = self.clips[sha256].name
        count, height, width, _ = decoded.frames.shape
        cuts = find_cuts(decoded.frames)
        clip = Clip(name, sha256, count, height, width, round(decoded.rate, 3), source, licence, cuts)
        write_whole(self.folder / FRAMES / clip.file, lambda file: np.save(file, decoded.frames))
        self.clips[sha256] = clip
        self.write_index()
        return clip

    def also_called(self, sha256: str, name: str) -> None:
        """Add another name of a stored file. A name that is never trained on has priority."""
        clip = self.clips[sha256]
        if clip.split == TRAIN and split_of(name) != TRAIN:
            self.clips[sha256] = dataclasses.replace(clip, name=name)
            self.write_index()

    def record(self, record: SourceRecord) -> None:
        """Record a source that is complete."""
        self.sources[record.source] = record
        plain = [dataclasses.asdict(each) for each in self.sources.values()]
        _write_json(self.folder / SOURCES, {"version": VERSION, "sources": plain})

    def caption(self, captions: Sequence[Mapping[str, str]]) -> None:
        """Give every clip the first caption that is found under its name, with its ending or without.

        A name such as clip-2 takes the caption of clip, too, if it has none of its own.
        """
        for sha256, clip in self.clips.items():
            text = next((found for each in captions if (found := _look_up(each, clip.name)) is not None), "")
            self.clips[sha256] = dataclasses.replace(clip, caption=text)
        self.write_index()

    def write_index(self) -> None:
        """Write what clips there are."""
        clips = [dataclasses.asdict(clip) for clip in sorted(self.clips.values(), key=lambda clip: clip.name)]
        _write_json(self.folder / INDEX, {"version": VERSION, "sizes": dataclasses.asdict(self.sizes), "clips": clips})

    def of_split(self, split: str) -> list[Clip]:
        """The clips of a split, in the order of their names."""
        return sorted((clip for clip in self.clips.values() if clip.split == split), key=lambda c: (c.name, c.sha256))


def digest_of(clips: Sequence[Clip], version: int) -> str:
    """A hash of everything that samples of these clips depend on, the version of the code that cuts them included."""
    content = [version, *((c.sha256, c.frames, c.height, c.width, c.rate, c.cuts, c.caption) for c in clips)]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def find_cuts(frames: np.ndarray) -> tuple[int, ...]:
    """Frames [T, H, W, 3] uint8 -> the numbers of those that another scene begins with."""
    if len(frames) < 2:
        return ()
    small = np.stack([
        F.adaptive_avg_pool2d(torch.from_numpy(frame.copy()).permute(2, 0, 1).float(), _THUMBNAIL).numpy()
        for frame in frames
    ])  # fmt: skip
    change = np.sqrt(np.square(np.diff(small, axis=0)).mean(axis=(1, 2, 3)))
    cuts = []
    for index, level in enumerate(change.tolist()):
        around = [*change[max(0, index - _AROUND) : index], *change[index + 1 : index + 1 + _AROUND], 0.0, 0.0]
        if level > max(_CUT, _TIMES * sorted(around)[-2] + _MORE):
            cuts.append(index + 1)
    return tuple(cuts)


def _look_up(captions: Mapping[str, str], name: str) -> str | None:
    stem = Path(name).stem
    family, _, number = stem.rpartition("-")
    names = (name, stem, family) if number.isdigit() else (name, stem)
    return next((captions[each] for each in names if each in captions), None)


def _damaged(path: Path) -> TrainingError:
    return TrainingError(f"{path} is damaged. Move it away, and fetch the clips again.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["version"]
    except (ValueError, KeyError, TypeError) as problem:
        raise _damaged(path) from problem
    if version != VERSION:
        raise TrainingError(f"{path} is of version {version}; this FlashVideo reads version {VERSION}.")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_whole(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))
