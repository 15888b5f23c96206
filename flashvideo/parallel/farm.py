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
from typing import Any

from ..config import AUTO
from ..errors import CommandError
from .farm_run import CONTROL, RETRIES, SECONDS_TO_ANSWER, SECONDS_TO_STOP, FarmRun, Watcher, first_line
from .workers import Prepare, Worker

CORES_A_WORKER = 4  # without cards
_LONGEST_FOLDER = 27  # of characters: Ray's sockets below it take up to 80 more, and 107 are allowed
_ROOT = Path(__file__).resolve().parents[2]  # of the package: workers import the driver's


class NoClusterError(CommandError):
    """A cluster can't be used; it may be starting."""


@dataclass(frozen=True)
class FarmOptions:
    """`address`: of a running cluster's head, or AUTO; None to start a cluster here. `workers`: how many, None for one
    a card or one for every few cores. `cards`: whether a worker needs a card, where there are any.
    """

    address: str | None
    workers: int | None
    cards: bool


def check_farm(options: FarmOptions) -> None:
    """Raise CommandError without Ray, and for a cluster that doesn't answer."""
    if importlib.util.find_spec("ray") is None:
        raise CommandError("A Ray cluster needs the package ray: pip install 'comfyui-flashvideo[ray]'.")
    if options.address is not None and not answers(options.address):
        raise CommandError(f"No Ray cluster answers at {options.address}: ray start --head starts one there.")


def answers(address: str) -> bool:
    """Whether something listens at HOST:PORT; of AUTO only Ray knows."""
    if address == AUTO:
        return True
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
            where = {None: "here", AUTO: "of this machine"}.get(options.address, f"at {options.address}")
            raise NoClusterError(f"The Ray cluster {where} can't be used: {first_line(error)}") from error

    def _place(self) -> dict[str, Any]:
        if self.options.address is not None:
            return {"address": self.options.address}
        cores = os.cpu_count() or 1
        return {
            "address": "local",
            "include_dashboard": False,
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

    def run(
        self, prepare: Prepare, tasks: Iterable[Any], watcher: Watcher, parts: Callable[[Any], int] = lambda _: 1
    ) -> None:
        """Do the tasks, which begin in the order given. Raises CommandError if no worker can be made ready.

        `parts`: how many workers can work at a task together. Those that have no task of their own help.
        """
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        count, needs = shared_out(nodes, self.options)
        tasks = deque(tasks)
        actor = self._ray.remote(**needs, max_restarts=-1, max_task_retries=RETRIES, concurrency_groups={CONTROL: 1})(
            Worker
        )
        actors = [actor.remote(prepare) for _ in range(min(count, sum(map(parts, tasks))))]
        FarmRun(self._ray, actors, tasks, watcher, parts).run()


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
