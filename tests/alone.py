"""The library alone, for the conftest.py of its folders: `import flashvideo` finds it, and ComfyUI is nowhere."""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from typing import Any

import pytest


class _FlashVideoFinder:
    """Finds the package `flashvideo` and nothing else.

    The repository's root on `sys.path` would do too, but then `import nodes` would find the pack's nodes, also in a
    test that means ComfyUI's.
    """

    ROOT = str(Path(__file__).resolve().parents[1])

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """The package's spec; None for every other module (submodules are found through the package)."""
        return importlib.machinery.PathFinder.find_spec(name, [cls.ROOT]) if name == "flashvideo" else None


sys.meta_path.insert(0, _FlashVideoFinder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first."""
    from slow_first import slow_first

    slow_first(items)


@pytest.fixture(scope="module")
def tiny_networks() -> Any:
    """Stage II, VAE and prompt (`refiner.Networks`), small enough for many runs, with random weights."""
    from small_models import tiny_networks

    return tiny_networks()


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A small tokenizer in T5's format: words of the procedural captions, </s> at the end, padding 0."""
    pytest.importorskip("tokenizers")
    from small_models import write_tokenizer

    write_tokenizer(tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, and nowhere else."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder
