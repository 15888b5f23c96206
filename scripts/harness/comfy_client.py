"""Talks to a running ComfyUI: queue a workflow, follow it as typed events, read its results."""

from __future__ import annotations

import asyncio
import json
import queue
import struct
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

_PREVIEW, _PREVIEW_WITH_METADATA = 1, 4  # ComfyUI's protocol.py; the numbers start a binary message
_IMAGE_KINDS = {1: "jpeg", 2: "png"}
_UNLIMITED = 0
_ANSWER_SECONDS = 300.0  # for an answer of a server that computes on the same processors
_HISTORY_TRIES = 40  # the server writes history a moment after it announces the end
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this machine: no proxy


@dataclass(frozen=True)
class Status:
    """The queue's length changed."""

    remaining: int


@dataclass(frozen=True)
class Started:
    """A prompt's execution began."""


@dataclass(frozen=True)
class Cached:
    """These nodes are not run: their results are known."""

    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Executing:
    """A node began to run."""

    node: str


@dataclass(frozen=True)
class Progress:
    """A node's progress bar moved."""

    node: str
    value: float
    maximum: float


@dataclass(frozen=True)
class Preview:
    """A picture of the work so far: encoded bytes and their kind, `jpeg` or `png`."""

    image: bytes
    kind: str
    node: str | None = None


@dataclass(frozen=True)
class Executed:
    """An output node finished; `outputs` is what ComfyUI's page would show."""

    node: str
    outputs: dict[str, Any]


@dataclass(frozen=True)
class Success:
    """The prompt finished."""


@dataclass(frozen=True)
class Failure:
    """A node raised an error, and the prompt ended."""

    node: str
    node_type: str
    message: str
    traceback: str = ""


@dataclass(frozen=True)
class Interrupted:
    """The prompt was cancelled while this node ran."""

    node: str


Event = Status | Started | Cached | Executing | Progress | Preview | Executed | Success | Failure | Interrupted
ENDINGS = (Success, Failure, Interrupted)


class RejectedWorkflow(RuntimeError):
    """ComfyUI refused to queue a workflow; `node_errors` maps node ids to what is wrong with their inputs."""

    def __init__(self, message: str, node_errors: dict[str, Any]) -> None:
        super().__init__(message)
        self.node_errors = node_errors


