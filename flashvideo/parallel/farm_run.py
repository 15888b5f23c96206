"""Tasks on actors, from the first to the last: who does which, who helps whom, and what if a worker ends."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..errors import CommandError

RETRIES = 5  # of a task whose worker ends: what ends every worker isn't tried for ever
CONTROL = "control"  # methods that answer while a task runs
SECONDS_TO_ANSWER = 5.0
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_START = 60.0  # of a worker in an idle cluster, generously
SECONDS_TO_STOP = 20.0


class Watcher(Protocol):
    """Is told what happens."""

    def progress(self, task: Any, phase: str, done: float, total: int) -> None:
        """How far a task is."""

    def message(self, task: Any, text: str) -> None:
        """What a task has to say; after a worker has ended, perhaps once more."""

    def finished(self, task: Any, result: Any) -> bool:
        """A task's result; whether it is to be done again after the others."""

    def failed(self, task: Any, reason: str) -> None:
        """A task that has no result."""

    def warn(self, text: str) -> None:
        """What concerns no single task."""


class Member:
    """An actor, and what it does.

    `helpers`: those that help with its task, by their numbers. `wanted`: how many are of use to it. `owner`: whom it
    helps itself.
    """

    def __init__(self, actor: Any, number: int) -> None:
        self.actor, self.number, self.task, self.busy = actor, number, None, False
        self.looked = 0.0
        self.asked: float | None = None  # when, while it hasn't answered
        self.helpers: dict[int, Member] = {}
        self.wanted = 0
        self.owner: Member | None = None
        self.ready = False
        self.away = False  # it has ended, and a place was made for its replacement

    def ask(self, method: str, *words: Any) -> Any:
        """Call a method that answers while a task runs."""
        return getattr(self.actor, method).options(concurrency_group=CONTROL, max_task_retries=0).remote(*words)

    def leave(self) -> None:
        """Help nobody any more."""
        if self.owner is not None:
            del self.owner.helpers[self.number]
            self.owner = None


class FarmRun:
    """One call of `Farm.run`. `parts`: how many workers can work at a task together.

    `_calls`: what to do with the answer to each call that is under way.
    """

    def __init__(
        self, ray: Any, actors: Sequence[Any], tasks: deque, watcher: Watcher, parts: Callable[[Any], int]
    ) -> None:
        self._ray, self._tasks, self._watcher, self._parts = ray, tasks, watcher, parts
        self._members = [Member(actor, number) for number, actor in enumerate(actors)]
        self._calls: dict[Any, Callable[[Any], None]] = {}
        self._refusal: Exception | None = None
        self._ready = False

    def run(self) -> None:
        """Do the tasks. Raises CommandError if no worker can be made ready."""
        for member in self._members:
            self._call(member.actor.load.remote(), member, self._loaded)
        patience = time.monotonic() + SECONDS_TO_START
        try:
            while self._calls:
                for ref in self._ray.wait([*self._calls], timeout=SECONDS_BETWEEN_LOOKS)[0]:
                    self._calls.pop(ref)(ref)
                self._look()
                if not self._ready and time.monotonic() > patience:
                    self._watcher.warn("No worker is ready yet: the cluster may be busy.")
                    patience = float("inf")
        except BaseException:
            self._stop()
            raise
        if self._tasks:  # all workers were refused
            raise self._refusal or CommandError("The workers of the cluster have ended.")

    def _call(self, ref: Any, member: Member, then: Callable[[Member, Any], None]) -> None:
        self._calls[ref] = lambda ref: then(member, ref)

    def _loaded(self, member: Member, ref: Any) -> None:
        try:
            self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            reason = cause(error)
            self._refusal = reason if isinstance(reason, CommandError) else CommandError(_ended(reason))
            self._members.remove(member)
            self._ray.kill(member.actor)
            if self._members:
                self._watcher.warn(f"A worker can't be used: {self._refusal}")
        else:
            self._ready = member.ready = True
            self._next(member)

    def _next(self, member: Member) -> None:
        """Give a worker its next task; without one it ends, for another that waits for its place."""
        member.busy = bool(self._tasks)
        if member.busy:
            member.task, member.looked = self._tasks.popleft(), time.monotonic()
            self._call(member.actor.do.remote(member.task), member, self._done)
            member.wanted = self._parts(member.task) - 1
        self._share_helpers()

    def _share_helpers(self) -> None:
        """Let workers without a task help; where none is wanted they end, for others that wait for their place."""
        for owner in self._members:
            for helper in [*owner.helpers.values()][max(owner.wanted, 0) :]:
                helper.leave()
        for member in [each for each in self._members if self._is_free(each)]:
            owners = [each for each in self._members if len(each.helpers) < each.wanted]
            if owners:
                member.owner = min(owners, key=lambda each: len(each.helpers))
                member.owner.helpers[member.number] = member
            else:
                self._members.remove(member)
                self._ray.kill(member.actor)

    def _is_free(self, member: Member) -> bool:
        return member.ready and not member.busy and member.owner is None

    def _done(self, member: Member, ref: Any) -> None:
        task, errors = member.task, self._ray.exceptions
        member.wanted = 0
        try:
            result, texts = self._ray.get(ref)
        except errors.RayActorError:
            # Were the head gone, so would be its workers; then this process ends, and no task has failed.
            time.sleep(SECONDS_TO_ANSWER)
            self._ray.nodes()
            self._watcher.failed(task, f"its worker has ended {RETRIES + 1} times.")
        except errors.RayError as error:
            self._watcher.failed(task, _ended(cause(error)))
            self._ray.kill(member.actor, no_restart=False)  # nobody knows what state it is in
        else:
            for text in texts:
                self._watcher.message(task, text)
            if self._watcher.finished(task, result):
                self._tasks.append(task)
        self._next(member)

    def _look(self) -> None:
        now = time.monotonic()
        for member in self._members:
            if member.asked is not None and now - member.asked > SECONDS_TO_START:
                self._make_room(member)
            if member.busy and now - member.looked > SECONDS_BETWEEN_LOOKS:
                member.looked, member.asked = float("inf"), now  # until this look is answered
                task = member.task
                helpers = {number: helper.actor for number, helper in member.helpers.items()}
                asked = member.ask("news", helpers)
                self._call(asked, member, lambda member, ref, task=task: self._heard(member, ref, task))

    def _heard(self, member: Member, ref: Any, task: Any) -> None:
        member.looked, member.asked = time.monotonic(), None
        try:
            at, texts, wanted = self._ray.get(ref)
        except self._ray.exceptions.RayError:
            return  # it is being replaced
        member.away = False
        for text in texts:
            self._watcher.message(task, text)
        if member.task is not task or not member.busy:
            return
        if at is not None:
            self._watcher.progress(task, *at)
        if wanted is not None and wanted != member.wanted:
            member.wanted = wanted
            self._share_helpers()

    def _make_room(self, member: Member) -> None:
        """A worker has ended, and there may be no place for the one that replaces it: one of its helpers makes way."""
        if not member.away and member.helpers:
            member.away = True
            helper = next(iter(member.helpers.values()))
            self._ray.kill(helper.actor, no_restart=False)

    def _stop(self) -> None:
        """Let the tasks end at their next step, so that they leave nothing half-written."""
        for member in self._members:
            member.ask("stop")
        running = [*self._calls]
        self._ray.wait(running, num_returns=len(running), timeout=SECONDS_TO_STOP) if running else None


def cause(error: Exception) -> Exception:
    """The worker's own error under Ray's."""
    return getattr(error, "cause", None) or error


def _ended(error: Exception) -> str:
    return f"the worker has ended: {type(error).__name__}: {first_line(error)}"


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
