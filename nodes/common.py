"""What every node shares: the menu category and the node's name in front of an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

CATEGORY = "FlashVideo"
MAX_SEED = 0xFFFFFFFFFFFFFFFF  # what ComfyUI's own samplers take


@contextmanager
def named(display_name: str) -> Iterator[None]:
    """Put the node's name before the message of a ValueError that the library raises inside the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{display_name}: {error}") from None
