"""Tasks on the workers of a Ray cluster: one actor a card, which keeps its networks from task to task.

Ray places the actors, starts a new one where one has ended, and gives that its task again. Ray is imported only here,
and only once a cluster is wanted.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import CommandError

RETRIES = 5  # of a task whose worker ends: what ends every worker isn't tried for ever
CORES_A_WORKER = 4  # without cards
SECONDS_TO_ANSWER = 5.0
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_START = 60.0  # of a worker in an idle cluster, generously
SECONDS_TO_STOP = 20.0
_STORE_BYTES = 80 * 2**20  # of a local cluster's object store, where nothing large goes
_LONGEST_FOLDER = 27  # of characters: Ray's sockets below it take up to 80 more, and 107 are allowed
_CONTROL = "control"  # methods that answer while a task runs
_ROOT = Path(__file__).resolve().parents[2]  # of the package: workers import the driver's

Report = Callable[[str, float, int], None]
Say = Callable[[str], None]
Work = Callable[[Any, Report, Say], Any]  # task, progress by phases, messages -> result
Prepare = Callable[[], Work]


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


class NoClusterError(CommandError):
    """A cluster can't be used; it may be starting."""


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
        result = self._work(task, self._report, self._texts.append)
        return result, self._drained()

    def news(self) -> tuple[tuple[str, float, int] | None, list[str]]:
        """The running task's phase with what is done and all there is to do, and its messages since the last call."""
        return self._at, self._drained()

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


@dataclass(frozen=True)
class FarmOptions:
    """`address`: of a running cluster's head, None to start a cluster here. `workers`: how many, None for one a card or
    one for every few cores. `cards`: whether a worker needs a card, where there are any.
    """

    address: str | None
    workers: int | None
    cards: bool


def check_farm(options: FarmOptions) -> None:
    """Raise CommandError without Ray, and for a cluster that doesn't answer."""
    if importlib.util.find_spec("ray") is None:
        raise CommandError("--ray needs the package ray: pip install 'comfyui-flashvideo[ray]'.")
    if options.address is not None and not answers(options.address):
        raise CommandError(f"No Ray cluster answers at {options.address}: ray start --head starts one there.")


