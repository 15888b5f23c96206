"""What `models` does; `models` has its options."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..atomic_files import file_size, sha256
from ..checkpoints.catalogue import FoundFile, comfyui_folder, find_files, model_folders
from ..checkpoints.hub import Published, ask, discard_partial, download
from ..errors import CommandError, cancelled
from ..model_files import DOWNLOADS, ROLES, ModelFile, Role
from .terminal import ProgressBars, say

_COMMAND = "python -m flashvideo models"


@dataclass(frozen=True)
class _Request:
    """What the command line asks for: the named files (none: all), ComfyUI's folders by kind, no network if offline."""

    names: tuple[str, ...]
    folders: dict[str, list[Path]]
    offline: bool


def run(options: argparse.Namespace) -> int:
    """List, verify or download; returns the exit code. Raises CommandError."""
    unknown = [name for name in options.names if name not in DOWNLOADS]
    if unknown:
        raise CommandError(f"There is no model file called {', '.join(unknown)}; there are {', '.join(DOWNLOADS)}.")
    folders = model_folders(comfyui_folder(options.comfyui), options.extra_model_paths)
    return _ACTIONS[options.action](_Request(tuple(options.names), folders, options.offline))


def _list(request: _Request) -> int:
    found = find_files(request.folders)
    for role in _roles(request.names):
        say(f"{role.name}: {role.purpose}")
        files = [file for file in found if file.role is role]
        for file in files:
            state = "found  " if file.trouble is None else "BROKEN "
            say(f"  {state}  {file.path} ({_size(file.path)})")
            say(f"           {file.trouble or file.description}")
        if not any(file.trouble is None for file in files):
            for line in _how_to_get(role, request.folders[role.folder][0]):
                say(f"  {line}")
    return 0


def _how_to_get(role: Role, folder: Path) -> Iterator[str]:
    yield "missing  " + " or ".join(
        f"{file.file} (about {file.gigabytes} GB{', ' + file.note if file.note else ''})" for file in role.files
    )
    yield f"           from https://huggingface.co/{role.files[0].repository}"
    yield f"           into {folder}"
    yield f"           or: {_COMMAND} download {' | '.join(file.name for file in role.files)}"


def _verify(request: _Request) -> int:
    roles = _roles(request.names)
    found = [file for file in find_files(request.folders) if file.role in roles]
    if not found:
        raise CommandError(f"None of FlashVideo's model files was found. See: {_COMMAND} list")
    published: dict[str, Published] = {}
    if not request.offline:
        try:
            published = ask([file for role in roles for file in role.files])
        except CommandError as error:
            say(f"Checksums can't be compared, only contents are checked. {str(error).splitlines()[0]}")
    bad = 0
    for file in found:
        good, verdict = _judge(file, published)
        bad += not good
        say(f"{'good' if good else 'BAD '}  {file.path}: {verdict}")
    return 1 if bad else 0


def _judge(found: FoundFile, published: dict[str, Published]) -> tuple[bool, str]:
    """Whether a file is good, and a sentence about it."""
    if found.trouble is not None:
        return False, found.trouble
    known = {
        published[file.name].sha256: file
        for file in found.role.files
        if file.name in published and published[file.name].sha256
    }
    if not known:
        return True, f"{found.description}, complete"
    if found.source_sha256:
        origin = known.get(found.source_sha256)
        made_of = f"the official {origin.file}" if origin else "another file than the official one"
        return True, f"{found.description}, complete; converted from {made_of}"
    same_size = {file.name for file in known.values() if published[file.name].size == found.path.stat().st_size}
    with ProgressBars(leave=False) as bars:
        match = known.get(sha256(found.path, partial(bars, f"checksum of {found.path.name}"))) if same_size else None
    if match:
        return True, f"{found.description}; the checksum is that of {match.file} at {match.repository}"
    if found.path.name in {file.file for file in known.values()}:
        return False, f"{found.description}, but not the file that Hugging Face has under this name. Download it again."
    return True, f"{found.description}, complete; none of the published files, so its checksum can't be compared"


def _download(request: _Request) -> int:
    if not request.names:
        raise CommandError(f"Download what? Name one or more of {', '.join(DOWNLOADS)}.")
    wanted = [DOWNLOADS[name] for name in dict.fromkeys(request.names)]
    published = ask([file for _, file in wanted])
    try:
        for role, file in wanted:
            _fetch(file, published[file.name], request.folders[role.folder])
    except KeyboardInterrupt:
        return cancelled("Cancelled. What was downloaded is kept; the same command resumes the download.")
    return 0


def _fetch(file: ModelFile, published: Published, folders: Sequence[Path]) -> None:
    title = f"checksum of {file.file}"
    for path in (folder / file.file for folder in folders):
        if path.exists():
            with ProgressBars(leave=False) as bars:
                progress = partial(bars, title)
                same = path.stat().st_size == published.size and published.sha256 in (None, sha256(path, progress))
            if not same:
                raise CommandError(f"{path} exists already, and is another file. Move it away, then download again.")
            discard_partial(path)  # of a download that was killed when it was complete
            say(f"{path}: exists already, complete")
            return
    target = folders[0] / file.file
    with ProgressBars(leave=False) as bars:
        download(file, published, target, partial(bars, title))
    say(f"{target}: downloaded, {file_size(published.size)}, checksum good")


def _roles(names: Sequence[str]) -> list[Role]:
    """The roles of the named files, or all."""
    return [role for role in ROLES if not names or any(file.name in names for file in role.files)]


def _size(path: Path) -> str:
    return file_size(path.stat().st_size) if path.is_file() else "no file"


_ACTIONS = {"list": _list, "verify": _verify, "download": _download}
