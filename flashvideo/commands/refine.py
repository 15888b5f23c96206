"""`python -m flashvideo refine IN OUT`: refine a video, a picture or a folder of videos without ComfyUI."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..atomic_files import InUseError
from ..config import NANO_REFINERS, NANO_STRENGTH
from ..devices import is_out_of_memory, return_memory
from ..errors import CommandError, cancelled
from ..frames import TargetSize
from ..nano import NANO_NOTICE, nano_is_trained
from ..parallel import RankEndedError, Ranks, agree
from ..parallel.farm import FarmOptions, check_farm
from ..progress import PhaseProgress
from ..refiner.run import REFINE, Networks, RefineSettings
from .loading import BUILT_IN, TextEncoder, encoded_prompt, load_refiner
from .on_workers import Clip, Outcome, add_farm_options, farm_options, run_on_workers
from .options import (
    ModelOptions,
    OutputOptions,
    absolute_models,
    add_file_options,
    add_model_options,
    add_refiner_options,
    add_size_options,
    add_source_options,
    file_options,
    model_options,
    output_options,
    refine_settings,
    target_size,
)
from .terminal import DAMAGED, REFUSED, ProgressBars, say, warn
from .trial import add_trial_options, run_trial, trial_place


def add_refine(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "refine",
        description="Give a video real detail: same frames, same times, same sound. Interrupted runs resume when the "
        "same command is run again.",
    )
    parser.add_argument(
        "source", metavar="IN", type=Path, help="a video, a picture, pictures like shot/%%04d.png, a folder of videos"
    )
    parser.add_argument(
        "target", metavar="OUT", type=Path, help="the file to write (.mp4, .mov, .mkv), out/%%04d.png, or a folder"
    )
    add_size_options(parser.add_argument_group("size of the result (default: --short-side 1080)"))
    group = parser.add_argument_group("refiner")
    group.add_argument(
        "--prompt",
        help="what the video shows. Without a prompt there is no guidance: the refiner gets an empty text, and --cfg "
        "is 1",
    )
    add_refiner_options(group)
    add_model_options(parser.add_argument_group("models"))
    files = parser.add_argument_group("files")
    add_source_options(files)
    add_file_options(files)
    add_farm_options(parser.add_argument_group("several cards"))
    add_trial_options(parser.add_argument_group("a test before"))
    # `ranks`: the processes that torchrun has started, if any. `footage`: see `ModelOptions`.
    parser.set_defaults(run=_refine, ranks=None, footage=True)


@dataclass(frozen=True)
class RefineOptions:
    """The command's options.

    `source` and `target` are both files, or both folders. `own_strength`: the user chose a strength or `auto`;
    otherwise the model decides. `farm`: where the clips of a folder are spread to.
    """

    source: Path
    target: Path
    settings: RefineSettings
    own_strength: bool
    prompt: str | None
    motion: str
    models: ModelOptions
    output: OutputOptions
    ranks: Ranks | None = None
    farm: FarmOptions | None = None


def refine_options(options: argparse.Namespace, source: Path, default_size: TargetSize) -> RefineOptions:
    """The command's options. Raises CommandError for invalid ones."""
    return RefineOptions(
        source=source,
        target=options.target,
        settings=refine_settings(options, target_size(options, default_size)),
        own_strength=options.strength is not None,
        prompt=options.prompt,
        motion=options.motion,
        models=model_options(options),
        output=output_options(options),
        ranks=options.ranks,
        farm=farm_options(options),
    )


def _refine(options: argparse.Namespace) -> int:
    place, chosen = trial_place(options), refine_options(options, options.source, TargetSize())
    return refine(chosen) if place is None else _try(chosen, place)


def _try(options: RefineOptions, place: tuple[float, float]) -> int:
    if options.ranks is not None or options.farm is not None:
        raise CommandError("--try takes one process on one device: leave out torchrun and --ray.")
    with _pyav_explained():
        from ..refiner.trial import check_trial

    check_trial(options.source, options.target)
    networks = _networks(options)
    settings = _with_own_strength(options, networks).settings
    return run_trial(networks, options.source, options.target, settings, options.output, place)


@dataclass(frozen=True)
class Job:
    """One file. `prompt` and `settings` replace the command's, where they differ from file to file."""

    source: Path
    target: Path
    prompt: str | None = None
    settings: RefineSettings | None = None


def refine(options: RefineOptions) -> int:
    """Refine a file, or all videos of a folder; returns the exit code. Raises CommandError before the work starts."""
    with _pyav_explained():
        from ..refiner.files import check_paths

    if options.farm is not None:
        if not options.source.is_dir():
            raise CommandError("--ray spreads the videos of a folder: give a folder as IN.")
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
        return _refine_on_workers(jobs, options)
    return _refine_all(jobs, _networks(options), options)


def _with_own_strength(options: RefineOptions, networks: Networks) -> RefineOptions:
    if options.own_strength or networks.dit.config not in NANO_REFINERS:
        return options
    return replace(options, settings=replace(options.settings, strength=NANO_STRENGTH))


def _refine_on_workers(jobs: list[Job], options: RefineOptions) -> int:
    from ..refiner.files import expected_work

    if options.models.model is None and not nano_is_trained():
        say(NANO_NOTICE)
    jobs = sorted(
        jobs, key=lambda job: expected_work(job.source, (job.settings or options.settings).size), reverse=True
    )
    clips = [
        Clip(job.source.name, job.target, replace(job, source=job.source.absolute(), target=job.target.absolute()))
        for job in jobs
    ]
    output = options.output
    options = replace(
        options,
        target=options.target.absolute(),
        models=absolute_models(options.models),
        output=replace(output, work=output.work and output.work.absolute()),
    )
    return run_on_workers(options.farm, partial(_prepare_worker, options), clips)


