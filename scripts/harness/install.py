"""Python and packages of the bed. Every step may be repeated: what is there already is left alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .bed import BED, CONVERTER, LINT, NEWEST_PACKAGES, ROOT, TEMPORARY, Bed, clean_environment, say, seconds

HARNESS = ROOT / "scripts" / "harness"
REQUIREMENTS = ROOT / "scripts" / "requirements"
OLDEST, NEWEST = (3, 10), (3, 13)
# Bundles of pictures and pages for the browser; ComfyUI starts without them.
_LEFT_OUT = ("comfyui-workflow-templates", "comfyui-embedded-docs")
_PROBE_SECONDS = 600  # for `import torch` and its like, on a cold disk
_TORCH_FAMILY = ("torch", "torchvision", "torchaudio")
_CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "msedge")


class SetUpError(RuntimeError):
    """The set-up can't continue; the message gives the reason in the user's words."""


def has_nvidia() -> bool:
    """True on a machine with an NVIDIA GPU and its driver."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and _output([tool, "-L"]).startswith("GPU")


def virtual_environment(folder: Path) -> Path:
    """The Python of a virtual environment in `folder`, made if missing or broken."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if python.exists() and _output([str(python), "-m", "pip", "--version"]):
        return python
    base = _suitable_python()
    say(f"  Making a virtual environment with {base}")
    shutil.rmtree(folder, ignore_errors=True)
    _run([base, "-m", "venv", str(folder)], "Python's venv module failed (on Debian and Ubuntu: install python3-venv)")
    return python


def torch_and_packages(python: Path) -> None:
    """PyTorch for this machine, and ComfyUI 0.3.75's packages exactly as listed."""
    torch = ["-r", str(REQUIREMENTS / "torch.txt")]
    packages = ["--no-deps", "-r", str(REQUIREMENTS / "comfy.txt")]
    cpu = sys.platform == "linux" and not has_nvidia()
    # Without a GPU the libraries that a CUDA build depends on (gigabytes) are left out, unless it is such a build.
    pip(python, "PyTorch", ["--no-deps", *torch] if cpu else torch)
    pip(python, "ComfyUI's packages", packages)
    if cpu and not _imports(python, "torch"):
        pip(python, "the GPU libraries that this build of PyTorch can't do without", torch)
    complete_cpu_build(python)


