"""Where the loaders have a network from, for nodes that let another process load it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAME = "flashvideo_loaded_from"


@dataclass(frozen=True)
class LoadedFrom:
    """A file, or the name of a built-in network; and whether its weights are in memory as they are there."""

    source: Path | str
    as_it_is: bool = True


def remember_file(network: Any, loaded_from: LoadedFrom) -> None:
    """Let the network of a MODEL or VAE know where it is from; all clones share it."""
    setattr(network, _NAME, loaded_from)


def file_of(network: Any) -> LoadedFrom | None:
    """Where a network is from; None if another loader made it."""
    return getattr(network, _NAME, None)
