"""Run every test: style and imports, the library, the nodes inside ComfyUI, its page in a browser, the running server.

    python scripts/run_tests.py [files or folders of tests ...] [options for pytest ...]

Without a file or folder it runs all. Each folder of tests has processes of its own, because a process can hold one
ComfyUI, and the library's tests none. Most are spread over several processes, file by file, as their tensors are too
small for several threads. After the library's, which have the machine for themselves, folders run beside each other, as
many tests wait for other programs: each begins as soon as others have left it enough processes. With --newest the tests
that depend most on other packages run once more with the newest versions of these.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import lint
import set_up
from harness import install
from harness.bed import CANCELLED, ROOT, TEMPORARY, say, seconds, stop_on_terminate

_LIBRARY = "tests/library"
# The order in which folders begin: the longest first, and at the end those that several processes share.
FOLDERS = (
    _LIBRARY, "tests/browser", "tests/server", "tests/comfy", "tests/commands", "tests/fuzz", "tests/training",
)  # fmt: skip
_SPREAD = (_LIBRARY, "tests/training", "tests/commands", "tests/comfy")  # over several processes
_SHARE = 2  # processes of each of these beside others
_POLL_SECONDS = 0.2
_LIBRARY_SECONDS = 120  # more, and people stop running the library's tests while they work
_NO_TESTS_SELECTED = 5  # pytest's exit code
_PROCESSES = 4  # at most at once; each takes up to 2 GB of main memory
_NEWEST = "--newest"
# Video files, weights, numbers and text: what PyAV, safetensors, numpy and transformers may change.
_NEWEST_TESTS = [
    f"tests/{folder}/test_{name}.py"
    for folder, names in (
        ("library", "checkpoints color damaged_videos deep_colour frames golden_pipeline media_cases"),
        ("library", "refiner_files transparency video_files weights"),
        ("training", "no_reference real_clips"),
        ("commands", "convert generate_command picture_sequences refine_command"),
    )
    for name in names.split()
]
_NEWEST_NEEDS = (3, 11)
_ONE_PROCESS = {"-s", "--pdb", "--capture=no"}  # what somebody does who looks closely


@dataclass(frozen=True)
class _Task:
    """Tests of one folder."""

    folder: str
    places: tuple[str, ...]  # files or folders
    newest: bool = False  # with the newest packages

    @property
    def name(self) -> str:
        """What the tests are called in what is printed."""
        return f"{Path(self.folder).name}-newest" if self.newest else self.folder

    def processes(self, *, alone: bool) -> int:
        """How many share the tests."""
        if self.folder not in _SPREAD or (self.newest and not alone):
            return 1
        return min(_PROCESSES if alone else _SHARE, os.cpu_count() or 1)


@dataclass(frozen=True)
class Outcome:
    """How one folder's tests went."""

    folder: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    broken: bool


def main() -> int:
    """Command line; returns the exit code."""
    set_up.enter(__file__)
    stop_on_terminate()
    chosen = [each for each in sys.argv[1:] if _is_place(each)]
    options = [each for each in sys.argv[1:] if not _is_place(each) and each != _NEWEST]
    newest = _NEWEST in sys.argv
    style_is_good = lint.check()
    started = time.monotonic()
    TEMPORARY.mkdir(parents=True, exist_ok=True)
    try:
        # Of this run alone: another one, or a server, may use its own beside it.
        with tempfile.TemporaryDirectory(prefix="tests-", dir=TEMPORARY, ignore_cleanup_errors=True) as own:
            outcomes = _run(_tasks(chosen, newest=newest), options, Path(own))
    except KeyboardInterrupt:
        say("\nCancelled.")
        return CANCELLED
    return _sum_up(outcomes, time.monotonic() - started, style_is_good)


def _is_place(argument: str) -> bool:
    """Whether an argument is a file or folder of tests, or a test in a file (tests/x/test_y.py::test_z)."""
    path = Path(argument.partition("::")[0])
    return path.parts[:1] == ("tests",) and (ROOT / path).exists()


def _places(chosen: list[str]) -> dict[str, list[str]]:
    """What to run in each folder: what was chosen there, or all if nothing was chosen at all."""
    if not chosen or Path("tests") in map(Path, chosen):
        return {folder: [folder] for folder in FOLDERS}
    found = {folder: [place for place in chosen if Path(place).is_relative_to(folder)] for folder in FOLDERS}
    return {folder: places for folder, places in found.items() if places}


def _tasks(chosen: list[str], *, newest: bool) -> list[_Task]:
    """What to run, in its order."""
    places = _places(chosen)
    tasks = [_Task(folder, tuple(places[folder])) for folder in FOLDERS if folder in places]
    if newest and _LIBRARY in places and _newest_fit():
        tasks.append(_Task(_LIBRARY, tuple(places[_LIBRARY] if chosen else _NEWEST_TESTS), newest=True))
    return tasks


def _newest_fit() -> bool:
    """Whether the newest packages run on this Python; prints a line if they don't."""
    fit = sys.version_info[:2] >= _NEWEST_NEEDS
    if not fit:
        say("\nThe newest packages need Python 3.11: the library's tests don't run with them here.")
    return fit


