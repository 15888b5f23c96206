"""One file that is refined: its options, the networks, the work, and what went wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import NANO_FOOTAGE_STAGE2, NANO_RESAMPLER
from ..devices import is_out_of_memory
from ..errors import CommandError
from ..parallel import Ranks
from ..parallel.farm import FarmOptions
from ..progress import PhaseProgress
from ..refiner.run import Networks, RefineSettings
from .chosen import ModelOptions, OutputOptions, file_options
from .loading import BUILT_IN, TextEncoder, encoded_prompt, load_refiner
from .terminal import say


@dataclass(frozen=True)
class RefineOptions:
    """The command's options.

    `source` and `target` are both files, or both folders. `own_resample`: the user chose how pixels are interpolated;
    otherwise the model decides. `farm`: where clips are spread to.
    `context`: an encoded prompt in place of `prompt`.
    """

    source: Path
    target: Path
    settings: RefineSettings
    prompt: str | None
    motion: str
    models: ModelOptions
    output: OutputOptions
    ranks: Ranks | None = None
    farm: FarmOptions | None = None
    context: Tensor | None = None
    own_resample: bool = True


@dataclass(frozen=True)
class Job:
    """One file. `prompt` and `settings` replace the command's, where they differ from file to file."""

    source: Path
    target: Path
    prompt: str | None = None
    settings: RefineSettings | None = None


def refine_job(
    job: Job,
    networks: Networks,
    text: TextEncoder,
    options: RefineOptions,
    report: PhaseProgress,
    note: Callable[[str], None],
) -> tuple[str, ...]:
    """Refine a file; returns sentences on what is damaged in it."""
    from ..refiner.files import is_picture, refine_picture, refine_video

    if job.settings is not None:
        options = replace(options, prompt=job.prompt, settings=job.settings)
        context = encoded_prompt(job.prompt, options.motion, text, networks.dit.config.text_dim, options.ranks)
        networks = replace(networks, context=context)
    options = with_own_choices(options, networks)
    settings, output = options.settings, options.output
    if is_picture(job.source):
        refine_picture(networks, job.source, job.target, settings, force=output.force, on_progress=report, note=note)
        return ()
    files = file_options(
        output,
        work=work_of(job.target, options),
        about=_about(options, networks),
        note=note,
        warn=note if options.farm else lambda text: note(f"{job.source.name}: {text}"),
    )
    return refine_video(networks, job.source, job.target, settings, files, report)


def with_own_choices(options: RefineOptions, networks: Networks) -> RefineOptions:
    """The options with the resampler of these networks, where the user has chosen none."""
    if options.own_resample or networks.dit.config != NANO_FOOTAGE_STAGE2:
        return options
    return replace(options, settings=replace(options.settings, resample=NANO_RESAMPLER))


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


def is_done(target: Path, options: RefineOptions) -> bool:
    """Whether a result exists and is kept; reports it, and deletes what a killed run has left beside it."""
    from ..refiner.files import was_finished

    done = target.exists() and not options.output.force
    if done:
        was_finished(target, work_of(target, options))
        say(f"{target} exists already and is left as it is")
    return done


def work_of(target: Path, options: RefineOptions) -> Path | None:
    """The folder for a result's unfinished work, where the user has chosen one."""
    from ..refiner.files import work_folder_of

    return None if options.output.work is None else work_folder_of(target, options.output.work)


def refiner_networks(options: RefineOptions) -> Networks:
    """The networks that the options name. Raises CommandError and CheckpointError."""
    networks = load_refiner(options.models, options.prompt, options.motion, options.ranks)
    return networks if options.context is None else replace(networks, context=options.context)


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
