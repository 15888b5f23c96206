"""ComfyUI's own executor without its server, for tests of the nodes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any


class PromptFailed(Exception):
    """A node raised an error while a prompt ran. `node`, `node_type` and `message` say where and what."""

    def __init__(self, details: dict[str, Any], events: list[tuple[str, Any]]) -> None:
        self.node = details.get("node_id")
        self.node_type = details.get("node_type")
        self.message = str(details.get("exception_message", "interrupted")).strip()
        self.details, self.events = details, events
        super().__init__(f"{self.node_type}: {self.message}\n{''.join(details.get('traceback', []))}")


class Rejected(Exception):
    """ComfyUI refused a prompt before running it. `node_errors` maps node ids to what is wrong."""

    def __init__(self, error: dict[str, Any], node_errors: dict[str, Any]) -> None:
        self.error, self.node_errors = error, node_errors
        super().__init__(f"{error}\n{node_errors}")


class Executor:
    """Runs API-format prompts through ComfyUI's own executor; cached results live as long as this object.

    `run_prompt(prompt)` returns what the output nodes reported by node id, and the events that ComfyUI's page would
    receive, as (name, data); a progress event with a preview holds it under "preview". Raises `run_prompt.Rejected` or
    `run_prompt.Failed`. With `validation_errors=True` nothing runs, and ComfyUI's node errors are returned.
    """

    Rejected = Rejected
    Failed = PromptFailed

    def __init__(self) -> None:
        import execution

        self.events: list[tuple[str, Any]] = []
        # What the executor uses of ComfyUI's server.
        self.server = SimpleNamespace(
            client_id="tests", last_node_id=None, last_prompt_id=None, sockets_metadata={}, send_sync=self._receive
        )
        caches = {"lru": 0, "ram": 0, "ram_inactive": 0}
        self._executor = execution.PromptExecutor(
            self.server, cache_type=execution.CacheType.CLASSIC, cache_args=caches
        )
        self._runs = 0

    def __call__(
        self, prompt: dict[str, Any], *, validation_errors: bool = False
    ) -> tuple[dict[str, Any], list[tuple[str, Any]]] | dict[str, Any]:
        """Validate and run a prompt."""
        import execution

        self._runs += 1
        prompt_id = f"test-{self._runs}"
        valid, error, output_nodes, node_errors = asyncio.run(execution.validate_prompt(prompt_id, prompt, None))
        if validation_errors:
            return node_errors
        if not valid:
            raise Rejected(error, node_errors)
        self.events = []
        self._executor.execute(prompt, prompt_id, {"client_id": self.server.client_id}, output_nodes)
        if not self._executor.success:
            last = self._executor.status_messages[-1]
            raise PromptFailed(last[1], self.events)
        return self._executor.history_result["outputs"], self.events

    def forget(self) -> None:
        """Let go of the cached results and of the models in them, as ComfyUI does when its page asks for memory.

        A loaded model whose results are gone would let ComfyUI look for lost memory at every step from then on.
        """
        import comfy.model_management

        comfy.model_management.unload_all_models()
        self._executor.reset()

    def progress_hook(
        self, value: float, total: float, preview: object, prompt_id: str | None = None, node_id: str | None = None
    ) -> None:
        """What ComfyUI's main.py does when a progress bar moves: stop if cancelled, else tell the page."""
        import comfy.model_management

        comfy.model_management.throw_exception_if_processing_interrupted()
        node = node_id or self.server.last_node_id
        self._receive("progress", {"node": node, "value": value, "max": total, "preview": preview})

    def _receive(self, event: str, data: object, client: str | None = None) -> None:
        self.events.append((event, data))
