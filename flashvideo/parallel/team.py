"""Workers that help another with its task: it calls them as Ray's actors, and each call does a part of the task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .farm_run import cause, first_line

PARTS_AT_A_TIME = 2  # a helper has: one that it does, and one that it begins with at once
_SECONDS = 0.5  # of waiting


@dataclass
class _Helper:
    """`loading`: the call that ends when it has its networks; None once it has."""

    actor: Any
    loading: Any
    parts: set[Any] = field(default_factory=set)  # calls that are under way


class Team:
    """The helpers of a worker's task. They come and go while it runs: `give` is called by another thread.

    `wanted`: how many are of use; None while that isn't known. A helper that ends, or can't do its part, is told to the
    user through `say`, and its part is to be done again.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.wanted: int | None = None
        self._say, self._given, self._unfit = say, {}, set()
        self._helpers: dict[int, _Helper] = {}
        self._shared: Any = None

    def give(self, actors: Mapping[int, Any]) -> None:
        """These are the helpers from now on, by their numbers."""
        self._given = dict(actors)

    @contextmanager
    def at_work(self, wanted: int, shared: Any) -> Iterator[Team]:
        """While parts can be ordered; every part comes with `shared`."""
        import ray

        self.wanted, self._shared = wanted, ray.put(shared)
        try:
            yield self
        finally:
            self.wanted, self._shared = 0, None
            self._helpers.clear()

    def reset(self) -> None:
        """The task is over, and nothing is known of the next one."""
        self.wanted, self._given = None, {}
        self._unfit.clear()

    @property
    def places(self) -> int:
        """How many parts the helpers that are ready take at a time."""
        self._look()
        return PARTS_AT_A_TIME * len(self._ready())

    @property
    def idle(self) -> bool:
        """Whether a helper has nothing to do."""
        return any(not each.parts for each in self._ready())

    @property
    def room(self) -> bool:
        """Whether a helper takes another part."""
        return any(len(each.parts) < PARTS_AT_A_TIME for each in self._ready())

    def order(self, part: Any) -> Any:
        """Let a helper do a part; returns Ray's name for the result."""
        helper = min(self._ready(), key=lambda each: len(each.parts))
        # Not done again by Ray: that would wait for the helper to be replaced.
        order = helper.actor.assist.options(max_task_retries=0).remote(self._shared, part)
        helper.parts.add(order)
        return order

    def finished(self, orders: Sequence[Any], *, wait: bool) -> Any | None:
        """The first of some orders that is done, or None; with `wait` one that is done within a moment."""
        import ray

        done, _ = ray.wait(list(orders), timeout=_SECONDS if wait else 0)
        return done[0] if done else None

    def result(self, order: Any) -> Any | None:
        """What came of a finished order; None if it has to be done again."""
        import ray

        number, helper = next(
            ((number, each) for number, each in self._helpers.items() if order in each.parts), (None, None)
        )
        if helper is not None:
            helper.parts.remove(order)
        try:
            return ray.get(order)
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.RayTaskError):
                self._unfit.add(number)
                self._say(f"A worker can't help: {first_line(cause(error))}")
            else:
                self._say("A worker that helped has ended; its part is done again")
                if helper is not None and helper.loading is None:
                    helper.loading = helper.actor.load.remote()  # answered by the one that replaces it
            return None

    def _ready(self) -> list[_Helper]:
        return [each for each in self._helpers.values() if each.loading is None]

    def _look(self) -> None:
        """Take on the helpers that were given, and see which are ready."""
        import ray

        given = {number: actor for number, actor in self._given.items() if number not in self._unfit}
        for number in [*self._helpers]:
            if number not in given:
                del self._helpers[number]
        for number, actor in given.items():
            if number not in self._helpers:
                self._helpers[number] = _Helper(actor, actor.load.remote())
        for number, helper in [*self._helpers.items()]:
            if helper.loading is not None and ray.wait([helper.loading], timeout=0)[0]:
                try:
                    ray.get(helper.loading)
                except ray.exceptions.RayError:
                    self._unfit.add(number)
                    del self._helpers[number]
                else:
                    helper.loading = None
