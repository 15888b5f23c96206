"""Zip what ComfyUI's registry hands out: the files that git knows, without those that .comfyignore names.

    python scripts/pack.py comfyui-flashvideo.zip

`comfy node pack` makes the same zip.
"""

from __future__ import annotations

import argparse
import subprocess
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IGNORED = ROOT / ".comfyignore"


def packed_files() -> list[str]:
    """Paths inside the repository, in order. Raises CalledProcessError where there is no git repository."""
    known = _git()
    left_out = _git("--ignored", f"--exclude-from={IGNORED}")
    return sorted(name for name in known - left_out if (ROOT / name).is_file())


def _git(*options: str) -> set[str]:
    command = ["git", "ls-files", "-z", "--cached", *options]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, encoding="utf-8")
    return set(filter(None, listed.stdout.split("\0")))


def pack(target: Path) -> None:
    """Write the zip."""
    names = [name for name in packed_files() if (ROOT / name).resolve() != target.resolve()]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.write(ROOT / name, name)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", metavar="ZIP", type=Path, help="the file to write")
    pack(parser.parse_args().target)


if __name__ == "__main__":
    main()
