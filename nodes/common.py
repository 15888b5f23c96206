"""What every node shares: the menu category, words for the search, and the node's name in front of an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

from comfy_api.latest import io

CATEGORY = "FlashVideo"
_SEARCH_ALIASES = "search_aliases"


def found_as(*words: str) -> dict[str, list[str]]:
    """Schema arguments that let the page's search find a node by these words too; none where ComfyUI can't do that."""
    known = any(field.name == _SEARCH_ALIASES for field in fields(io.Schema))
    return {_SEARCH_ALIASES: list(words)} if known else {}


def own_id(node: type[io.ComfyNode]) -> str | None:
    """The node's id in the graph that runs; None where a script calls the node."""
    return node.hidden.unique_id if node.hidden is not None else None


@contextmanager
def named(display_name: str) -> Iterator[None]:
    """Put the node's name before the message of a ValueError that the library raises inside the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{display_name}: {error}") from None
