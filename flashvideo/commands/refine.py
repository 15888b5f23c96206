"""`python -m flashvideo refine IN OUT`: refine a video, a picture or a folder of videos without ComfyUI."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..atomic_files import InUseError
from ..checkpoints import load_dit, load_vae
from ..config import NANO_STAGE2, NANO_STRENGTH, TEXT_TOKENS
from ..devices import is_out_of_memory, main_memory, open_device
from ..errors import CommandError
from ..frames import TargetSize
from ..nano import NANO_NOTICE, nano_is_trained
from ..refiner.run import REFINE, Networks, RefineSettings
from ..t5 import with_motion
from ..vae.memory import STORE_SHARE, VAE_SHARE
from .options import (
    AUTO,
    BUILT_IN,
    add_file_options,
    add_model_options,
    add_refiner_options,
    add_size_options,
    dtypes,
    encode_prompt,
    model_file,
)
from .terminal import CANCELLED, DAMAGED, REFUSED, say


def add_refine(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "refine",
        help="refine a video, a picture or a folder of videos",
        description="Give a video real detail: same frames, same times, same sound. A run that was ended, however it "
        "was, goes on when the same command is given again.",
    )
    parser.add_argument("source", metavar="IN", type=Path, help="a video, a picture, or a folder of videos")
    parser.add_argument("target", metavar="OUT", type=Path, help="the file to write (.mp4, .mov, .mkv), or a folder")
    add_size_options(parser.add_argument_group("size of the result (default: --short-side 1080)"))
    group = parser.add_argument_group("refiner")
    group.add_argument(
        "--prompt",
        help="what the video shows. Without one there is nothing to guide by: the refiner gets an empty text, and "
        "--cfg is 1",
    )
    add_refiner_options(group)
    add_model_options(parser.add_argument_group("models"))
    add_file_options(parser.add_argument_group("files"))
    parser.set_defaults(run=refine)


@dataclass(frozen=True)
class _Job:
    source: Path
    target: Path


def refine(options: argparse.Namespace) -> int:
    """Do what the options say; returns the exit code."""
    # Imported here, so that the other commands don't need PyAV.
    try:
        from ..refiner.files import check_paths
    except ModuleNotFoundError as error:
        raise CommandError(f"Refining files needs the package {error.name}: use ComfyUI's Python.") from error

    settings = _settings(options)
    jobs = _jobs(options)
    for job in jobs:
        check_paths(job.source, job.target, force=options.force)
    if not jobs:
        return 0
    networks = _networks(options)
    if options.strength is None and networks.dit.config == NANO_STAGE2:
        settings = replace(settings, strength=NANO_STRENGTH)
    return _refine_all(jobs, networks, settings, options)


def _refine_all(jobs: list[_Job], networks: Networks, settings: RefineSettings, options: argparse.Namespace) -> int:
    bars, failed, damaged = _Bars(), 0, 0
    several = options.source.is_dir()  # which more than one program may share
    for job in jobs:
        if _is_done(job.target, options):  # by another program, since the work began
            continue
        try:
            damage = _refine_job(job, networks, settings, options, bars)
        except (CommandError, ValueError, OSError, RuntimeError, MemoryError) as error:
            bars.close()
            failed += not (several and isinstance(error, InUseError))
            sys.stderr.write(f"{job.source.name}: {_reason(error)}\n")
        except KeyboardInterrupt:
            bars.close()
            sys.stderr.write("\nCancelled. The same command resumes the run.\n")
            return CANCELLED
        else:
            bars.close()
            damaged += bool(damage)
            say(f"{job.target}: refined" + "".join(f"\n  {text}" for text in damage))
    if failed:
        return REFUSED
    return DAMAGED if damaged else 0


def _refine_job(
    job: _Job, networks: Networks, settings: RefineSettings, options: argparse.Namespace, bars: _Bars
) -> tuple[str, ...]:
    """Returns what is damaged of the source."""
    from ..refiner.files import FileOptions, is_picture, refine_picture, refine_video

    if is_picture(job.source):
        refine_picture(networks, job.source, job.target, settings, force=options.force, on_progress=bars, note=_say)
        return ()
    files = FileOptions(
        crf=options.crf,
        sound=options.sound,
        force=options.force,
        work=_work(options, job),
        anew=options.anew,
        about=_about(options, networks),
        note=_say,
        warn=lambda text: _say(f"{job.source.name}: {text}"),
    )
    return refine_video(networks, job.source, job.target, settings, files, bars)


def _say(note: str) -> None:
    sys.stderr.write(f"{note}\n")


def _reason(error: Exception) -> str:
    """What went wrong with a file; raises what isn't known."""
    if isinstance(error, CommandError):
        return error.with_hint
    if is_out_of_memory(error):
        return (
            "out of memory. The same command resumes the run. With a smaller --window, --tile or --vae-memory it needs "
            "less; these are other settings, so add --anew."
        )
    if isinstance(error, RuntimeError | MemoryError):
        raise error
    return str(error)


