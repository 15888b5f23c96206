"""What `refine` does; `refine` has its options."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..atomic_files import InUseError
from ..errors import CommandError, cancelled
from ..frames import TargetSize
from ..parallel import RankEndedError, agree
from ..parallel.farm import check_farm
from ..refiner.run import REFINE, Networks
from .chosen import model_options, output_options, refine_settings, target_size
from .jobs import Job, RefineOptions, is_done, reason, refine_job, refiner_networks, with_own_choices, work_of
from .loading import TextEncoder
from .on_workers import farm_options
from .refine_on_workers import refine_on_workers
from .terminal import DAMAGED, REFUSED, ProgressBars, say, warn
from .trial import run_trial, trial_place


def refine_options(options: argparse.Namespace, source: Path, default_size: TargetSize) -> RefineOptions:
    """The command's options. Raises CommandError for invalid ones."""
    return RefineOptions(
        source=source,
        target=options.target,
        settings=refine_settings(options, target_size(options, default_size)),
        own_resample=options.resample is not None,
        prompt=options.prompt,
        motion=options.motion,
        models=model_options(options),
        output=output_options(options),
        ranks=options.ranks,
        farm=farm_options(options),
    )


def run(options: argparse.Namespace) -> int:
    """Refine, or try; returns the exit code. Raises CommandError before the work starts."""
    place, chosen = trial_place(options), refine_options(options, options.source, TargetSize())
    return refine(chosen) if place is None else _try(chosen, place)


def _try(options: RefineOptions, place: tuple[float, float]) -> int:
    if options.ranks is not None or options.farm is not None:
        raise CommandError("--try takes one process on one device: leave out torchrun and --ray.")
    with _pyav_explained():
        from ..refiner.trial import check_trial

    check_trial(options.source, options.target)
    networks = refiner_networks(options)
    settings = with_own_choices(options, networks).settings
    return run_trial(networks, options.source, options.target, settings, options.output, place)


def refine(options: RefineOptions) -> int:
    """Refine a file, or all videos of a folder; returns the exit code. Raises CommandError before the work starts."""
    with _pyav_explained():
        from ..refiner.files import check_paths, is_picture

    if options.farm is not None:
        if is_picture(options.source):
            raise CommandError("--ray spreads videos: a picture is refined in one piece, so leave --ray out.")
        check_farm(options.farm)

    def checked_jobs() -> list[Job]:
        jobs = _jobs(options)
        for job in jobs:
            check_paths(job.source, job.target, force=options.output.force)
        return jobs

    return refine_jobs(agree(options.ranks, checked_jobs), options)


@contextmanager
def _pyav_explained() -> Iterator[None]:
    """Around imports that other commands don't need."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise CommandError(f"Refining files needs the package {error.name}: use ComfyUI's Python.") from error


def refine_jobs(jobs: list[Job], options: RefineOptions) -> int:
    """Refine files whose paths are checked; returns the exit code. Of several, `options.source` is their folder."""
    if not jobs:
        return 0
    if options.farm is not None:
        return refine_on_workers(jobs, options)
    return _refine_all(jobs, refiner_networks(options), options)


def _refine_all(jobs: list[Job], networks: Networks, options: RefineOptions) -> int:
    bars, failed, damaged = ProgressBars("frame", {REFINE: "window"}), 0, 0
    several = options.source.is_dir()  # several programs may share a folder
    text = TextEncoder(options.models, networks.device, keep=True)
    for job in jobs:
        # Another program has finished it in the meantime.
        if agree(options.ranks, lambda job=job: is_done(job.target, options)):
            continue
        try:
            damage = refine_job(job, networks, text, options, bars, warn)
        except (CommandError, ValueError, OSError, RuntimeError, MemoryError) as error:
            bars.close()
            if options.ranks is not None and options.ranks.busy:  # the others are in the middle of it
                raise _fatal(job, error) from error
            failed += not (several and isinstance(error, InUseError))
            warn(f"{job.source.name}: {reason(error)}")
        except KeyboardInterrupt:
            bars.close()
            if options.ranks is not None:
                raise
            return cancelled("Cancelled. The same command resumes the run.")
        else:
            bars.close()
            damaged += bool(damage)
            say(f"{job.target}: refined" + "".join(f"\n  {text}" for text in damage))
    if failed:
        return REFUSED
    return DAMAGED if damaged else 0


def _fatal(job: Job, error: Exception) -> CommandError:
    """The error that ends all ranks."""
    return error if isinstance(error, RankEndedError) else CommandError(f"{job.source.name}: {reason(error)}")


def _jobs(options: RefineOptions) -> list[Job]:
    """What to refine, and where to. Results that a folder holds already are left out."""
    from ..refiner.files import videos_in, was_finished
    from ..video_files import CONTAINERS

    if not options.source.is_dir():
        job = Job(options.source, options.target)
        if not options.output.force and was_finished(job.target, work_of(job.target, options)):
            say(f"{job.target}: refined")  # the run was killed during its clean-up
            return []
        return [job]
    videos = videos_in(options.source)
    if not videos:
        raise CommandError(f"{options.source} holds no videos.")
    if options.target.exists() and not options.target.is_dir():
        raise CommandError(f"{options.target} is a file: a folder of videos needs a folder as OUT.")
    options.target.mkdir(parents=True, exist_ok=True)
    if options.target.samefile(options.source):
        raise CommandError("IN and OUT are the same folder: give another one for the refined videos.")
    jobs, taken = [], set()
    for video in videos:
        ending = video.suffix if video.suffix.lower() in CONTAINERS else ".mp4"
        target = options.target / f"{video.stem}{ending}"
        if target.name.lower() in taken:  # of clip.mp4 and clip.webm the second goes to clip.webm.mp4
            target = options.target / f"{video.name}{ending}"
        taken.add(target.name.lower())
        if not is_done(target, options):
            jobs.append(Job(video, target))
    return jobs
