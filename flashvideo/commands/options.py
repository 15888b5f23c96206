"""Options that commands share: sizes, refiner, model files, output, workers. `chosen` reads them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from ..arguments import positive, real, shown, whole
from ..config import (
    AUTO,
    COLOR_MATCHES,
    DETAIL_SIZE,
    DTYPES,
    MAX_DETAIL_SIZE,
    MIN_DETAIL_SIZE,
    MOTIONS,
    NANO_DETAIL_SIZE,
    NANO_RESAMPLER,
    NANO_STRENGTH,
    OVERLAP_FRAMES,
    RESAMPLERS,
    SOLVERS,
    TILE,
    TRAIN_STEPS,
    WINDOW,
)
from ..presets import BALANCED, PRESETS

MOTION = "medium"  # the official script's for stage II
NO_SOURCE_OPTIONS = {"deinterlace": False, "fps": None, "start_number": None}
_ADDRESS = re.compile(r"[^\s:/]+:[0-9]{1,5}")


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
    group.add_argument(
        "--resample",
        choices=RESAMPLERS,
        help=f"how pixels are interpolated (default: {RESAMPLERS[0]}; FlashVideo-Nano for real footage: "
        f"{NANO_RESAMPLER})",
    )


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
        f"of the result, and {NANO_STRENGTH} for FlashVideo-Nano (default: what --preset says, {AUTO})",
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


def add_farm_options(group: argparse._ArgumentGroup) -> None:
    """Where a command's clips are spread to."""
    group.add_argument(
        "--ray",
        nargs="?",
        const="",
        type=_address,
        metavar="HOST:PORT",
        help="spread clips, and the windows of long ones, over the Ray cluster with its head there, from one of its "
        "machines; without an address over this machine's cards. Needs pip install 'comfyui-flashvideo[ray]'",
    )
    group.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="with --ray: how many of them (default: one a card; without cards one for every 4 cores)",
    )


def _address(text: str) -> str:
    if text not in ("", AUTO) and not _ADDRESS.fullmatch(text):
        raise argparse.ArgumentTypeError(
            "takes the address of a cluster's head, such as 10.0.0.1:6379, or auto, or nothing if it is the last "
            f"option; got {shown(text)}"
        )
    return text
