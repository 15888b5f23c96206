"""Runs a workflow file on a server from its first node to its last, and reports its progress."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .bed import seconds
from .comfy_client import (
    ComfyClient,
    Event,
    Executed,
    Executing,
    Failure,
    Interrupted,
    Progress,
    node_name,
    saved_files,
)
from .comfy_server import ComfyServer
from .workflow_api import WorkflowError, read_workflow, set_inputs, to_api

_REPORT_EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class Phase:
    """One node's part of a run."""

    name: str
    seconds: float


@dataclass
class Run:
    """A finished run: its phases in order, its files by the save node's `filename_prefix`, and the texts of nodes."""

    phases: list[Phase] = field(default_factory=list)
    files: dict[str, list[Path]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Time from the first node to the last."""
        return sum(phase.seconds for phase in self.phases)


def run_workflow(
    server: ComfyServer,
    workflow_file: Path,
    tell: Callable[[str], None],
    *,
    settings: Iterable[str] = (),
    adjust: Callable[[dict[str, Any]], None] | None = None,
) -> Run:
    """Run a UI-format (or API-format) workflow file.

    Args:
        tell: receives one line per finished node, and one every ten seconds within a long one.
        settings: changes like `6.text=a fox`; see `workflow_api.set_inputs`.
        adjust: further changes, made on the API-format workflow.

    Raises:
        WorkflowError: the file, a setting or a node's input is wrong, or a node failed; names the node.
    """
    prompt = api_prompt(server, workflow_file)
    set_inputs(prompt, settings)
    if adjust is not None:
        adjust(prompt)
    workflow = read_workflow(workflow_file)
    return run_prompt(server, prompt, tell, workflow if "nodes" in workflow else None)


def api_prompt(server: ComfyServer, workflow_file: Path) -> dict[str, Any]:
    """A workflow file in the format that the server runs. Takes a second or two. Raises WorkflowError."""
    workflow = read_workflow(workflow_file)
    with server.client() as client:
        return to_api(workflow, client.object_info())


def run_prompt(
    server: ComfyServer, prompt: dict[str, Any], tell: Callable[[str], None], interface: dict[str, Any] | None = None
) -> Run:
    """Run a workflow in API format; files keep `interface`, what the page shows of it. See `run_workflow`."""
    with server.client() as client:
        return _follow(client, prompt, client.queue(prompt, interface), server.output, tell)


def copy_files(run: Run, folder: Path) -> list[Path]:
    """Copy everything that a run saved into `folder`; returns the copies."""
    folder.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copy2(path, folder)) for paths in run.files.values() for path in paths]


def _follow(
    client: ComfyClient, prompt: dict[str, Any], prompt_id: str, output: Path, tell: Callable[[str], None]
) -> Run:
    """Turn the events of one prompt into lines for the person and into the run's record."""
    run = Run()
    clock = _PhaseClock(run, prompt, tell)
    try:
        for event in _known(client.events(prompt_id)):
            if isinstance(event, Executing):
                clock.begin(event.node)
            elif isinstance(event, Progress):
                clock.progress(event)
            elif isinstance(event, Executed):
                _record(run, prompt, event, output)
            elif isinstance(event, Failure):
                raise WorkflowError(f"{node_name(prompt, event.node)}: {event.message or 'failed without a message'}")
            elif isinstance(event, Interrupted):
                raise WorkflowError(f"Cancelled during {node_name(prompt, event.node)}.")
    except KeyboardInterrupt:
        client.interrupt()
        raise
    clock.end()
    return run


def _known(events: Iterator[Event]) -> Iterator[Event]:
    """The events that a run's report is made of."""
    return (event for event in events if isinstance(event, Executing | Progress | Executed | Failure | Interrupted))


def _record(run: Run, prompt: dict[str, Any], event: Executed, output: Path) -> None:
    run.notes.extend(text for text in event.outputs.get("text", ()) if text not in run.notes)
    paths = saved_files(event.outputs, output)
    if paths:
        prefix = prompt.get(event.node, {}).get("inputs", {}).get("filename_prefix", event.node)
        run.files.setdefault(str(prefix), []).extend(paths)


class _PhaseClock:
    """Times the node that runs now and reports it."""

    def __init__(self, run: Run, prompt: dict[str, Any], tell: Callable[[str], None]) -> None:
        self._run, self._prompt, self._tell = run, prompt, tell
        self._name = ""
        self._began = self._reported = time.monotonic()
        self._steps = ""

    def begin(self, node: str) -> None:
        """A node starts: the one before it is finished."""
        self.end()
        self._name = node_name(self._prompt, node)
        self._began = self._reported = time.monotonic()

    def progress(self, event: Progress) -> None:
        """The running node's progress bar moved."""
        self._steps = f"{event.value:g} of {event.maximum:g}"
        now = time.monotonic()
        if now - self._reported >= _REPORT_EVERY_SECONDS:
            self._reported = now
            self._tell(f"  {self._name}: {self._steps} after {seconds(now - self._began)}")

    def end(self) -> None:
        """The running node is finished."""
        if self._name:
            spent = time.monotonic() - self._began
            self._run.phases.append(Phase(self._name, spent))
            self._tell(f"  {self._name:<34} {seconds(spent):>9}" + (f"   {self._steps}" if self._steps else ""))
        self._name = self._steps = ""
