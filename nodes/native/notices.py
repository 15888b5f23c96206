"""Messages to the user while a graph runs."""

from __future__ import annotations

import logging

from server import PromptServer


def warn(text: str, node_id: str | None) -> None:
    """Warn in the log and on the node."""
    logging.warning(text)
    _show(text, node_id)


def note(name: str, text: str, node_id: str | None) -> None:
    """Report a choice, such as the strength, in the log with the node's name, and on the node."""
    logging.info("%s: %s", name, text)
    _show(text, node_id)


def _show(text: str, node_id: str | None) -> None:
    if node_id is not None and hasattr(PromptServer, "instance"):  # no server in a script that runs nodes by itself
        PromptServer.instance.send_progress_text(text, node_id)
