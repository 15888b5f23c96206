"""Licences of packages: from a wheel's metadata, Debian's copyright file, or a folder's LICENSE."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.parser import BytesParser
from pathlib import Path

NOT_STATED = "not stated"
_FOLDER_FILES = ("LICENSE", "LICENCE", "COPYING", "COPYRIGHT")
_LONGEST = 80  # letters of a licence's name; more is its text
_CLASSIFIER = "License :: "


def wheel_licence(metadata: Mapping[str, bytes]) -> str:
    """The licence that a wheel's METADATA (path, content) names: expression, else field, else classifiers."""
    for content in metadata.values():
        fields = BytesParser().parsebytes(content)
        text = fields.get("License-Expression") or fields.get("License") or ""
        first = next(iter(text.strip().splitlines()), "")
        if first and first.upper() != "UNKNOWN":
            return first[:_LONGEST]
        named = [each.split(" :: ")[-1] for each in fields.get_all("Classifier", []) if each.startswith(_CLASSIFIER)]
        if named:
            return ", ".join(named)
    return NOT_STATED


def folder_licence(folder: Path) -> str:
    """The first line of a folder's LICENSE or the like."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stem.upper() in _FOLDER_FILES:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            first = next((line.strip() for line in lines if line.strip()), "")
            return first[:_LONGEST] or NOT_STATED
    return NOT_STATED


@dataclass(frozen=True)
class DebianLicences:
    """Licences by file, from a copyright file in Debian's machine-readable format; of another format its first line."""

    patterns: tuple[tuple[str, str], ...]  # of files, and their licence; later ones go before earlier ones

    @classmethod
    def read(cls, path: Path) -> DebianLicences:
        """Read a package's copyright file; none is there: no licence is stated."""
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return cls(())
        patterns = []
        for paragraph in re.split(r"\n\s*\n", text):
            files, licence = _field(paragraph, "Files"), _field(paragraph, "License")
            if files and licence:
                name = licence.splitlines()[0].strip()
                patterns += [(pattern, name) for pattern in files.split()]
        if not patterns:
            first = next((line.strip() for line in text.splitlines() if line.strip()), "")
            return cls((("*", first[:_LONGEST]),) if first else ())
        return cls(tuple(patterns))

    def of(self, path: Path) -> str:
        """The licence of an installed file: patterns name it where it was in the source, so its last part decides."""
        for pattern, licence in reversed(self.patterns):
            if pattern == "*" or (
                not pattern.startswith("debian/") and fnmatch.fnmatch(path.name, pattern.rsplit("/", 1)[-1])
            ):
                return licence
        return NOT_STATED


def _field(paragraph: str, name: str) -> str:
    match = re.search(rf"^{name}:[ \t]*(.*(?:\n[ \t].*)*)", paragraph, re.MULTILINE)
    return match[1].strip() if match else ""
