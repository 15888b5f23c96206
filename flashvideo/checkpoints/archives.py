"""Whether a file is an archive, as torch.save writes it."""

from __future__ import annotations

import zipfile
from pathlib import Path


def is_archive(path: Path) -> bool:
    """Whether a file ends as a ZIP archive does, damaged or not. Raises OSError."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # Python recognises one whose last entry is damaged, and says so this way
        return True
