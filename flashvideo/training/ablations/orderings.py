"""The orderings that are asked of tables: read from a file that was written before anything was measured."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import build, load_toml
from .results import Claim

FILE = Path(__file__).resolve().parents[1] / "configs" / "ablations" / "orderings.toml"


@dataclass(frozen=True)
class Ordering:
    """The row `better` beats each row of `worse` in each metric, or is no worse than by `within` if that is given."""

    better: str
    worse: tuple[str, ...]
    metrics: tuple[str, ...]
    within: float = -1.0  # below 0: it must be better


def all_orderings(path: Path = FILE) -> dict[str, list[Ordering]]:
    """The orderings of every table, by its key. Raises TrainingError for a file that isn't one."""
    plain: dict[str, Any] = {name: table for name, table in load_toml(path).items() if name != "date"}
    return {key: [build(Ordering, each, f"{path.name} {key}") for each in table] for key, table in plain.items()}


def date(path: Path = FILE) -> str:
    """When they were written down."""
    return load_toml(path)["date"]


def claims(key: str, rows: Collection[str]) -> list[Claim]:
    """What is asked of a table that has these rows."""
    return [
        Claim(metric, ordering.better, worse, None if ordering.within < 0 else ordering.within)
        for ordering in all_orderings().get(key, [])
        for worse in ordering.worse
        for metric in ordering.metrics
        if ordering.better in rows and worse in rows
    ]
