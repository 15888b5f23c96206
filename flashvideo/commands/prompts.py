"""`python -m flashvideo generate --prompts FILE OUT`: a video for each prompt of a file.

First all drafts are made, then all are refined, so that each network is loaded once, here or by a worker.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..atomic_files import check_target
from ..devices import return_memory
from ..errors import CommandError, cancelled
from ..nano import NANO_NOTICE, nano_is_trained
from ..parallel.team import Team
from ..progress import PhaseProgress
from .chosen import absolute_models
from .drafts import MADE, DraftNetworks, DraftOptions, draft_path, has_draft, load_draft_networks, write_draft
from .jobs import Job, RefineOptions, reason
from .on_workers import Clip, Outcome, run_on_workers
from .run_refine import refine_jobs
from .terminal import REFUSED, ProgressBars, say, warn

KEYS = {"prompt": str, "seed": int, "size": str, "draft_size": str, "frames": int}
ENDING = ".mp4"


@dataclass(frozen=True)
class Video:
    """One prompt's."""

    target: Path
    draft: DraftOptions
    refining: RefineOptions

    @property
    def draft_path(self) -> Path:
        """The draft's file."""
        return draft_path(self.target)


def read_prompts(path: Path) -> dict[int, dict[str, Any]]:
    """Options by the number of their line: a prompt, or a JSON object with some of KEYS. Raises CommandError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is no text in UTF-8.") from error
    found = {
        number: _entry(line.strip(), f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
    }
    if not found:
        raise CommandError(f"{path} holds no prompts.")
    return found


def _entry(line: str, where: str) -> dict[str, Any]:
    if not line.startswith("{"):
        return {"prompt": line}
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{where}: that is no JSON object: {error}.") from error
    for name, value in entry.items():
        if name not in KEYS:
            raise CommandError(f"{where}: there is no {name!r}, only {', '.join(KEYS)}.")
        if type(value) is not KEYS[name]:
            kind = "text" if KEYS[name] is str else "a whole number"
            raise CommandError(f"{where}: {name} takes {kind}; got {json.dumps(value)}.")
    if not entry.get("prompt", "").strip():
        raise CommandError(f"{where}: a prompt is missing.")
    return entry


def line_options(options: argparse.Namespace, entry: dict[str, Any]) -> argparse.Namespace:
    """The command's options with those of a line in their place."""
    own = {name: value for name, value in entry.items() if name != "size"}
    if "size" in entry:
        own |= {"exact": entry["size"], "short_side": None, "scale": None, "keep_size": False}
    return argparse.Namespace(**{**vars(options), **own})


def generate_all(
    path: Path, folder: Path, options: argparse.Namespace, make: Callable[[argparse.Namespace], Video]
) -> int:
    """Make the videos of all prompts in a file; returns the exit code. `make` gives a line's, from its options.

    Raises CommandError before the work starts, for a mistake in any line.
    """
    videos = []
    for number, entry in read_prompts(path).items():
        own = line_options(options, entry)
        own.target = folder / f"{number:04}{ENDING}"
        try:
            videos.append(make(own))
        except CommandError as error:
            raise CommandError(f"{path}, line {number}: {error}", error.hint) from error
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{folder} is a file: several videos need a folder as OUT.")
    folder.mkdir(parents=True, exist_ok=True)
    return _generate(_left(videos, force=options.force), options)


def _left(videos: list[Video], *, force: bool) -> list[Video]:
    left = []
    for video in videos:
        if video.target.exists() and not force:
            say(f"{video.target} exists already and is left as it is")
        else:
            check_target(video.target, force=force)
            left.append(video)
    return left


def _generate(videos: list[Video], options: argparse.Namespace) -> int:
    if not videos:
        return 0
    missing = [each for each in videos if options.anew or not has_draft(each.draft, each.draft_path)]
    refining = videos[0].refining
    if refining.models.model is None and not nano_is_trained():
        say(NANO_NOTICE)
    code = _draft_all(missing, refining, anew=options.anew) if missing else 0
    drafted = [each for each in videos if each.draft_path.is_file()]
    if code not in (0, REFUSED) or options.draft_only:
        return code
    jobs = [Job(each.draft_path, each.target, each.refining.prompt, each.refining.settings) for each in drafted]
    folder = videos[0].target.parent
    return refine_jobs(jobs, replace(refining, source=folder, target=folder, prompt=None)) or code


def _draft_all(videos: list[Video], refining: RefineOptions, *, anew: bool) -> int:
    """Make the drafts of videos; returns the exit code."""
    first = videos[0].draft
    first = replace(first, models=absolute_models(first.models), model=first.model and first.model.absolute())
    if refining.farm is not None:
        videos = sorted(videos, key=lambda each: -_pixels(each.draft))
        clips = [
            Clip(each.draft_path.name, each.draft_path, replace(each, target=each.target.absolute())) for each in videos
        ]
        return run_on_workers(refining.farm, partial(_prepare_drafter, first, anew=anew), clips)
    networks, failed = load_draft_networks(first), 0
    for video in videos:
        try:
            with ProgressBars("step") as bars:
                write_draft(video.draft, video.draft_path, bars, networks)
        except (CommandError, ValueError, OSError, RuntimeError, MemoryError) as error:
            failed += 1
            warn(f"{video.draft_path.name}: {reason(error)}")
        except KeyboardInterrupt:
            return cancelled("Cancelled. The same command resumes the run.")
        else:
            say(f"{video.draft_path}: {MADE}")
    return REFUSED if failed else 0


def _pixels(draft: DraftOptions) -> int:
    frames, height, width = draft.shape
    return frames * height * width


def _prepare_drafter(options: DraftOptions, *, anew: bool) -> Callable[..., Outcome]:
    """What a worker keeps from draft to draft."""
    return_memory()
    return partial(_draft_clip, load_draft_networks(options), options, anew)


def _draft_clip(
    networks: DraftNetworks,
    options: DraftOptions,
    anew: bool,
    clip: Clip,
    report: PhaseProgress,
    _note: Callable[[str], None],
    _team: Team,
) -> Outcome:
    video: Video = clip.task
    own = replace(video.draft, models=options.models, model=options.model)
    try:
        if not anew and has_draft(own, video.draft_path):  # by a worker that was killed just then
            return Outcome(done=MADE)
        write_draft(own, video.draft_path, report, networks)
    except (CommandError, ValueError, OSError, RuntimeError, MemoryError) as error:
        return Outcome(problem=reason(error))
    return Outcome(done=MADE)
