"""Processes that begin with PyTorch imported: a server imports it once, and they are forked from there.

They are processes like all others, with their own memory, signals and exit codes. What they don't show is how Python
itself starts and ends: each kind of program has one test that starts it as users do.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["forked_imports"])

Pipe = _CONTEXT.Pipe


def fork(run: Callable[..., object], *arguments: Any) -> BaseProcess:
    """A process that calls a function of a module."""
    process = _CONTEXT.Process(target=run, args=arguments)
    # The server, which imports for all of them, finds modules there, and nowhere else.
    with patch.dict(os.environ, PYTHONPATH=str(TESTS)):
        process.start()
    return process


def fork_program(
    words: Sequence[str | Path], folder: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """`python WORDS`, a file or "-m" and a module, on one thread; `folder` gets stdout.txt and stderr.txt.

    `environment` is added to this process's.
    """
    return fork(_run_program, [str(word) for word in words], folder, {**os.environ, **(environment or {})})


def _run_program(words: list[str], folder: Path, environment: dict[str, str]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    sys.path[:] = [path for path in sys.path if path and Path(path) != ROOT and not Path(path).is_relative_to(TESTS)]
    try:
        if words[0] == "-m":
            sys.path.insert(0, str(ROOT))
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            for name in [name for name in sys.modules if name.partition(".")[0] == "flashvideo"]:
                del sys.modules[name]  # the program must find it
            sys.path.insert(0, str(Path(words[0]).parent))
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
