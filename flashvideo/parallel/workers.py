"""What runs in an actor's process: a worker, which keeps its networks from task to task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .team import Team

Report = Callable[[str, float, int], None]
Say = Callable[[str], None]


# Networks, and what is done with them: task, progress by phases, messages, helpers -> result. Where a task has parts,
# there is also a method `assist(shared, part)`, see `Team`.
Work = Callable[[Any, Report, Say, Team], Any]
Prepare = Callable[[], Work]


class StoppedError(Exception):
    """Ends a task whose run is cancelled."""


class Worker:
    """What an actor holds: the networks, and what they are working on."""

    def __init__(self, prepare: Prepare) -> None:
        """`prepare` loads the networks, later: the constructor of an actor had better not fail."""
        self._prepare, self._work = prepare, None
        self._stopped = False
        self._at: tuple[str, float, int] | None = None
        self._texts: list[str] = []
        self._team = Team(self._texts.append)

    def load(self) -> None:
        """Be ready for tasks. Raises CommandError."""
        if self._work is None:
            self._work = self._prepare()

    def do(self, task: Any) -> tuple[Any, list[str]]:
        """A task's result, and messages that `news` hasn't given."""
        if self._work is None and _replaces_another():
            self._texts.append("its worker has ended; a new one resumes it")
        self.load()
        self._at = None
        try:
            result = self._work(task, self._report, self._texts.append, self._team)
        finally:
            self._team.reset()
        return result, self._drained()

    def assist(self, shared: Any, part: Any) -> Any:
        """A part of another worker's task; see `Team`."""
        self.load()
        return self._work.assist(shared, part)

    def news(self, helpers: Mapping[int, Any]) -> tuple[tuple[str, float, int] | None, list[str], int | None]:
        """The running task's phase with what is done and all there is to do; its messages since the last call; and how
        many helpers it wants, None while it doesn't know. From now on it has these.
        """
        self._team.give(helpers)
        return self._at, self._drained(), self._team.wanted

    def stop(self) -> None:
        """Let the running task raise StoppedError at its next step."""
        self._stopped = True

    def _report(self, phase: str, done: float, total: int) -> None:
        if self._stopped:
            raise StoppedError
        self._at = (phase, done, total)

    def _drained(self) -> list[str]:
        texts, self._texts[:] = list(self._texts), []
        return texts


def _replaces_another() -> bool:
    import ray  # there: this is a worker's process

    return ray.get_runtime_context().was_current_actor_reconstructed
