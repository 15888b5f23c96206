"""Measured tables: rows of numbers and pictures, and the orderings that are expected of them."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..loop.checkpointing import write_whole
from .evaluation import Measured
from .measures import METRICS, mean_of


@dataclass(frozen=True)
class Row:
    """A compared method and its results: numbers of each clip by name, and the paths of pictures."""

    label: str
    clips: dict[str, dict[str, float]]
    pictures: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, label: str, measured: dict[str, Measured]) -> Row:
        """Gather what was measured on a suite."""
        return cls(
            label,
            {name: each.values for name, each in measured.items()},
            {name: str(each.picture) for name, each in measured.items()},
        )

    def mean(self, clips: list[str]) -> dict[str, float]:
        """Mean over the clips of these names."""
        return mean_of([self.clips[name] for name in clips if name in self.clips])


@dataclass(frozen=True)
class Claim:
    """An ordering of the paper: `better` is better than `worse` in a metric, or no worse than by `within`."""

    metric: str
    better: str  # the rows' labels
    worse: str
    within: float | None = None


@dataclass(frozen=True)
class Finding:
    """Whether a claim holds."""

    claim: Claim
    holds: bool
    better: float
    worse: float
    wins: int  # clips on which it holds
    clips: int


@dataclass(frozen=True)
class TableResult:
    """A measured table, as it is kept between runs."""

    key: str
    title: str
    about: str  # what was compared, and what the paper found
    procedural: list[str]  # names of the clips that means are taken over
    real: list[str]
    metrics: list[str]
    rows: list[Row]
    claims: list[Claim]
    shown: list[str] = field(default_factory=list)  # labels of the rows in the picture; empty for none
    facts: dict[str, str] = field(default_factory=dict)  # device, date, size, ...

    def row(self, label: str) -> Row:
        """The row of a label."""
        return next(row for row in self.rows if row.label == label)

    def findings(self, clips: list[str]) -> list[Finding]:
        """Whether the claims hold, on the mean over these clips and on each of them."""
        return [self._finding(claim, clips) for claim in self.claims] if clips else []

    def _finding(self, claim: Claim, clips: list[str]) -> Finding:
        better, worse = self.row(claim.better), self.row(claim.worse)
        pairs = [(better.clips[name][claim.metric], worse.clips[name][claim.metric]) for name in clips]
        means = better.mean(clips)[claim.metric], worse.mean(clips)[claim.metric]
        wins = sum(holds(claim, *pair) for pair in pairs)
        return Finding(claim, holds(claim, *means), *means, wins, len(clips))

    def save(self, folder: Path) -> None:
        """Keep it in a folder of tables."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        write_whole(folder / f"{self.key}.json", lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: Path) -> TableResult:
        """Read what `save` wrote."""
        plain: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        plain["rows"] = [Row(**row) for row in plain["rows"]]
        plain["claims"] = [Claim(**claim) for claim in plain["claims"]]
        return cls(**plain)


def holds(claim: Claim, better: float, worse: float) -> bool:
    """Whether two numbers are ordered as a claim expects. With a missing number they are not."""
    if math.isnan(better) or math.isnan(worse):
        return False
    lead = better - worse if METRICS[claim.metric].better == "higher" else worse - better
    if better == worse:  # two infinities, too
        lead = 0.0
    return lead > 0 if claim.within is None else lead >= -claim.within
