"""The commands: `python -m flashvideo convert|info|models|plan|generate|refine|compare|train|ablate|bench`."""

from __future__ import annotations

import argparse
import importlib.util
import io
import re
import sys
from pathlib import Path

from ..arguments import Parser
from ..checkpoints import CheckpointError
from ..devices import is_out_of_memory
from ..errors import CommandError, cancelled
from ..parallel import processes
from .bench import add_bench
from .compare import add_compare
from .convert import add_convert, add_info
from .generate import add_generate
from .models import add_models
from .on_ranks import run_on_ranks, silence_other_ranks
from .plan import add_plan
from .refine import add_refine
from .terminal import REPOSITORY

_PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
_ELSEWHERE = "not in this download, only in the repository"
_EPILOG = "COMMAND --help tells what a command does and takes."


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code.

    0: done. 1: refused, with a message. 2: the command line is wrong. 3: done as far as the damaged source allows.
    4: a plan is beyond its budget. 130: cancelled (143 by SIGTERM).
    """
    silence_other_ranks()
    parser = Parser(prog="python -m flashvideo", description="FlashVideo without ComfyUI.", epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"ComfyUI-FlashVideo {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    models = (add_convert, add_info, add_models)
    for add_command in (*models, add_plan, add_generate, add_refine, add_compare, _add_training, add_bench):
        add_command(commands)
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name that the terminal can't show must not end the command
            stream.reconfigure(errors="backslashreplace")
    try:
        return (run_on_ranks(options, _explained) if processes() > 1 else options.run(options)) or 0
    except Exception as error:
        message = _explained(error)
        if message is None:
            raise
        sys.stderr.write(f"{message}\n")
        return 1
    except KeyboardInterrupt:
        return cancelled("Cancelled; nothing was written.")


def _explained(error: BaseException) -> str | None:
    """The message for an error; None for one that is a fault of the program."""
    if isinstance(error, CommandError):
        return error.with_hint
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'file'}: {error.strerror}"
    if is_out_of_memory(error):
        return f"Out of memory: {str(error).splitlines()[0] if str(error) else 'no memory is left'}"
    return None


def _version() -> str:
    """The pack's version, which stands in pyproject.toml alone; "unknown" where that was left behind."""
    found = re.search(r'^version = "(.+)"$', _PROJECT.read_text(encoding="utf-8"), re.M) if _PROJECT.is_file() else None
    return found.group(1) if found else "unknown"


def _add_training(commands: argparse._SubParsersAction) -> None:
    if importlib.util.find_spec("..training", __package__):
        from ..training.ablations.command import add_ablate
        from ..training.command import add_train

        add_train(commands)
        add_ablate(commands)
        return
    # The registry's download has no training.
    for name in ("train", "ablate"):
        parser = commands.add_parser(name, help=_ELSEWHERE, description=f"{name} is {_ELSEWHERE}: {REPOSITORY}")
        parser.add_argument("rest", nargs=argparse.REMAINDER)
        parser.set_defaults(run=_no_training)


def _no_training(_options: argparse.Namespace) -> None:
    raise CommandError(f"Training is not part of this download. Clone {REPOSITORY} to train.")
