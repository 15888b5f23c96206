"""`python -m flashvideo train fetch`: adds the user's sources to a library of clips, and shows their licences first.

It can be stopped at any time: what was fetched and decoded stays, and the same command resumes from there.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ...atomic_files import in_use, sha256
from ..errors import TrainingError
from .clip_captions import read_caption_file
from .clip_library import Clip, ClipLibrary, Sizes, SourceRecord
from .decoding import ENDINGS, PICTURE_ENDINGS, UndecodableError, decode, picture_count, shrunk_to
from .held_out import TRAIN, UNUSED
from .packages import Package, Source, parse_source

LIBRARY = Path("runs/nano/real")
# Clips up to this size are stored unchanged: when samples are cut, each is shrunk by a random factor. Photographs are
# stored larger, because a camera moves over them.
SIZES = Sizes(clip_side=384, still_side=1024, longest=300)
_DOWNLOADS = "downloads"
_GIVEN = "captions"  # the user's caption file, as one of the sources
_PLAIN = 2.0  # levels of 255 (standard deviation): stills with less are empty
_SMALLEST = 96  # pixels of the shorter side; smaller pictures are icons


def fetch(texts: Sequence[str], folder: Path, caption_file: Path | None = None, sizes: Sizes = SIZES) -> ClipLibrary:
    """Put all clips of the sources into the library of a folder, and write captions where they are known.

    Raises TrainingError for a source or caption file that can't be read, if possible before anything is fetched;
    InUseError if another program fills the folder.
    """
    sources = [parse_source(text) for text in texts]
    given = read_caption_file(caption_file) if caption_file else None
    folder.mkdir(parents=True, exist_ok=True)
    with in_use(folder):
        library = ClipLibrary.create(folder, sizes)
        _tidy(folder / _DOWNLOADS)
        for source in sources:
            _add(library, source)
        if given is not None:
            library.record(SourceRecord(_GIVEN, "", "", "", given))
        _write_captions(library)
        shutil.rmtree(folder / _DOWNLOADS, ignore_errors=True)
    sys.stdout.write(_summary(library) + "\n")
    return library


def _tidy(downloads: Path) -> None:
    """Remove what a killed run left behind."""
    for pattern in ("arriving-*", "unpacked-*"):
        for path in downloads.glob(pattern):
            shutil.rmtree(path)


def _add(library: ClipLibrary, source: Source) -> None:
    """Add a source's clips, unless all of them are there."""
    known = library.sources.get(source.text)
    if known and not source.changes and all(library.has(clip.sha256) for clip in _clips_of(library, source)):
        sys.stdout.write(f"{source.text}: is in {library.folder} already (licence: {known.licence})\n")
        return
    with source.unpacked(library.folder / _DOWNLOADS) as package:
        pictures = package.pictures()
        licence = _licence(pictures, package)
        sys.stdout.write(f"{source.text}: licence {licence}\n")
        added = [_add_file(library, path, source, package) for path in tqdm(pictures, desc=source.name, unit="file")]
        if not any(added) and not package.captions:
            raise TrainingError(f"{source.text} holds no pictures or videos that can be used ({', '.join(ENDINGS)}).")
        captions = {**package.captions, **{path.name: text for path in pictures if (text := _sidecar(path))}}
        library.record(SourceRecord(source.text, package.file, package.sha256, licence, captions))
    sys.stdout.write(f"{source.text}: {_counts(_clips_of(library, source))}; texts for {len(captions):,} names\n")


def _licence(pictures: Sequence[Path], package: Package) -> str:
    """The licence of a package; if its pictures have several, each with how many."""
    licences = Counter(package.licence_of(path.relative_to(package.root)) for path in pictures)
    if len(licences) > 1:
        return ", ".join(f"{name} ({count})" for name, count in sorted(licences.items()))
    return next(iter(licences), "") or package.licence_of(package.root)


def _add_file(library: ClipLibrary, path: Path, source: Source, package: Package) -> bool:
    """Add a file's frames if they aren't there; returns whether they are now."""
    digest = sha256(path, lambda *_: None)
    if library.has(digest):
        library.also_called(digest, path.name)
        return True
    sizes = library.sizes
    try:
        still = path.suffix.lower() in PICTURE_ENDINGS and picture_count(path) == 1
        decoded = decode(path, sizes.longest, shrunk_to(sizes.still_side if still else sizes.clip_side))
    except UndecodableError as problem:
        tqdm.write(f"{path.name} is left out: {problem}.", file=sys.stderr)
        return False
    if min(decoded.frames.shape[1:3]) < _SMALLEST or (still and decoded.frames.std() < _PLAIN):
        return False
    licence = package.licence_of(path.relative_to(package.root))
    library.add(path.name, digest, decoded, source=source.text, licence=licence)
    return True


def _sidecar(path: Path) -> str:
    """The caption in a text file beside a clip, as `VideoFolder` reads it."""
    try:
        return " ".join(path.with_suffix(".txt").read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError):
        return ""


def _write_captions(library: ClipLibrary) -> None:
    """The user's captions have priority over all others."""
    users = library.sources.get(_GIVEN)
    others = [record.captions for name, record in library.sources.items() if name != _GIVEN]
    library.caption([users.captions if users else {}, *others])


def _clips_of(library: ClipLibrary, source: Source) -> list[Clip]:
    return [clip for clip in library.clips.values() if clip.source == source.text]


def _counts(clips: Sequence[Clip]) -> str:
    moving = [clip for clip in clips if clip.frames > 1]
    frames = sum(clip.frames for clip in moving)
    return f"{len(moving):,} clips ({frames:,} frames), {len(clips) - len(moving):,} stills"


def _summary(library: ClipLibrary) -> str:
    clips = list(library.clips.values())
    held_out = [clip for clip in clips if clip.split not in (TRAIN, UNUSED)]
    unused = sum(clip.split == UNUSED for clip in clips)
    size = sum(clip.nbytes for clip in clips) / 1e9
    captions = sum(bool(clip.caption) for clip in clips)
    return (
        f"{library.folder}: {_counts(clips)}, {size:.2f} GB, {captions:,} with captions. Never trained on: "
        f"{_counts(held_out)} held out by their names, {unused} that show the same as one of these."
    )
