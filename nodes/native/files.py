"""Where the loaders find models: ComfyUI's model folders, or the miniature that comes with the pack."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

import folder_paths
from comfy_api.latest import ui

from ...flashvideo.checkpoints.gguf_header import SUFFIX
from ...flashvideo.model_files import what_goes_into
from ...flashvideo.nano import NANO_NOTICE, nano_is_trained
from .notices import warn

BUILT_IN = "FlashVideo-Nano (built-in)"  # saved workflows hold this name: it never changes

Loaded = TypeVar("Loaded")

# Holds nothing alive: an entry is there as long as a graph, or ComfyUI's cache of outputs, uses the object.
_loaded: WeakValueDictionary[Hashable, object] = WeakValueDictionary()


def options(folder: str, built_in: tuple[str, ...] = (BUILT_IN,)) -> list[str]:
    """What a loader offers: the built-in model first, then the files of a model folder such as "vae"."""
    return [*built_in, *folder_paths.get_filename_list(folder), *_gguf_files(folder)]


def _gguf_files(folder: str) -> list[str]:
    """A model folder's GGUF files, which ComfyUI doesn't list."""
    found = set()
    for place in folder_paths.get_folder_paths(folder):
        if Path(place).is_dir():
            names, _ = folder_paths.recursive_search(place, excluded_dir_names=[".git"])
            found.update(name for name in names if name.lower().endswith(SUFFIX))
    return sorted(found - set(folder_paths.get_filename_list(folder)))


def resolve(folder: str, name: str, built_in: tuple[str, ...] = (BUILT_IN,)) -> Path | None:
    """The file behind an option; None for a built-in one. Raises ValueError if the file isn't there any more."""
    if name in built_in:
        return None
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise ValueError(_missing(folder, name))
    return Path(path)


def check_file(folder: str, name: str | None, built_in: tuple[str, ...] = (BUILT_IN,)) -> bool | str:
    """ComfyUI's validation of an option before anything runs: True, or what to put where.

    An option that comes through a wire is not known yet (None), and passes.
    """
    if name is None or name in built_in or folder_paths.get_full_path(folder, name):
        return True
    return _missing(folder, name)


def file_fingerprint(folder: str, name: str | None, built_in: tuple[str, ...] = (BUILT_IN,)) -> str:
    """What changes when the file behind an option is replaced, so that ComfyUI runs the loader again."""
    path = None if name is None or name in built_in else folder_paths.get_full_path(folder, name)
    return f"{name} {_identity(None if path is None else Path(path))}"


def _missing(folder: str, name: str) -> str:
    places = folder_paths.get_folder_paths(folder)
    place = next((place for place in places if Path(place).name == folder), places[0])
    return (
        f'"{name}" is not in models/{folder}. Put {what_goes_into(folder)} into {place} and press R on the page, '
        "or choose another file"
    )


def shared(path: Path | None, build: Callable[[], Loaded], *settings: Hashable) -> Loaded:
    """What `build` makes of a file, or the object that another node has made of the same file with these settings.

    `path` None means the built-in model; `settings` are all that the result of `build` depends on besides the file. A
    file that was replaced on disk counts as another one.
    """
    key = (build.__module__, *_identity(path), *settings)
    found = _loaded.get(key)
    if found is None:
        found = _loaded[key] = build()
    return found


def _identity(path: Path | None) -> tuple[Hashable, ...]:
    if path is None:
        return (BUILT_IN, nano_is_trained())
    real = path.resolve()
    stat = real.stat()
    return (real, stat.st_mtime_ns, stat.st_size)


def notice(path: Path | None, node_id: str | None) -> ui.PreviewText | None:
    """Warn in the log and on the node if the built-in model was chosen and is untrained.

    Returns the same text for the node's output, for clients that read the history instead of showing the graph.
    """
    if path is not None or nano_is_trained():
        return None
    warn(NANO_NOTICE, node_id)
    return ui.PreviewText(NANO_NOTICE)