class ComfyClient:
    """One client of one server. Events arrive from the moment the client is opened.

    Use as a context manager: the websocket lives in a thread of its own until the block ends.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.client_id = uuid.uuid4().hex
        self._messages: queue.Queue[tuple[str | None, Event | Exception]] = queue.Queue()
        self._loop = asyncio.new_event_loop()
        self._connected = threading.Event()
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._listen_forever, daemon=True)

    def __enter__(self) -> ComfyClient:
        self._thread.start()
        if not self._connected.wait(_ANSWER_SECONDS):
            raise TimeoutError(f"ComfyUI at {self.address} accepts no websocket.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(timeout=10)

    def queue(self, prompt: dict[str, Any], workflow: dict[str, Any] | None = None) -> str:
        """Queue an API-format workflow; returns its prompt id. `workflow` is the UI-format graph kept in the files."""
        body: dict[str, Any] = {"prompt": prompt, "client_id": self.client_id}
        if workflow is not None:
            body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        try:
            return self._ask("/prompt", body)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise _rejection(error, prompt) from None

    def events(self, prompt_id: str, timeout: float = 600.0) -> Iterator[Event]:
        """Yield what happens to a prompt, until it ends. Raises TimeoutError after `timeout` seconds of silence."""
        while True:
            try:
                of, event = self._messages.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError(f"ComfyUI said nothing for {timeout:.0f} s.") from None
            if isinstance(event, Exception):
                raise ConnectionError("ComfyUI closed the connection: it may have stopped.") from event
            if of not in (None, prompt_id):
                continue
            yield event
            if isinstance(event, ENDINGS):
                return

    def run(self, prompt: dict[str, Any], timeout: float = 600.0) -> list[Event]:
        """Queue a prompt and wait for its end; returns all events."""
        return list(self.events(self.queue(prompt), timeout))

    def interrupt(self) -> None:
        """Cancel the running prompt."""
        self._ask("/interrupt", {})

    def object_info(self) -> dict[str, Any]:
        """Description of every node that the server knows."""
        return self._ask("/object_info")

    def history(self, prompt_id: str) -> dict[str, Any]:
        """What the server keeps of a finished prompt: `outputs`, `status`. Empty for a prompt that it doesn't know."""
        for _ in range(_HISTORY_TRIES):
            known = self._ask(f"/history/{prompt_id}")
            if prompt_id in known:
                return known[prompt_id]
            time.sleep(0.05)
        return {}

    def stats(self) -> dict[str, Any]:
        """Versions, devices, memory."""
        return self._ask("/system_stats")

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with _DIRECT.open(request, timeout=_ANSWER_SECONDS) as answer:
            content = answer.read()
        return json.loads(content) if content else None

    def _listen_forever(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._task = self._loop.create_task(self._listen())
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        except Exception as error:  # handed to the thread that waits for events
            self._messages.put((None, error))
        finally:
            self._loop.close()

    async def _listen(self) -> None:
        url = f"{self.address}/ws?clientId={self.client_id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=_UNLIMITED) as socket:
            await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    self._deliver(_preview(message.data))
                elif message.type == aiohttp.WSMsgType.TEXT:
                    content = json.loads(message.data)
                    if content["type"] == "feature_flags":  # the server knows us from here on
                        self._connected.set()
                    self._deliver(_event(content))
            raise ConnectionError("websocket closed")

    def _deliver(self, item: tuple[str | None, Event] | None) -> None:
        if item is not None:
            self._messages.put(item)


def saved_files(outputs: dict[str, Any], output_folder: Path) -> list[Path]:
    """The files in one node's outputs in the output folder (not previews in the temporary folder)."""
    entries = [entry for values in outputs.values() if isinstance(values, list) for entry in values]
    return [
        output_folder / entry.get("subfolder", "") / entry["filename"]
        for entry in entries
        if isinstance(entry, dict) and "filename" in entry and entry.get("type") == "output"
    ]


def _event(message: dict[str, Any]) -> tuple[str | None, Event] | None:
    """A text message as (prompt id, event); None for messages that say nothing about a prompt."""
    kind, data = message["type"], message.get("data") or {}
    node = str(data.get("node_id") or data.get("node"))
    if kind == "status":
        remaining = (data.get("status") or {}).get("exec_info", {}).get("queue_remaining", 0)
        return None, Status(remaining)
    if kind == "executing" and data.get("node") is None:
        return None  # an older way to say that a prompt ended
    builders = {
        "execution_start": lambda: Started(),
        "execution_cached": lambda: Cached(tuple(map(str, data.get("nodes", ())))),
        "executing": lambda: Executing(node),
        "progress": lambda: Progress(node, data["value"], data["max"]),
        "executed": lambda: Executed(node, data.get("output") or {}),
        "execution_success": lambda: Success(),
        "execution_interrupted": lambda: Interrupted(node),
        "execution_error": lambda: Failure(
            node, str(data.get("node_type")), str(data.get("exception_message")).strip(), "".join(data["traceback"])
        ),
    }
    return (data.get("prompt_id"), builders[kind]()) if kind in builders else None


def _preview(data: bytes) -> tuple[str | None, Preview] | None:
    """A binary message as (prompt id, preview); None for other binary messages."""
    (kind,) = struct.unpack_from(">I", data)
    if kind == _PREVIEW:
        (image_kind,) = struct.unpack_from(">I", data, 4)
        return None, Preview(data[8:], _IMAGE_KINDS.get(image_kind, "unknown"))
    if kind == _PREVIEW_WITH_METADATA:
        (length,) = struct.unpack_from(">I", data, 4)
        about = json.loads(data[8 : 8 + length])
        image_kind = about.get("image_type", "image/jpeg").rpartition("/")[2]
        return about.get("prompt_id"), Preview(data[8 + length :], image_kind, about.get("node_id"))
    return None


def _rejection(error: urllib.error.HTTPError, prompt: dict[str, Any]) -> RejectedWorkflow:
    """ComfyUI's answer to a bad workflow in readable lines: node, input, what is wrong."""
    try:
        answer = json.loads(error.read())
    except ValueError:
        return RejectedWorkflow(f"ComfyUI refused the workflow (HTTP {error.code}).", {})
    general = answer.get("error") or {}
    node_errors = answer.get("node_errors") or {}
    lines = []
    for node_id, about in node_errors.items():
        name = node_name(prompt, node_id)
        lines += [f"{name}: {_reason(entry)}" for entry in about.get("errors", [])]
    if not lines:
        lines = [_reason(general if isinstance(general, dict) else {"message": str(general)})]
    return RejectedWorkflow("\n".join(lines), node_errors)


def _reason(entry: dict[str, Any]) -> str:
    message, details = entry.get("message", "not accepted"), entry.get("details", "")
    return f"{message} ({details})" if details else str(message)


def node_name(prompt: dict[str, Any], node_id: str) -> str:
    """The title of a node as the user sees it, else its type, else its id."""
    node = prompt.get(node_id) or {}
    return (node.get("_meta") or {}).get("title") or node.get("class_type") or f"node {node_id}"
