"""What a command line chose, checked: the dataclasses that the options of `options` are read into."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import shown, width_and_height
from ..config import AUTO, OVERLAP_FRAMES, RESAMPLERS, TEMPORAL_FACTOR
from ..devices import GIB
from ..errors import CommandError
from ..frames import MAX_SIDE, TargetSize
from ..presets import PRESETS
from ..refiner.run import RefineSettings
from ..t5 import T5Tokens

if TYPE_CHECKING:  # brings PyAV
    from ..refiner.file_options import FileOptions

MAX_CRF = 51  # of x264
MAX_FPS = 1000
MAX_MEMORY = 1e6  # GiB; anything beyond is a slip


@dataclass(frozen=True)
class OutputOptions:
    """How OUT is written, see `add_file_options`."""

    crf: int
    sound: str
    codec: str
    bits: int | None
    deinterlace: bool
    fps: float | None
    start_number: int | None
    work: Path | None
    force: bool
    anew: bool


@dataclass(frozen=True)
class ModelOptions:
    """Which model files are read, None for the built-in ones, and which device is used; `vae_memory` in bytes.

    `footage`: the built-in stage II and VAE are those for real footage, not those for drawn scenes.
    """

    model: Path | None
    vae: Path | None
    text_encoder: Path | None
    tokenizer: str
    vae_memory: float | None
    device: str | None
    dtype: str | None
    shard_weights: bool = False
    footage: bool = False

    def built_in(self, part: str) -> str:
        """The name of the built-in "stage2" or "vae" that is meant, one of `nano.NANO_PARTS`."""
        return f"footage_{part}" if self.footage else part


def output_options(options: argparse.Namespace) -> OutputOptions:
    """The options of `add_file_options` and `add_source_options`. Raises CommandError."""
    if not 0 <= options.crf <= MAX_CRF:
        raise CommandError(f"--crf must be 0 to {MAX_CRF}; got {options.crf}.")
    if options.fps is not None and not 0 < options.fps <= MAX_FPS:
        raise CommandError(f"--fps must be above 0 and at most {MAX_FPS}; got {options.fps:g}.")
    if options.start_number is not None and options.start_number < 0:
        raise CommandError(f"--start-number must be 0 or more; got {options.start_number}.")
    bits = None if options.bits == AUTO else int(options.bits)
    return OutputOptions(
        options.crf,
        options.sound,
        options.codec,
        bits,
        options.deinterlace,
        options.fps,
        options.start_number,
        options.work,
        options.force,
        options.anew,
    )


def file_options(output: OutputOptions, **others: Any) -> FileOptions:
    """The same for a run; `others` are its own fields, such as the work folder."""
    from ..refiner.file_options import FileOptions

    return FileOptions(
        crf=output.crf,
        sound=output.sound,
        codec=output.codec,
        bits=output.bits,
        deinterlace=output.deinterlace,
        fps=output.fps,
        start_number=output.start_number,
        force=output.force,
        anew=output.anew,
        **others,
    )


def model_options(options: argparse.Namespace) -> ModelOptions:
    """The options of `add_model_options`. Raises CommandError if --model comes without --vae, or the reverse,
    for files that aren't there, and for numbers out of range.
    """
    if (options.model is None) != (options.vae is None):
        raise CommandError("--model and --vae go together: another model's VAE makes another latent.")
    if options.shard_weights and options.ranks is None:
        raise CommandError("--shard-weights shares weights among several processes: start the command with torchrun.")
    if options.vae_memory is not None and not 0 < options.vae_memory <= MAX_MEMORY:
        raise CommandError(f"--vae-memory must be above 0, in GiB; got {options.vae_memory:g}.")
    for path in (options.model, options.vae, options.text_encoder):
        if path is not None:
            existing_file(path)
    if options.tokenizer:
        T5Tokens(options.tokenizer)
    return ModelOptions(
        model=options.model,
        vae=options.vae,
        text_encoder=options.text_encoder,
        tokenizer=options.tokenizer,
        vae_memory=None if options.vae_memory is None else options.vae_memory * GIB,
        device=options.device,
        dtype=options.dtype,
        footage=options.footage,
        shard_weights=options.shard_weights,
    )


def absolute_models(models: ModelOptions) -> ModelOptions:
    """The same files for a process that works in another folder."""
    paths = {name: getattr(models, name) for name in ("model", "vae", "text_encoder")}
    paths = {name: path and path.absolute() for name, path in paths.items()}
    return replace(models, **paths, tokenizer=models.tokenizer and str(Path(models.tokenizer).absolute()))


def existing_file(path: Path) -> Path:
    """The path itself. Raises CommandError if it isn't a file's."""
    if not path.is_file():
        raise CommandError(f"There is no file {path}.")
    return path


def target_size(options: argparse.Namespace, default: TargetSize) -> TargetSize:
    """The options of `add_size_options`. Raises CommandError for two sizes, and for an --exact that is none."""
    names = ("short_side", "scale", "exact", "keep_size")
    wanted = [name for name in names if getattr(options, name) not in (None, False)]
    if len(wanted) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in wanted)
        raise CommandError(f"{names} are two sizes: give one of them.")
    if options.exact is not None:
        sides = width_and_height(options.exact)
        if sides is None:
            raise CommandError(f"--exact takes a width and a height, such as 1920x1080; got {shown(options.exact)}.")
        if not 1 <= min(sides) <= max(sides) <= MAX_SIDE:
            raise CommandError(f"--exact takes sides of 1 to {MAX_SIDE} pixels; got {options.exact}.")
        return TargetSize("exact", width=sides[0], height=sides[1])
    if options.scale is not None:
        return _checked_size("scale", scale=options.scale)
    if options.keep_size:
        return TargetSize("keep")
    return default if options.short_side is None else _checked_size("short side", short_side=options.short_side)


def _checked_size(mode: str, **choices: float) -> TargetSize:
    try:
        return TargetSize(mode, **choices)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _overlap(window: int) -> int:
    """The default for windows of this many frames: a multiple of 4 that fits in."""
    return min(OVERLAP_FRAMES, max(0, window - 1) // TEMPORAL_FACTOR * TEMPORAL_FACTOR)


def refine_settings(options: argparse.Namespace, size: TargetSize) -> RefineSettings:
    """The options of `add_refiner_options`, and the size. Raises CommandError for what can't be."""
    own = {name: getattr(options, name) for name in ("strength", "steps", "cfg", "shift")}
    own = {name: None if value == AUTO else value for name, value in own.items() if value is not None}
    try:
        settings = RefineSettings(
            size=size,
            resample=options.resample or RESAMPLERS[0],
            **PRESETS[options.preset].choices | own,
            solver=options.solver,
            seed=options.seed,
            window=options.window,
            overlap=_overlap(options.window) if options.overlap is None else options.overlap,
            tile=options.tile,
            color_match=options.color,
            detail_size=None if options.detail_size == AUTO else options.detail_size,
        )
    except ValueError as error:
        raise CommandError(str(error)) from error
    return replace(settings, cfg=1.0) if options.prompt is None else settings
