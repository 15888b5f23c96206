"""Run every test: style and imports, the library, the nodes inside ComfyUI, its page in a browser, the running server.

    python scripts/run_tests.py [files or folders of tests ...] [options for pytest ...]

Without a file or folder it runs all. Each folder of tests has processes of its own, because a process can hold one
ComfyUI, and the library's tests none. Most are spread over several processes, file by file, as their tensors are too
small for several threads. Folders whose tests wait for other programs most of the time run at once. With --newest the
tests that depend most on other packages run once more with the newest versions of these.
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
_SPREAD = (_LIBRARY, "tests/training", "tests/commands", "tests/comfy")  # over several processes
# One row after the other; a row's folders run at once, as a page and a server are waited for.
_ROWS = (
    (_LIBRARY,),
    ("tests/training",),
    ("tests/commands",),
    ("tests/comfy",),
    ("tests/fuzz", "tests/browser", "tests/server"),
)
FOLDERS = tuple(folder for row in _ROWS for folder in row)
_POLL_SECONDS = 0.2
_LIBRARY_SECONDS = 120  # more, and people stop running the library's tests while they work
_NO_TESTS_SELECTED = 5  # pytest's exit code
_WRONG_USE = 2
_PROCESSES = 4  # at most, for a row; each takes up to 2 GB of main memory
_CORES_FOR_ROWS = 2  # fewer, and folders that run at once would only wait for each other
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
    missing = [each for each in chosen if not _path(each).exists()]
    if missing:
        say(f"There are no tests in {', '.join(missing)}.")
        return _WRONG_USE
    style_is_good = lint.check()
    started = time.monotonic()
    TEMPORARY.mkdir(parents=True, exist_ok=True)
    try:
        # Of this run alone: another one, or a server, may use its own beside it.
        with tempfile.TemporaryDirectory(prefix="tests-", dir=TEMPORARY, ignore_cleanup_errors=True) as own:
            outcomes = []
            for row in _rows(chosen, newest=newest):
                outcomes += _run_row(row, options, Path(own))
    except KeyboardInterrupt:
        say("\nCancelled.")
        return CANCELLED
    return _sum_up(outcomes, time.monotonic() - started, style_is_good)


def _is_place(argument: str) -> bool:
    """Whether an argument names a file or folder of tests, or a test in a file (tests/x/test_y.py::test_z)."""
    return _path(argument).is_relative_to(ROOT / "tests")


def _path(place: str) -> Path:
    """The file or folder that a place is, or is in."""
    return ROOT / place.partition("::")[0]


def _places(chosen: list[str]) -> dict[str, list[str]]:
    """What to run in each folder: what was chosen there, or all if nothing was chosen at all."""
    if not chosen or Path("tests") in map(Path, chosen):
        return {folder: [folder] for folder in FOLDERS}
    found = {folder: [place for place in chosen if Path(place).is_relative_to(folder)] for folder in FOLDERS}
    return {folder: places for folder, places in found.items() if places}


def _rows(chosen: list[str], *, newest: bool) -> list[list[_Task]]:
    """What to run one after the other, and in each of these what to run at once."""
    places = _places(chosen)
    rows = [[_Task(folder, tuple(places[folder])) for folder in row if folder in places] for row in _ROWS]
    if newest and _LIBRARY in places and _newest_fit():
        rows[-1].append(_Task(_LIBRARY, tuple(places[_LIBRARY] if chosen else _NEWEST_TESTS), newest=True))
    if (os.cpu_count() or 1) < _CORES_FOR_ROWS:
        return [[task] for row in rows for task in row]
    return [row for row in rows if row]


def _newest_fit() -> bool:
    """Whether the newest packages run on this Python; prints a line if they don't."""
    fit = sys.version_info[:2] >= _NEWEST_NEEDS
    if not fit:
        say("\nThe newest packages need Python 3.11: the library's tests don't run with them here.")
    return fit


def _run_row(row: list[_Task], options: list[str], temporary: Path) -> list[Outcome]:
    """Run the tests of a row at once; what one of several printed comes when it has ended."""
    if len(row) == 1 or _ONE_PROCESS & set(options):
        outcomes = []
        for task in row:
            say(f"\n{' '.join(task.places)}{' with the newest packages' if task.newest else ''}")
            with _Tests(task, options, temporary) as tests:
                outcomes.append(tests.outcome())
        return outcomes
    say(f"\n{', '.join(task.name for task in row)} at once")
    outcomes = []
    with ExitStack() as stack:
        running = {}
        for task in row:
            log = temporary / f"{Path(task.name).name}.txt"
            running[log] = stack.enter_context(_Tests(task, options, temporary, beside=len(row) - 1, log=log))
        while running:
            time.sleep(_POLL_SECONDS)
            for log in [log for log, tests in running.items() if tests.has_ended()]:
                outcomes.append(running.pop(log).outcome())
                say(f"\n{outcomes[-1].folder}\n{log.read_text(errors='replace').rstrip()}")
    return outcomes


class _Tests:
    """Tests of one folder in a process of their own, with the newest packages or the bed's.

    What they print goes to the terminal, or to the file `log`. So many others run `beside` them. Left before the end,
    the process is ended.
    """

    def __init__(
        self, task: _Task, options: list[str], temporary: Path, *, beside: int = 0, log: Path | None = None
    ) -> None:
        name = Path(task.name).name
        self._folder = task.name
        self._report = temporary / f"{name}.xml"
        self._may_be_empty = bool(options)
        own = [f"--junitxml={self._report}", f"--basetemp={temporary / name}", "-q"]
        env = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))}
        spread = task.folder in _SPREAD and not _ONE_PROCESS & set(options)
        if spread:
            own += ["-n", str(max(1, min(_PROCESSES // (1 + beside), os.cpu_count() or 1))), "--dist", "loadfile"]
            own.append("--no-loadscope-reorder")  # tests/slow_first.py has the order, and xdist knows no seconds
        if spread or log is not None:
            env["OMP_NUM_THREADS"] = "1"  # threads of two processes on the same cores wait for each other
        if task.newest:
            front = str(install.newest_packages(Path(sys.executable)))
            env["PYTHONPATH"] = os.pathsep.join(filter(None, (front, env.get("PYTHONPATH"))))
        self._started = time.monotonic()
        command = [sys.executable, "-m", "pytest", *task.places, *own, *options]
        with nullcontext() if log is None else log.open("wb") as output:
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
