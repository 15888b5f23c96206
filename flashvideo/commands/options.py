"""Options that commands share, and the dataclasses that hold them: sizes, refiner, model files, output."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..arguments import real, shown, whole, width_and_height
from ..color import DETAIL_SIZE, MAX_DETAIL_SIZE, MIN_DETAIL_SIZE, NANO_DETAIL_SIZE
from ..config import NANO_STRENGTH, TEMPORAL_FACTOR
from ..devices import GIB
from ..errors import CommandError
from ..frames import COLOR_MATCHES, MAX_SIDE, RESAMPLERS, TargetSize
from ..presets import BALANCED, PRESETS
from ..refiner.run import RefineSettings
from ..refiner.tiles import TILE
from ..refiner.windows import OVERLAP_FRAMES, WINDOW
from ..samplers import SOLVERS
from ..schedule import TRAIN_STEPS
from ..t5 import MOTIONS, T5Tokens

if TYPE_CHECKING:  # brings PyAV
    from ..refiner.file_options import FileOptions

AUTO = "auto"
MAX_CRF = 51  # of x264
MAX_FPS = 1000
NO_SOURCE_OPTIONS = {"deinterlace": False, "fps": None, "start_number": None}
MAX_MEMORY = 1e6  # GiB; anything beyond is a slip
MOTION = "medium"  # the official script's for stage II
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def add_file_options(group: argparse._ArgumentGroup) -> None:
    """How OUT is written."""
    group.add_argument(
        "--codec",
        choices=(AUTO, "h264", "hevc", "av1", "prores"),
        default=AUTO,
        help="of the written video (default: auto: h264, with 10 bits hevc); prores keeps transparency",
    )
    group.add_argument(
        "--bits",
        choices=(AUTO, "8", "10"),
        default=AUTO,
        help="a colour in the written video (default: auto: 10 if IN has more than 8; prores always has 10)",
    )
    group.add_argument("--crf", type=whole, default=14, help="quality of the written video: 0 is lossless, default 14")
    group.add_argument(
        "--sound", choices=("copy", "aac", "none"), default="copy", help="copy (default) it as it is, encode it as AAC"
    )
    group.add_argument("--work", type=Path, metavar="DIR", help="folder for unfinished work (default: beside OUT)")
    group.add_argument("--force", action="store_true", help="replace OUT if it exists")
    group.add_argument("--anew", action="store_true", help="start over instead of resuming an unfinished run")


def add_source_options(group: argparse._ArgumentGroup) -> None:
    """How IN is read, and its frames numbered; commands without IN take NO_SOURCE_OPTIONS."""
    group.add_argument("--deinterlace", action="store_true", help="make whole pictures of IN's interlaced ones first")
    group.add_argument("--fps", type=real, metavar="F", help="frames a second of numbered pictures as IN (default: 24)")
    group.add_argument(
        "--start-number", type=whole, metavar="N", help="of numbered pictures as OUT (default: as in IN, of a video 1)"
    )


def add_size_options(group: argparse._ArgumentGroup) -> None:
    """How large the result is."""
    group.add_argument("--short-side", type=whole, metavar="N", help="pixels of the shorter side")
    group.add_argument("--scale", type=real, metavar="F", help="both sides times this")
    group.add_argument("--exact", metavar="WxH", help="exactly this size; stretches the picture if the shape differs")
    group.add_argument("--keep-size", action="store_true", help="keep the size")
    group.add_argument("--resample", choices=RESAMPLERS, default=RESAMPLERS[0], help="how pixels are interpolated")


def add_refiner_options(group: argparse._ArgumentGroup) -> None:
    """How stage II works."""
    group.add_argument(
        "--motion", choices=MOTIONS, default=MOTION, help=f"how much moves; goes before the prompt (default: {MOTION})"
    )
    group.add_argument(
        "--preset",
        choices=PRESETS,
        default=BALANCED,
        help=f"strength, steps, cfg and shift in one word (default: {BALANCED}, the official numbers): faithful stays "
        "closer to IN, rich invents more, fast takes 3 evaluations in place of 8. Numbers that you give yourself win; "
        "FlashVideo-Nano keeps its own strength",
    )
    numbers = PRESETS[BALANCED]
    for name, kind, default, text in (
        ("steps", whole, numbers.steps, "4 to 6 is enough"),
        ("cfg", real, numbers.cfg, "how strongly detail follows the prompt; useful: 10 to 13"),
        ("shift", real, numbers.shift, "how the steps are spaced; useful: 2 to 3.5"),
    ):
        group.add_argument(f"--{name}", type=kind, help=f"{text} (default: {default:g}, or what --preset says)")
    for name, kind, default, text in (
        ("seed", whole, 0, "another seed gives another version of the fine detail"),
        ("window", whole, WINDOW, "frames that are refined together, 4n+1; fewer need less memory"),
        ("tile", whole, 0, f"pixels; refine in tiles of this side, such as {TILE}, an approximation; 0: no tiles"),
    ):
        group.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {default})")
    group.add_argument(
        "--overlap",
        type=whole,
        help=f"frames that neighbouring windows share, a multiple of 4 (default: {OVERLAP_FRAMES}, or what "
        "fits in a shorter window)",
    )
    group.add_argument(
        "--strength",
        type=_or_auto(0, TRAIN_STEPS - 1),
        metavar="N",
        help="how much detail is made new, 0 to 999, or auto: the equivalent of the official 675 at 1080p for the size "
        f"of the result (default: what --preset says, {AUTO}; FlashVideo-Nano: {NANO_STRENGTH})",
    )
    group.add_argument("--solver", choices=SOLVERS, default=SOLVERS[0], help="default: euler")
    group.add_argument(
        "--color", choices=COLOR_MATCHES, default="wavelet", help="how colours are matched to IN's (default: wavelet)"
    )
    group.add_argument(
        "--detail-size",
        type=_or_auto(MIN_DETAIL_SIZE, MAX_DETAIL_SIZE),
        default=AUTO,
        metavar="PX",
        help="with wavelet: what is smaller than this many pixels comes from the refiner, what is larger from IN; 70 "
        f"takes over colours only, twice the enlargement is most faithful (default: {AUTO}: {DETAIL_SIZE}, "
        f"FlashVideo-Nano {NANO_DETAIL_SIZE})",
    )


def add_model_options(group: argparse._ArgumentGroup) -> None:
    """Which model files are read, and which device is used."""
    group.add_argument("--model", metavar="FILE", type=Path, help="stage II (default: the built-in FlashVideo-Nano)")
    group.add_argument("--vae", metavar="FILE", type=Path, help="the VAE that goes with it")
    group.add_argument("--text-encoder", metavar="FILE", type=Path, help="T5-XXL, needed for a prompt with --model")
    group.add_argument("--tokenizer", metavar="FILE", default="", help="T5's tokenizer.json (default: the pack's)")
    group.add_argument(
        "--vae-memory",
        metavar="GiB",
        type=real,
        help="memory for the VAE: beyond it works in tiles, slower (default: most of a CUDA card's, else no limit)",
    )
    group.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the first there is)")
    group.add_argument(
        "--shard-weights",
        action="store_true",
        help="with torchrun: each process keeps a share of the transformers' weights; slower, for cards that can't "
        "hold them (default: each keeps all)",
    )
    group.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 and a float16 VAE, on a CPU float32")


def _or_auto(first: int, last: int) -> Callable[[str], int | str]:
    """What reads a whole number, or AUTO; the limits are for its message."""

    def read(text: str) -> int | str:
        if text == AUTO:
            return AUTO
        try:
            return whole(text)
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(f"takes {first} to {last} or {AUTO}; got {shown(text)}") from None

    return read


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
            resample=options.resample,
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
