"""Training settings: frozen dataclasses, read from TOML files with every mistake named."""

from __future__ import annotations

import dataclasses
import importlib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..config import TRAIN_STEPS
from .errors import TrainingError

Settings = TypeVar("Settings")


def check_strengths(strengths: tuple[int, int], key: str) -> None:
    """Refuse what is no range of degradation strengths; `key` names it as in a config."""
    low, high = strengths
    if not 0 <= low <= high < TRAIN_STEPS:
        raise TrainingError(f"{key} must be two of 0 to {TRAIN_STEPS - 1}, the smaller first; got {low} and {high}.")


@dataclass(frozen=True)
class LoopSettings:
    """How one network is optimised. Steps are optimiser steps; each takes `accumulate` batches."""

    steps: int  # length of the learning-rate schedule, after which training is done
    learning_rate: float
    optimiser: str = "adamw"  # or "muon", which learns in fewer steps
    warmup: int = 100  # steps in which the learning rate rises from 0
    final_rate: float = 0.05  # of `learning_rate`, where the cosine ends
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip: float = 1.0  # largest norm of the gradient
    accumulate: int = 1
    ema: float = 0.999  # decay of the weights' running mean, which is what is validated and exported
    bf16: bool = True  # bfloat16 autocast on CUDA
    bf16_cpu: bool = True  # and on the CPU, if it has bfloat16 instructions
    workers: int = 0  # processes that make batches
    threads: int = 0  # CPU threads; 0 leaves it to PyTorch
    log_every: int = 10
    validate_every: int = 500
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        """Refuse numbers that can't train."""
        if self.optimiser not in ("adamw", "muon"):
            raise TrainingError(f"[loop] optimiser must be adamw or muon; got {self.optimiser!r}.")
        for name in ("steps", "accumulate", "log_every", "validate_every", "checkpoint_every", "learning_rate"):
            if getattr(self, name) <= 0:
                raise TrainingError(f"[loop] {name} must be above 0; got {getattr(self, name)}.")
        if not 0 <= self.ema < 1:
            raise TrainingError(f"[loop] ema must be at least 0 and below 1; got {self.ema}.")


def load_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises TrainingError if it isn't there or isn't TOML."""
    parser = _toml_parser()
    try:
        return parser.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise TrainingError(f"{path}: there is no such config file.") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise TrainingError(f"{path} is not a readable TOML file: {error}.") from error


def _toml_parser() -> types.ModuleType:
    """Return tomllib, which Python has from 3.11 on, or tomli, which is the same for 3.10."""
    for name in ("tomllib", "tomli"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise TrainingError("Reading a training config needs Python 3.11 or newer; on 3.10, first `pip install tomli`.")


def build(kind: type[Settings], table: Mapping[str, Any], where: str) -> Settings:
    """Make a settings dataclass from a TOML table; `where` names the table in messages.

    Nested dataclasses come from nested tables, tuples of them from arrays of tables. Raises TrainingError for an
    unknown or missing key and for a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(table) - set(fields)):
        raise TrainingError(f"{where}: unknown setting {unknown[0]!r}; there are {', '.join(fields)}.")
    hints = typing.get_type_hints(kind)
    values = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _convert(hints[name], table[name], f"{where} {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise TrainingError(f"{where}: the setting {name!r} is missing.")
    return kind(**values)


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise TrainingError(f"{where} must be a table; got {value!r}.")
        return build(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, list) or (arguments[-1] is not Ellipsis and len(value) != len(arguments)):
            count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
            raise TrainingError(f"{where} must be a list of {count}values; got {value!r}.")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_convert(item, entry, where) for item, entry in zip(kinds, value, strict=True))
    if kind is float and type(value) is int:
        value = float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise TrainingError(f"{where} must be a finite number; got {value}.")
    if kind is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not kind:
        raise TrainingError(f"{where} must be of type {kind.__name__}; got {value!r}.")
    return value
