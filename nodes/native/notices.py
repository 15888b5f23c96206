"""What an artist should know while a graph runs."""

from __future__ import annotations

import logging

from server import PromptServer


def tell(text: str, node_id: str | None) -> None:
    """Say something in the log and on the node."""
    logging.warning(text)
    if node_id is not None and hasattr(PromptServer, "instance"):  # no server in a script that runs nodes by itself
        PromptServer.instance.send_progress_text(text, node_id)
