"""From ways to a finished draft to a table: measured rows, what is asked of them, and facts."""

from __future__ import annotations

from collections.abc import Sequence

from .clips import Suite
from .evaluation import Method
from .lab import Lab
from .orderings import claims
from .results import Row, TableResult

TRUTH_ROW = "truth"


def table_of(
    lab: Lab,
    key: str,
    title: str,
    about: str,
    ways: Sequence[tuple[str, Method]],
    suite: Suite,
    facts: dict[str, str] | None = None,
) -> TableResult:
    """Measure ways, each with its label, on a suite."""
    return table_of_rows(lab, key, title, about, lab.rows(ways, suite), suite, facts)


def table_of_rows(
    lab: Lab,
    key: str,
    title: str,
    about: str,
    rows: list[Row],
    suite: Suite,
    facts: dict[str, str] | None = None,
) -> TableResult:
    """A table of rows that were measured on a suite, or on others with the same clips in other sizes."""
    names, labels = suite.names, [row.label for row in rows]
    strength = {"strength": lab.said_strength(suite)}
    return TableResult(
        key=key,
        title=title,
        about=about,
        procedural=names[: suite.count],
        real=names[suite.count :],
        metrics=[*rows[0].clips[names[0]]],
        rows=rows,
        claims=claims(key, labels),
        shown=labels,
        facts=lab.facts(**lab.clip_facts(suite), **{**strength, **(facts or {})}),
    )