def answers(address: str) -> bool:
    """Whether something listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError):
        return False
    return True


@contextmanager
def cluster_folder() -> Iterator[str]:
    """A temporary folder for a cluster that begins and ends within the context."""
    base = tempfile.gettempdir()
    folder = tempfile.mkdtemp(
        prefix="fv-ray-", dir="/tmp" if os.name == "posix" and len(base) > _LONGEST_FOLDER else base
    )
    try:
        yield folder
    finally:
        end = time.monotonic() + SECONDS_TO_STOP
        while Path(folder).exists() and time.monotonic() < end:  # its processes may still be ending
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.1)


class Farm:
    """A connection to a cluster, or a cluster of its own; a context that ends it."""

    def __init__(self, options: FarmOptions, folder: str) -> None:
        """`folder`: `cluster_folder`'s, for a cluster of its own. Raises NoClusterError."""
        self.options, self._folder = options, folder
        # Read when Ray is imported: nothing of its own on the user's terminal, no statistics sent to its makers.
        for name, value in (("BACKEND_LOG_LEVEL", "fatal"), ("USAGE_STATS_ENABLED", "0")):
            os.environ.setdefault(f"RAY_{name}", value)
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
        _choose_token(local=options.address is None)
        import ray

        self._ray = ray
        try:
            ray.init(
                **self._place(),
                job_config=ray.job_config.JobConfig(_py_driver_sys_path=[str(_ROOT)]),
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        except BaseException as error:
            ray.shutdown()
            if not isinstance(error, Exception):
                raise
            where = "here" if options.address is None else f"at {options.address}"
            raise NoClusterError(f"The Ray cluster {where} can't be used: {_first_line(error)}") from error

    def _place(self) -> dict[str, Any]:
        if self.options.address is not None:
            return {"address": self.options.address}
        cores = os.cpu_count() or 1
        return {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": _STORE_BYTES,
            "num_cpus": max(cores, self.options.workers or 1),
            "_temp_dir": self._folder,
        }

    def __enter__(self) -> Farm:
        """Connected already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the cluster: its workers for this run end."""
        self._ray.shutdown()

    def heartbeat(self) -> None:
        """Ask the cluster's head something; only comes back while the head that was met first is there."""
        self._ray.nodes()

    def run(self, prepare: Prepare, tasks: Iterable[Any], watcher: Watcher) -> None:
        """Do the tasks, which begin in the order given. Raises CommandError if no worker can be made ready."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        count, needs = shared_out(nodes, self.options)
        tasks = deque(tasks)
        actor = self._ray.remote(**needs, max_restarts=-1, max_task_retries=RETRIES, concurrency_groups={_CONTROL: 1})(
            Worker
        )
        members = [_Member(actor.remote(prepare)) for _ in range(min(count, len(tasks)))]
        _Run(self._ray, members, tasks, watcher).run()


class _Member:
    """An actor, and what it does."""

    def __init__(self, actor: Any) -> None:
        self.actor, self.task, self.busy = actor, None, False
        self.looked = 0.0

    def ask(self, method: str) -> Any:
        """Call a method that answers while a task runs."""
        return getattr(self.actor, method).options(concurrency_group=_CONTROL, max_task_retries=0).remote()


class _Run:
    """One call of `Farm.run`. `_calls`: what to do with the answer to each call that is under way."""

    def __init__(self, ray: Any, members: Sequence[_Member], tasks: deque, watcher: Watcher) -> None:
        self._ray, self._members, self._tasks, self._watcher = ray, list(members), tasks, watcher
        self._calls: dict[Any, Callable[[Any], None]] = {}
        self._refusal: Exception | None = None
        self._ready = False

    def run(self) -> None:
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

    def _call(self, ref: Any, member: _Member, then: Callable[[_Member, Any], None]) -> None:
        self._calls[ref] = lambda ref: then(member, ref)

    def _loaded(self, member: _Member, ref: Any) -> None:
        try:
            self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            reason = _cause(error)
            self._refusal = reason if isinstance(reason, CommandError) else CommandError(_ended(reason))
            self._members.remove(member)
            self._ray.kill(member.actor)
            if self._members:
                self._watcher.warn(f"A worker can't be used: {self._refusal}")
        else:
            self._ready = True
            self._next(member)

    def _next(self, member: _Member) -> None:
        """Give a worker its next task; without one it ends, for another that waits for its place."""
        member.busy = bool(self._tasks)
        if member.busy:
            member.task, member.looked = self._tasks.popleft(), time.monotonic()
            self._call(member.actor.do.remote(member.task), member, self._done)
        else:
            self._members.remove(member)
            self._ray.kill(member.actor)

    def _done(self, member: _Member, ref: Any) -> None:
        task, errors = member.task, self._ray.exceptions
        try:
            result, texts = self._ray.get(ref)
        except errors.RayActorError:
            # Were the head gone, so would be its workers; then this process ends, and no task has failed.
            time.sleep(SECONDS_TO_ANSWER)
            self._ray.nodes()
            self._watcher.failed(task, f"its worker has ended {RETRIES + 1} times.")
        except errors.RayError as error:
            self._watcher.failed(task, _ended(_cause(error)))
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
            if member.busy and now - member.looked > SECONDS_BETWEEN_LOOKS:
                member.looked = float("inf")  # until this look is answered
                task = member.task
                self._call(member.ask("news"), member, lambda member, ref, task=task: self._heard(member, ref, task))

    def _heard(self, member: _Member, ref: Any, task: Any) -> None:
        member.looked = time.monotonic()
        try:
            at, texts = self._ray.get(ref)
        except self._ray.exceptions.RayError:
            return  # it is being replaced
        for text in texts:
            self._watcher.message(task, text)
        if at is not None and member.task is task:
            self._watcher.progress(task, *at)

    def _stop(self) -> None:
        """Let the tasks end at their next step, so that they leave nothing half-written."""
        for member in self._members:
            member.ask("stop")
        running = [*self._calls]
        self._ray.wait(running, num_returns=len(running), timeout=SECONDS_TO_STOP) if running else None


def shared_out(nodes: Sequence[Mapping[str, float]], options: FarmOptions) -> tuple[int, dict[str, int]]:
    """How many workers machines with these resources take, and what each needs. Raises CommandError for too many."""
    cards = sum(int(node.get("GPU", 0)) for node in nodes) if options.cards else 0
    if cards:
        _check_count(options.workers, cards, "cards")
        cores = min(int(node.get("CPU", 0) // node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1)
        return options.workers or cards, {"num_gpus": 1, "num_cpus": cores}
    cores = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    _check_count(options.workers, sum(cores), "cores")
    count = options.workers or sum(max(1, each // CORES_A_WORKER) for each in cores)
    share = next(share for share in range(max(cores), 0, -1) if sum(each // share for each in cores) >= count)
    return count, {"num_cpus": share}


def _check_count(workers: int | None, there: int, what: str) -> None:
    if not there:
        raise CommandError("The Ray cluster has no machine to compute on.")
    if workers is not None and workers > there:
        raise CommandError(f"--workers {workers} is too many: the cluster has {there} {what}.")


def _choose_token(*, local: bool) -> None:
    """Let Ray guard a cluster of our own with a token that is stored nowhere; elsewhere show the one that is there."""
    if "RAY_AUTH_MODE" in os.environ:
        return
    names = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if local:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    elif any(name in os.environ for name in names) or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ["RAY_AUTH_MODE"] = "token"


def _cause(error: Exception) -> Exception:
    """The worker's own error under Ray's."""
    return getattr(error, "cause", None) or error


def _ended(error: Exception) -> str:
    return f"the worker has ended: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
