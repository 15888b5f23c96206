"""A Ray cluster as a user starts it, for tests."""

from __future__ import annotations

import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 600  # seconds; far beyond what it takes, even on a busy machine


class Head:
    """A cluster of one machine, as a user starts it."""

    def __init__(self, cores: int) -> None:
        self.cores, self.process = cores, None
        self.folder = tempfile.mkdtemp(prefix="r-", dir="/tmp")  # names of sockets must be short
        with socket.socket() as found:
            found.bind(("", 0))
            self.port = found.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start it on its port, with a token that stays here; again if Ray gives up, as it does on a busy machine."""
        options = {"--port": self.port, "--num-cpus": self.cores, "--temp-dir": self.folder}
        options |= {"--include-dashboard": "false", "--object-store-memory": 80 * 2**20}
        words = [f"{name}={value}" for name, value in options.items()]
        log = Path(self.folder) / "start.txt"
        for _ in range(3):
            with log.open("w") as output:
                self.process = psutil.Popen(
                    [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *words],
                    stdout=output, stderr=output, cwd=ROOT,
                )  # fmt: skip
            while self.process.poll() is None:
                if "Ray runtime started" in log.read_text():
                    return
                time.sleep(0.1)
            self.kill()
        pytest.fail(log.read_text())

    def workers(self, work: str = ".do") -> list[psutil.Process]:
        """The actors' processes that begin with a clip (.do), that help with one (.assist), or all ("")."""
        found = []
        for process in self.process.children(recursive=True):
            try:
                found += [process] if "".join(process.cmdline()).startswith(f"ray::Worker{work}") else []
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return found

    def kill(self) -> None:
        """End all of its processes at once."""
        family = [each for each in psutil.process_iter(["cmdline"]) if self.folder in str(each.info["cmdline"])]
        if self.process.poll() is None:
            family += self.process.children(recursive=True)
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=PATIENCE)
        self.process.wait()


def started_head(cores: int) -> Iterator[Head]:
    """What a fixture yields: a cluster of one machine, on one thread a worker, that asks for a token."""
    pytest.importorskip("ray")
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment["RAY_worker_niceness"] = "0"  # else workers starve on a busy machine
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment, "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        cluster = Head(cores)
        yield cluster
        cluster.kill()
        shutil.rmtree(cluster.folder)
