"""Starts a real ComfyUI with this pack in it, on a free port of this machine, and always stops it again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from .bed import PACK_NAME, ROOT, Bed
from .comfy_client import ComfyClient

_START_PATIENCE_SECONDS = 240  # since the log's last line
_STOP_PATIENCE_SECONDS = 10
_PORT_TRIES = 3
_PORT_TAKEN = ("address already in use", "Only one usage of each socket address")
# On a CPU glibc gives large tensors back to the system when they are freed, and asks for new pages for the next one:
# a fifth of the time of a VAE's decoding (docs/performance.md). With these it keeps them; other systems ignore them.
_KEEP_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
}
_FOLDERS = ("custom_nodes", "input", "output", "temp", "models", "user/default")


class ServerError(RuntimeError):
    """ComfyUI did not start, or started without the pack; the message ends with its log's last lines."""


class ComfyServer:
    """A running ComfyUI. Use as a context manager.

    Args:
        bed: which ComfyUI, and the Python that runs it.
        base: folder for models, input, output, custom_nodes and user data; made if missing.
        with_pack: link this pack into custom_nodes.
        device_options: how ComfyUI picks its device; None means `--cpu` if torch finds no GPU.
        options: further command-line options of ComfyUI.
        packages: a folder of Python packages that ComfyUI's own Python lacks, for other packs' nodes.

    Attributes: `address`, `log` (file), `input`, `output` (folders), `import_failures` (log lines of other nodes that
    could not be imported).
    """

    def __init__(
        self,
        bed: Bed,
        base: Path,
        *,
        with_pack: bool = True,
        device_options: Sequence[str] | None = None,
        options: Sequence[str] = (),
        packages: Path | None = None,
    ) -> None:
        self.bed = bed
        self.base = base
        self.with_pack = with_pack
        self.log = base / "comfyui.log"
        self.input = base / "input"
        self.output = base / "output"
        self.address = ""
        self.import_failures: list[str] = []
        self._device_options = _device_options(bed) if device_options is None else device_options
        self._options = options
        self._packages = packages
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ComfyServer:
        _prepare(self.base, self.with_pack)
        try:
            for last_try in [False] * (_PORT_TRIES - 1) + [True]:
                if self._start(last_try):
                    break
            self._check_imports()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def client(self) -> ComfyClient:
        """A new client of this server, to be used as a context manager."""
        return ComfyClient(self.address)

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        if self._process is None:
            raise ServerError("ComfyUI is not running.")
        return self._process.pid

    def stop(self) -> None:
        """Stop ComfyUI and everything that it started. Harmless if it has ended already."""
        process, self._process = self._process, None
        if process is None:
            return
        for sign in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
            _signal_group(process, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_PATIENCE_SECONDS)
                break
        if os.name != "nt":
            _signal_group(process, signal.SIGKILL)  # what it started and left behind

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of ComfyUI's log."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def _start(self, last_try: bool) -> bool:
        """Start and wait until the server answers. False if another program took the port in between."""
        port = _free_port()
        environment = self.bed.environment()
        if "--cpu" in self._device_options:
            environment = {**_KEEP_PAGES, **environment}
        if self._packages is not None:
            path = environment.get("PYTHONPATH"), str(self._packages)  # last: ComfyUI's own versions win
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        self.address = f"http://127.0.0.1:{port}"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(port), cwd=self.bed.comfyui, env=environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        written, since = 0, time.monotonic()
        while time.monotonic() - since < _START_PATIENCE_SECONDS:
            if self._process.poll() is not None:
                tail = self.log_tail()
                if not last_try and any(words.lower() in tail.lower() for words in _PORT_TAKEN):
                    return False
                raise ServerError(f"ComfyUI stopped while starting (log: {self.log}):\n{tail}")
            if _answers(self.address):
                return True
            if (size := self.log.stat().st_size) > written:
                written, since = size, time.monotonic()
            time.sleep(0.2)
        patience = f"{_START_PATIENCE_SECONDS} s"
        raise ServerError(f"ComfyUI neither answered nor logged for {patience} (log: {self.log}):\n{self.log_tail()}")

    def _command(self, port: int) -> list[str]:
        database = (self.base / "user" / "comfyui.db").resolve().as_posix()
        return [
            self.bed.python, "-s", "main.py", "--listen", "127.0.0.1", "--port", str(port),
            "--base-directory", str(self.base.resolve()), "--database-url", f"sqlite:///{database}",
            "--disable-auto-launch", "--disable-api-nodes", "--preview-method", "auto",
            *self._device_options, *self._options,
        ]  # fmt: skip

    def _check_imports(self) -> None:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        self.import_failures = [line.strip() for line in text.splitlines() if "IMPORT FAILED" in line]
        if self.with_pack and any(PACK_NAME in line for line in self.import_failures):
            raise ServerError(f"ComfyUI could not import {PACK_NAME} (log: {self.log}):\n{self.log_tail(60)}")


def link_pack(custom_nodes: Path) -> Path:
    """Link the project's folder into custom_nodes under the pack's name; returns the link."""
    link = custom_nodes / PACK_NAME
    if link.exists() and link.resolve() == ROOT:  # also a junction, which is no symbolic link
        return link
    if link.is_symlink():
        link.unlink()
    try:
        link.symlink_to(ROOT, target_is_directory=True)
    except OSError:
        if os.name != "nt" or link.exists():
            raise
        # Windows lets everyone make junctions, but not symbolic links.
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(ROOT)], check=True, capture_output=True)
    return link


def _prepare(base: Path, with_pack: bool) -> None:
    for name in _FOLDERS:
        (base / name).mkdir(parents=True, exist_ok=True)
    settings = base / "user" / "default" / "comfy.settings.json"
    if not settings.exists():  # without it the page opens its tutorial over the graph
        settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}), encoding="utf-8")
    if with_pack:
        link_pack(base / "custom_nodes")


def _device_options(bed: Bed) -> list[str]:
    check = "import torch, sys; x = getattr(torch, 'xpu', None); m = torch.backends.mps; " \
            "sys.exit(not (torch.cuda.is_available() or m.is_available() or (x and x.is_available())))"  # fmt: skip
    has_gpu = subprocess.run([bed.python, "-c", check], env=bed.environment(), check=False).returncode == 0
    return [] if has_gpu else ["--cpu"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(address: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{address}/system_stats", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _signal_group(process: subprocess.Popen[bytes], sign: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.name == "nt":
            process.terminate()
        else:
            os.killpg(process.pid, sign)
