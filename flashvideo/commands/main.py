"""The commands: `python -m flashvideo convert|info|models|plan|generate|refine|compare|train|ablate|bench`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import re
import sys
from pathlib import Path
from typing import NamedTuple

from ..arguments import Parser
from ..devices import is_out_of_memory
from ..errors import CheckpointError, CommandError, cancelled
from .bench import benchmarks
from .terminal import REPOSITORY
from .torchrun import own_rank, processes

_PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
_ELSEWHERE = "not in this download, only in the repository"
_EPILOG = "COMMAND --help tells what a command does and takes."


class _Command(NamedTuple):
    """Where a command is: a module, and the function in it that adds the command; its line in the list of commands."""

    module: str
    add: str
    help: str


# A module is imported only when its command is asked for: most of them bring PyTorch, which takes seconds.
_COMMANDS = {
    "convert": _Command(".convert", "add_convert", "convert a model or a LoRA to safetensors with ComfyUI's names"),
    "info": _Command(".convert", "add_info", "describe a model file"),
    "models": _Command(".models", "add_models", "list, verify or download the model files"),
    "plan": _Command(".plan", "add_plan", "estimate memory and time of a video before it is made"),
    "generate": _Command(".generate", "add_generate", "make a video from words"),
    "refine": _Command(".refine", "add_refine", "refine a video, a picture or a folder of videos"),
    "compare": _Command(".compare", "add_compare", "show versions of a video on one page, with a slider between"),
    "train": _Command("..training.command", "add_train", "train FlashVideo-Nano, or fine-tune the official weights"),
    "ablate": _Command(
        "..training.ablations.command",
        "add_ablate",
        "repeat the paper's tables with FlashVideo-Nano, and write docs/ablations.md",
    ),
    "bench": _Command(".bench", "add_bench", "measure speed and memory beside peers"),
}
_TRAINING = ("train", "ablate")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code.

    0: done. 1: refused, with a message. 2: the command line is wrong. 3: done as far as the damaged source allows.
    4: a plan is beyond its budget. 130: cancelled (143 by SIGTERM).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if own_rank():
        from .on_ranks import silence_other_ranks

        silence_other_ranks()
    options = _parser(arguments).parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name that the terminal can't show must not end the command
            stream.reconfigure(errors="backslashreplace")
    try:
        if processes() > 1:
            from .on_ranks import run_on_ranks

            return run_on_ranks(options, _explained) or 0
        return options.run(options) or 0
    except Exception as error:
        message = _explained(error)
        if message is None:
            raise
        sys.stderr.write(f"{message}\n")
        return 1
    except KeyboardInterrupt:
        return cancelled("Cancelled; nothing was written.")


def _parser(arguments: list[str]) -> Parser:
    """The parser of a command line: of the command in it all options, of the others their names."""
    parser = Parser(prog="python -m flashvideo", description="FlashVideo without ComfyUI.", epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"ComfyUI-FlashVideo {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    asked = next((word for word in arguments if word in _COMMANDS), None)
    for name, command in _COMMANDS.items():
        if not _is_here(name):
            _add_absent(commands, name)
        elif name == asked:
            getattr(importlib.import_module(command.module, __package__), command.add)(commands)
        else:
            commands.add_parser(name, help=command.help)
    return parser


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


def _is_here(name: str) -> bool:
    """Whether a command is in this download; the registry's has no training and no benchmarks."""
    if name in _TRAINING:
        return importlib.util.find_spec("..training", __package__) is not None
    return name != "bench" or bool(benchmarks())


def _add_absent(commands: argparse._SubParsersAction, name: str) -> None:
    """Add a command that says where it is."""
    parser = commands.add_parser(name, help=_ELSEWHERE, description=f"{name} is {_ELSEWHERE}: {REPOSITORY}")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    parser.set_defaults(run=_no_training if name in _TRAINING else _no_benchmarks)


def _no_training(_options: argparse.Namespace) -> None:
    raise CommandError(f"Training is not part of this download. Clone {REPOSITORY} to train.")


def _no_benchmarks(_options: argparse.Namespace) -> None:
    raise CommandError(f"Benchmarks are not part of this download. Clone {REPOSITORY} to run them.")
