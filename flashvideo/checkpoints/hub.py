"""Hugging Face, for the one command that uses it: sizes, checksums, downloads.

Nothing else in the pack uses the network, and huggingface_hub is imported only here, when needed.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ..atomic_files import check_regular, check_space, place_whole, sha256
from ..errors import CommandError
from ..model_files import ModelFile
from ..progress import Progress

PARTIAL = ".{}.download"  # folder beside the target for an unfinished download


@dataclass(frozen=True)
class Published:
    """Hugging Face's data of a file: its size in bytes, and its SHA-256 if it is stored as a large file."""

    size: int
    sha256: str | None


def ask(files: Sequence[ModelFile]) -> dict[str, Published]:
    """Size and checksum of published files, by ModelFile.name.

    Raises CommandError if Hugging Face can't be reached, or no longer has a file.
    """
    hub = _hub()
    published: dict[str, Published] = {}
    for repository in dict.fromkeys(file.repository for file in files):
        wanted = {file.file: file.name for file in files if file.repository == repository}
        with _connected(repository):
            entries = hub.HfApi(endpoint=_endpoint()).get_paths_info(repository, list(wanted))
        for entry in entries:
            published[wanted[entry.path]] = Published(entry.size, entry.lfs.sha256 if entry.lfs else None)
    gone = [f"{file.file} in {file.repository}" for file in files if file.name not in published]
    if gone:
        raise CommandError(f"Hugging Face no longer has {', '.join(gone)}.")
    return published


def download(file: ModelFile, published: Published, target: Path, progress: Progress) -> None:
    """Download a file; `target` appears only when it is complete and has the published checksum.

    An interrupted download stays in a folder beside `target`, and the next call resumes it. Raises CommandError if it
    doesn't fit on the disk, can't be fetched, or arrives damaged.
    """
    hub = _hub()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(PARTIAL.format(target.name))
    here = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    check_regular(target)
    check_space(target.parent, published.size - here, target.name)
    with _connected(file.repository, "The same command resumes the download."):
        arrived = Path(hub.hf_hub_download(file.repository, file.file, local_dir=partial, endpoint=_endpoint()))
    if arrived.stat().st_size != published.size or (published.sha256 and published.sha256 != sha256(arrived, progress)):
        discard_partial(target)
        raise CommandError(f"{file.file} arrived damaged (its checksum is not the published one). Download it again.")
    place_whole(arrived, target)
    discard_partial(target)


def discard_partial(target: Path) -> None:
    """Delete an unfinished download, if the folder has huggingface_hub's own records."""
    partial = target.with_name(PARTIAL.format(target.name))
    if not partial.is_symlink() and (partial / ".cache" / "huggingface").is_dir():
        shutil.rmtree(partial)


def _hub() -> ModuleType:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Not Xet, which is faster but starts an interrupted file from the beginning.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    try:
        import huggingface_hub
    except ImportError:
        raise CommandError(
            "This needs the Python package huggingface_hub. ComfyUI's own Python has it; elsewhere: "
            "pip install huggingface_hub"
        ) from None
    return huggingface_hub


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


@contextmanager
def _connected(repository: str, advice: str = "") -> Iterator[None]:
    """Turn errors of huggingface_hub, and of the HTTP library below it (requests or httpx), into a message."""
    below = (sys.modules.get(name) for name in ("httpx", "httpx2"))
    failures = (OSError, ValueError, *(library.HTTPError for library in below if library))
    try:
        yield
    except failures as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        message = f"{_endpoint() or 'huggingface.co'} did not give {repository}: {reason}"
        raise CommandError(f"{message}\n{advice}".strip()) from error