def _run(tasks: list[_Task], options: list[str], temporary: Path) -> list[Outcome]:
    """Run the library's tests, then all others beside each other; one core, or a close look, takes them one by one."""
    one_by_one = (os.cpu_count() or 1) == 1 or _ONE_PROCESS & set(options)
    alone = [task for task in tasks if one_by_one or len(tasks) == 1 or (task.folder == _LIBRARY and not task.newest)]
    outcomes = []
    for task in alone:
        say(f"\n{' '.join(task.places)}{' with the newest packages' if task.newest else ''}")
        with _Tests(task, options, temporary) as tests:
            outcomes.append(tests.outcome())
    return outcomes + _run_beside([task for task in tasks if task not in alone], options, temporary)


def _run_beside(waiting: list[_Task], options: list[str], temporary: Path) -> list[Outcome]:
    """Run tasks in their order, each once there are processes for it; what it printed comes when it has ended."""
    outcomes: list[Outcome] = []
    running: dict[_Task, _Tests] = {}
    with ExitStack() as stack:
        while waiting or running:
            free = _PROCESSES - sum(task.processes(alone=False) for task in running)
            fits = next((task for task in waiting if task.processes(alone=False) <= free), None)
            if fits is not None:
                waiting.remove(fits)
                say(f"\n{fits.name} begins")
                running[fits] = stack.enter_context(_Tests(fits, options, temporary, beside=True))
                continue
            time.sleep(_POLL_SECONDS)
            for task in [task for task, tests in running.items() if tests.has_ended()]:
                tests = running.pop(task)
                outcomes.append(tests.outcome())
                say(f"\n{task.name}\n{tests.printed()}")
    return outcomes


class _Tests:
    """Tests of one folder in a process of their own, with the newest packages or the bed's.

    What they print goes to the terminal; `beside` others, `printed` has it. Left before the end, the process is ended.
    """

    def __init__(self, task: _Task, options: list[str], temporary: Path, *, beside: bool = False) -> None:
        name = Path(task.name).name
        self._folder = task.name
        self._report = temporary / f"{name}.xml"
        self._log = temporary / f"{name}.txt"
        self._may_be_empty = bool(options)
        own = [f"--junitxml={self._report}", f"--basetemp={temporary / name}", "-q"]
        env = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))}
        spread = task.folder in _SPREAD and not _ONE_PROCESS & set(options)
        if spread:
            own += ["-n", str(task.processes(alone=not beside)), "--dist", "loadfile"]
            own.append("--no-loadscope-reorder")  # tests/slow_first.py has the order, and xdist knows no seconds
        if spread or beside:
            env["OMP_NUM_THREADS"] = "1"  # threads of two processes on the same cores wait for each other
        if task.newest:
            front = str(install.newest_packages(Path(sys.executable)))
            env["PYTHONPATH"] = os.pathsep.join(filter(None, (front, env.get("PYTHONPATH"))))
        self._started = time.monotonic()
        command = [sys.executable, "-m", "pytest", *task.places, *own, *options]
        with self._log.open("wb") if beside else nullcontext() as output:
            self._process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output)

    def __enter__(self) -> _Tests:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()  # pytest then stops the server that it may have started
            self._process.wait(30)

    def has_ended(self) -> bool:
        """Whether all tests are done."""
        return self._process.poll() is not None

    def printed(self) -> str:
        """What tests beside others have printed."""
        return self._log.read_text(errors="replace").rstrip()

    def outcome(self) -> Outcome:
        """Wait for the end; how the tests went."""
        code = self._process.wait()
        spent = time.monotonic() - self._started
        chosen_none = code == _NO_TESTS_SELECTED and self._may_be_empty
        return _outcome(self._folder, self._report, spent, broken=code != 0 and not chosen_none)


def _outcome(folder: str, report: Path, spent: float, *, broken: bool) -> Outcome:
    """Read the totals from pytest's report; a process that died leaves none."""
    try:
        suite = ElementTree.parse(report).getroot().find("testsuite")
    except (OSError, ElementTree.ParseError):
        suite = None
    if suite is None:
        return Outcome(folder, 0, 1, 0, spent, broken=True)
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    return Outcome(folder, total - failed - skipped, failed, skipped, spent, broken)


def _sum_up(outcomes: list[Outcome], spent: float, style_is_good: bool) -> int:
    say()
    for outcome in outcomes:
        state = "broken" if outcome.broken else "good"
        say(f"{outcome.folder:<15} {outcome.passed:>4} passed  {seconds(outcome.seconds):>12}  {state}")
        if outcome.folder == _LIBRARY and outcome.seconds > _LIBRARY_SECONDS:
            say(f"Note: the library's tests should take less than {_LIBRARY_SECONDS} s.")
    passed, failed, skipped = (sum(getattr(o, name) for o in outcomes) for name in ("passed", "failed", "skipped"))
    if not passed + failed + skipped:
        say("No test was chosen.")
    good = style_is_good and passed + failed + skipped > 0 and not any(outcome.broken for outcome in outcomes)
    style = "" if style_is_good else ", the style check failed"
    say(f"{'Good' if good else 'Not good'}: {len(outcomes)} folders in {seconds(spent)}{style}")
    say(f"{passed} passed, {failed} failed, {skipped} skipped in {spent:.2f}s")  # as pytest's own last line
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