def _prepare_worker(options: RefineOptions) -> Callable[[Clip, PhaseProgress, Callable[[str], None]], Outcome]:
    """What a worker keeps from clip to clip. Raises CommandError."""
    return_memory()
    if not options.target.is_dir():
        raise CommandError(
            f"{socket.gethostname()} has no folder {options.target}: all machines need the videos and the folder of "
            "the results under the same path."
        )
    networks = _networks(options)
    return partial(_refine_clip, networks, TextEncoder(options.models, networks.device, keep=True), options)


def _refine_clip(
    networks: Networks,
    text: TextEncoder,
    options: RefineOptions,
    clip: Clip,
    report: PhaseProgress,
    note: Callable[[str], None],
) -> Outcome:
    job: Job = clip.task
    if _is_done(job.target, options):  # by a worker that was killed just then, or by another program
        return Outcome()
    try:
        damage = _refine_job(job, networks, text, options, report, note)
    except (CommandError, ValueError, OSError, RuntimeError, MemoryError) as error:
        return Outcome(problem=reason(error), in_use=isinstance(error, InUseError))
    return Outcome(notes=damage, damaged=bool(damage))


def _refine_all(jobs: list[Job], networks: Networks, options: RefineOptions) -> int:
    bars, failed, damaged = ProgressBars("frame", {REFINE: "window"}), 0, 0
    several = options.source.is_dir()  # several programs may share a folder
    text = TextEncoder(options.models, networks.device, keep=True)
    for job in jobs:
        # Another program has finished it in the meantime.
        if agree(options.ranks, lambda job=job: _is_done(job.target, options)):
            continue
        try:
            damage = _refine_job(job, networks, text, options, bars, warn)
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


def _refine_job(
    job: Job,
    networks: Networks,
    text: TextEncoder,
    options: RefineOptions,
    report: PhaseProgress,
    note: Callable[[str], None],
) -> tuple[str, ...]:
    """Returns sentences on what is damaged in the source."""
    from ..refiner.files import is_picture, refine_picture, refine_video

    if job.settings is not None:
        options = replace(options, prompt=job.prompt, settings=job.settings)
        context = encoded_prompt(job.prompt, options.motion, text, networks.dit.config.text_dim, options.ranks)
        networks = replace(networks, context=context)
    options = _with_own_strength(options, networks)
    settings, output = options.settings, options.output
    if is_picture(job.source):
        refine_picture(networks, job.source, job.target, settings, force=output.force, on_progress=report, note=note)
        return ()
    files = file_options(
        output,
        work=_work_of(job.target, options),
        about=_about(options, networks),
        note=note,
        warn=note if options.farm else lambda text: note(f"{job.source.name}: {text}"),
    )
    return refine_video(networks, job.source, job.target, settings, files, report)


def _fatal(job: Job, error: Exception) -> CommandError:
    """The error that ends all ranks."""
    return error if isinstance(error, RankEndedError) else CommandError(f"{job.source.name}: {reason(error)}")


def reason(error: Exception) -> str:
    """What went wrong with a file. Raises errors of unknown kinds again."""
    if isinstance(error, CommandError):
        return error.with_hint
    if is_out_of_memory(error):
        return (
            "out of memory. The same command resumes the run. A smaller --window, --tile or --vae-memory needs less; "
            "these are other settings, so add --anew."
        )
    if isinstance(error, RuntimeError | MemoryError):
        raise error
    return str(error)


def _jobs(options: RefineOptions) -> list[Job]:
    """What to refine, and where to. Results that a folder holds already are left out."""
    from ..refiner.files import videos_in, was_finished
    from ..video_files import CONTAINERS

    if not options.source.is_dir():
        job = Job(options.source, options.target)
        if not options.output.force and was_finished(job.target, _work_of(job.target, options)):
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
        if not _is_done(target, options):
            jobs.append(Job(video, target))
    return jobs


def _is_done(target: Path, options: RefineOptions) -> bool:
    """Whether a result exists and is kept; reports it, and deletes what a killed run has left beside it."""
    from ..refiner.files import was_finished

    done = target.exists() and not options.output.force
    if done:
        was_finished(target, _work_of(target, options))
        say(f"{target} exists already and is left as it is")
    return done


def _work_of(target: Path, options: RefineOptions) -> Path | None:
    from ..refiner.files import work_folder_of

    return None if options.output.work is None else work_folder_of(target, options.output.work)


def _networks(options: RefineOptions) -> Networks:
    return load_refiner(options.models, options.prompt, options.motion, options.ranks)


def _about(options: RefineOptions, networks: Networks) -> dict[str, Any]:
    """What the result depends on beside settings and source."""
    from ..refiner.files import file_identity

    dtypes = [str(next(network.parameters()).dtype) for network in (networks.dit, networks.vae)]
    about: dict[str, Any] = {"device": networks.device.type, "dtypes": dtypes}
    about |= {"vae_memory": networks.vae_memory, "vae_store": networks.vae_store}
    if networks.ranks is not None:  # the stored state is in their tiles
        about["processes"] = networks.ranks.size
    for name in ("model", "vae", "text_encoder"):
        path = getattr(options.models, name)
        built_in = f"{BUILT_IN} for footage" if options.models.footage else BUILT_IN
        about[name] = built_in if path is None else file_identity(path)
    return about | {"prompt": options.prompt, "motion": options.motion}
