"""The library alone: `import flashvideo` finds it, and ComfyUI is nowhere."""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path


class _FlashVideoFinder:
    """Finds the package `flashvideo` and nothing else.

    The repository's root on `sys.path` would do too, but then `import nodes` would find the pack's nodes, also in a
    test that means ComfyUI's.
    """

    ROOT = str(Path(__file__).resolve().parents[2])

    @classmethod
    def find_spec(
        cls, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The package's spec; None for every other module (submodules are found through the package)."""
        return importlib.machinery.PathFinder.find_spec(name, [cls.ROOT]) if name == "flashvideo" else None


sys.meta_path.insert(0, _FlashVideoFinder)