def requirements_of(python: Path, tree: Path) -> None:
    """What another version of ComfyUI wants beyond the pinned packages, without touching PyTorch."""
    lines = (tree / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    wanted = [line for line in wanted if _distribution(line) not in (*_LEFT_OUT, *_TORCH_FAMILY)]
    listing = BED / "requirements-of-comfyui.txt"
    listing.write_text("\n".join(wanted) + "\n", encoding="utf-8")
    constraint = str(REQUIREMENTS / "torch.txt")
    # The newest of each, as in a fresh installation of it: what it says it needs at least doesn't always do.
    pip(python, "what this version of ComfyUI adds", ["--upgrade", "-c", constraint, "-r", str(listing)])


def chromium() -> str | None:
    """The Chromium that FLASHVIDEO_CHROMIUM names or that is on the path; None without one."""
    return os.environ.get("FLASHVIDEO_CHROMIUM") or next(filter(None, map(shutil.which, _CHROMIUMS)), None)


def test_tools(python: Path) -> None:
    """pytest; Playwright, too, where there is a browser for it."""
    pip(python, "the test tools", ["--no-deps", *_test_tools()])


def test_tools_beside(python: Path, folder: Path) -> None:
    """The test tools in a folder of their own, for a Python into which nothing may be installed."""
    listed = ["--no-deps", "--upgrade", "--target", str(folder), *_test_tools()]
    _pip_for(python, "the test tools (beside your ComfyUI, not into it)", listed)


def _test_tools() -> list[str]:
    names = ["test", "browser"] if chromium() else ["test"]
    return [part for name in names for part in ("-r", str(REQUIREMENTS / f"{name}.txt"))]


def lint_tools() -> Path:
    """The Python of `.bed/lint`, which has ruff and import-linter; made if it is missing or their versions changed."""
    python = virtual_environment(LINT)
    _install_listed("lint", LINT, lambda listed: pip(python, "ruff and import-linter", ["--no-deps", *listed]))
    return python


def newest_packages(python: Path) -> Path:
    """The folder with the newest versions of what the library uses; filled if it is missing or they changed."""
    target = ["--no-deps", "--upgrade", "--target", str(NEWEST_PACKAGES)]
    _install_listed("newest", NEWEST_PACKAGES, lambda listed: pip(python, "the newest packages", [*target, *listed]))
    return NEWEST_PACKAGES


def _install_listed(name: str, folder: Path, install: Callable[[list[str]], None]) -> None:
    """Install a requirement file into a folder, which keeps a copy of it, unless it did so before."""
    listed, installed = REQUIREMENTS / f"{name}.txt", folder / f"{name}.txt"
    if not installed.exists() or installed.read_bytes() != listed.read_bytes():
        install(["-r", str(listed)])
        shutil.copyfile(listed, installed)


def workflow_converter(python: Path) -> None:
    """comfy-cli's workflow converter, in a folder of its own."""
    listed = ["--no-deps", "--upgrade", "--target", str(CONVERTER)]
    pip(python, "the workflow converter", [*listed, "-r", str(REQUIREMENTS / "convert.txt")])


def start_check(bed: Bed) -> None:
    """Start ComfyUI once and let it end. Raises SetUpError if it does not come up, or a test tool is missing."""
    say("  Trying ComfyUI out ...")
    base = TEMPORARY / "start-check"
    for name in ("user", "custom_nodes"):
        (base / name).mkdir(parents=True, exist_ok=True)
    options = ["--cpu", "--quick-test-for-ci", "--disable-api-nodes", "--base-directory", str(base)]
    options += ["--database-url", "sqlite:///" + (base / "user" / "comfyui.db").as_posix()]
    for command in (["main.py", *options], ["-c", "import av, einops, pytest, safetensors"]):
        result = subprocess.run(
            [bed.python, *command], env=bed.environment(), cwd=bed.comfyui,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SetUpError(f"ComfyUI in {bed.comfyui} does not start with {bed.python}: {reason}")
    shutil.rmtree(base, ignore_errors=True)


def pip(python: Path, what: str, arguments: Sequence[str]) -> None:
    """Run the environment's own pip, quietly; prints what it installs and how long that took."""
    _install([str(python), "-m", "pip"], what, arguments)


def pip_environment() -> dict[str, str]:
    """The person's own pip configuration, with cache and temporary files kept inside the project."""
    env = clean_environment()
    env.update({"PIP_CACHE_DIR": str(BED / "cache" / "pip"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    env.update({"PIP_NO_INPUT": "1", "PIP_ROOT_USER_ACTION": "ignore", "PYTHONNOUSERSITE": "1"})
    return env


def _pip_for(python: Path, what: str, arguments: Sequence[str]) -> None:
    """pip for a foreign Python, which may have none: a pip of our own then acts for it."""
    if _output([str(python), "-m", "pip", "--version"]):
        pip(python, what, arguments)
        return
    own = virtual_environment(BED / "venv")
    _install([str(own), "-m", "pip", "--python", str(python)], what, arguments)


def _install(command: Sequence[str], what: str, arguments: Sequence[str]) -> None:
    started = time.monotonic()
    say(f"  Installing {what} ...")
    _run([*command, "install", "--quiet", *arguments], f"pip could not install {what}")
    say(f"  Installing {what}: {seconds(time.monotonic() - started)}")


def complete_cpu_build(python: Path) -> None:
    """Let torchvision and torchaudio that were built for CUDA import beside a CPU torch; does nothing elsewhere."""
    if _output([str(python), "-c", "import torch; print(torch.version.cuda or torch.version.hip)"]) != "None":
        return
    if not _imports(python, "torchvision"):
        helper = BED / "cpu_ops"  # a copy, because building writes beside the sources
        shutil.copytree(HARNESS / "cpu_ops", helper, dirs_exist_ok=True)
        pip(python, "a small helper for torchvision on the CPU", ["--no-deps", str(helper)])
    if not _imports(python, "torchaudio"):
        where = _output([str(python), "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"])
        # torchaudio takes its own path without compiled code when the file is not there.
        shutil.rmtree(Path(where) / "torchaudio" / "lib", ignore_errors=True)


def _suitable_python() -> str:
    """This Python if ComfyUI runs on it, else the first on PATH that does. Raises SetUpError."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return sys.executable
    for name in ("python3.11", "python3.12", "python3.13", "python3.10"):
        found = shutil.which(name)  # some version managers put names on PATH that don't run
        if found and _output([found, "-c", "import venv; print('runs')"]) == "runs":
            return found
    raise SetUpError(f"ComfyUI needs Python 3.10 to 3.13; found only {sys.version.split()[0]}. Install one of these.")


def _distribution(line: str) -> str:
    """Name of the package in a requirement line."""
    return line.replace(">", "=").replace("<", "=").replace("~", "=").split("=")[0].split(";")[0].strip().lower()


def _imports(python: Path, module: str) -> bool:
    command = [str(python), "-c", f"import {module}"]
    return subprocess.run(command, env=clean_environment(), capture_output=True, check=False).returncode == 0


def _output(command: Sequence[str]) -> str:
    """What a command prints; empty if it fails or is not there."""
    env = clean_environment()
    try:
        result = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=_PROBE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def _run(command: Sequence[str], trouble: str) -> None:
    """Run a command; on failure raise SetUpError with the end of its output."""
    result = subprocess.run(
        command, env=pip_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        tail = "\n".join((result.stdout + result.stderr).strip().splitlines()[-12:])
        raise SetUpError(f"{trouble}:\n{tail}")