def _settings(options: argparse.Namespace) -> RefineSettings:
    try:
        return RefineSettings(
            size=_size(options),
            resample=options.resample,
            strength=None if options.strength in (None, AUTO) else options.strength,
            steps=options.steps,
            cfg=1.0 if options.prompt is None else options.cfg,
            shift=options.shift,
            solver=options.solver,
            seed=options.seed,
            window=options.window,
            overlap=options.overlap,
            tile=options.tile,
            color_match=options.color,
        )
    except ValueError as error:
        raise CommandError(str(error)) from error


def _size(options: argparse.Namespace) -> TargetSize:
    names = ("short_side", "scale", "exact", "keep_size")
    wanted = [name for name in names if getattr(options, name) not in (None, False)]
    if len(wanted) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in wanted)
        raise CommandError(f"{names} are two sizes: give one of them.")
    if options.exact:
        sides = options.exact.lower().split("x")
        if len(sides) != 2 or not all(side.isdigit() for side in sides):
            raise CommandError(f"--exact takes a width and a height, such as 1920x1080; got {options.exact}.")
        return TargetSize("exact", width=int(sides[0]), height=int(sides[1]))
    if options.scale is not None:
        return TargetSize("scale", scale=options.scale)
    if options.keep_size:
        return TargetSize("keep")
    return TargetSize("short side", short_side=options.short_side) if options.short_side is not None else TargetSize()


def _jobs(options: argparse.Namespace) -> list[_Job]:
    """What to refine, and where to; in a folder, what is there already is left out."""
    from ..refiner.files import videos_in, was_finished
    from ..video_files import CONTAINERS

    if not options.source.is_dir():
        job = _Job(options.source, options.target)
        if not options.force and was_finished(job.target, _work(options, job)):
            say(f"{job.target}: refined")  # by a run that was killed when it cleaned up
            return []
        return [job]
    videos = videos_in(options.source)
    if not videos:
        raise CommandError(f"{options.source} holds no videos.")
    if options.target.exists() and not options.target.is_dir():
        raise CommandError(f"{options.target} is a file: a folder of videos needs a folder to go to.")
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
            jobs.append(_Job(video, target))
    return jobs


def _is_done(target: Path, options: argparse.Namespace) -> bool:
    """Whether a result is there and stays; says so."""
    done = target.exists() and not options.force
    if done:
        sys.stdout.write(f"{target} exists already and is left as it is\n")
    return done


def _work(options: argparse.Namespace, job: _Job) -> Path | None:
    from ..refiner.files import work_folder_of

    return None if options.work is None else work_folder_of(job.target, options.work)


def _networks(options: argparse.Namespace) -> Networks:
    if (options.model is None) != (options.vae is None):
        raise CommandError("--model and --vae go together: another model's VAE makes another latent.")
    device = open_device(options.device)
    dit_dtype, vae_dtype = dtypes(options.dtype, device)
    if options.model is None and not nano_is_trained():
        sys.stdout.write(f"{NANO_NOTICE}\n")
    dit = load_dit(model_file(options.model, "stage2"), dtype=dit_dtype)
    if dit.config.stage != 2:
        raise CommandError(f"{options.model} is stage I, which makes drafts; the refiner is stage II.")
    vae = load_vae(model_file(options.vae, "vae"), dtype=vae_dtype)
    if options.prompt is None:
        context = torch.zeros(1, TEXT_TOKENS, dit.config.text_dim)  # as for the unconditional side
    else:
        context = encode_prompt(with_motion(options.prompt, options.motion), options, dit.config.text_dim, device)
    store = None if device.type == "cpu" else STORE_SHARE * main_memory()
    return Networks(dit, vae, context, device, _vae_memory(options.vae_memory, device), store)


def _vae_memory(gibibytes: float | None, device: torch.device) -> float | None:
    """Bytes for the VAE."""
    if gibibytes is not None:
        return gibibytes * 2**30
    return VAE_SHARE * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _about(options: argparse.Namespace, networks: Networks) -> dict[str, Any]:
    """What else than settings and source the result depends on."""
    from ..refiner.files import file_identity

    dtypes = [str(next(network.parameters()).dtype) for network in (networks.dit, networks.vae)]
    about: dict[str, Any] = {"device": networks.device.type, "dtypes": dtypes}
    about |= {"vae_memory": networks.vae_memory, "vae_store": networks.vae_store}
    for name in ("model", "vae", "text_encoder"):
        path = getattr(options, name)
        about[name] = BUILT_IN if path is None else file_identity(path)
    return about | {"prompt": options.prompt, "motion": options.motion}


class _Bars:
    """A bar for each phase on standard error: windows in stage II, frames in the others."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, phase: str, done: float, total: int) -> None:
        if self._bar is None or self._bar.desc != phase:
            self.close()
            unit = "window" if phase == REFINE else "frame"
            # What an earlier run has done doesn't count for the speed.
            self._bar = tqdm(total=total, desc=phase, unit=unit, initial=round(done, 2))
        self._bar.total = total
        self._bar.update(round(done - self._bar.n, 2))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
