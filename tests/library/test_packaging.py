"""What a user's download holds, and what stays in the repository."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 25 * 2**20  # bytes
STAYS = (
    *("tests/", "benchmarks/", "scripts/", "docs/", "flashvideo/training/", ".ci/"),
    *("Makefile", ".gitignore"),
)
COMES = ("__init__.py", "pyproject.toml", "README.md", "LICENSE", "nodes/__init__.py", "flashvideo/__main__.py")
COMES_WITH = (
    *("workflows/*.json", "subgraphs/*.json", "web/docs/*.md", "web/js/*.js", "locales/*/nodeDefs.json"),
    "nodes/**/*.py",
)
# In a Python of its own: the download's modules, each by itself, and its command line.
IMPORT_ALL = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import flashvideo
assert flashvideo.__file__.startswith(sys.argv[1]), flashvideo.__file__
for module in pkgutil.walk_packages(flashvideo.__path__, "flashvideo."):
    importlib.import_module(module.name)
from flashvideo.commands.main import main
print("exit", main(["train", "vae", "--config", "x.toml"]))
"""


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zip that ComfyUI's registry would hand out."""
    if not (ROOT / ".git").exists():
        pytest.skip("only a git repository knows what belongs to the pack")
    target = tmp_path_factory.mktemp("download") / "pack.zip"
    subprocess.run([sys.executable, ROOT / "scripts" / "pack.py", target], check=True)
    return target


def test_download_is_small_and_holds_what_a_user_needs(download: Path) -> None:
    assert download.stat().st_size <= LARGEST
    names = zipfile.ZipFile(download).namelist()
    assert [name for name in names if name.startswith(STAYS)] == []
    assert set(COMES) <= set(names)
    for pattern in COMES_WITH:
        wanted = {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)}
        assert wanted and wanted <= set(names), pattern
    weights = {path.relative_to(ROOT).as_posix() for path in (ROOT / "models" / "nano").rglob("*.safetensors")}
    assert weights <= set(names)


def test_the_packer_takes_no_option_for_a_file(tmp_path: Path) -> None:
    for option, code in (("--help", 0), ("--other", 2)):
        command = [sys.executable, ROOT / "scripts" / "pack.py", option]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == code
    assert not list(tmp_path.iterdir())


def test_download_works_without_training_and_says_where_it_is(download: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(download).extractall(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, tmp_path], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.stdout == "exit 1\n", result.stderr
    assert re.search(r"Training is not part of this download\. Clone https://\S+ to train\.", result.stderr)


def test_help_pages_show_no_picture_that_stays_behind(download: Path) -> None:
    names = set(zipfile.ZipFile(download).namelist())
    for page in (ROOT / "web" / "docs").glob("*.md"):
        for picture in re.findall(r"!\[[^\]]*\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / picture).resolve().relative_to(ROOT).as_posix() in names, (page.name, picture)


@pytest.mark.parametrize(("name", "width", "height", "largest"), [("icon", 400, 400, 100), ("banner", 1260, 540, 1000)])
def test_icon_and_banner_are_what_the_registry_takes(name: str, width: int, height: int, largest: int) -> None:
    path = ROOT / "docs" / f"{name}.png"
    with Image.open(path) as picture:
        assert picture.size == (width, height)
    assert path.stat().st_size <= largest * 1000
    repository, url = (
        re.search(rf'^{key} = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M).group(1)
        for key in ("Repository", name.capitalize())
    )
    owner_and_name = repository.removeprefix("https://github.com/")
    assert url == f"https://raw.githubusercontent.com/{owner_and_name}/main/docs/{name}.png"


def test_changelog_and_citation_have_this_version() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M).group(1)
    latest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M).group(1)
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M).group(1)
    assert latest == version == cited
