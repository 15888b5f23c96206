"""The order of the files: where several processes share them, none is left with a long one at the end."""

from __future__ import annotations

from collections import Counter

import pytest


def slow_first(items: list[pytest.Item]) -> None:
    """Put files with slow tests before the others, those with most of them first; within a file nothing moves."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
