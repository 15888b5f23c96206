"""Options that commands share, and what they stand for: sizes, the refiner, model files, data types, prompts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import NANO_STRENGTH
from ..errors import CommandError
from ..frames import COLOR_MATCHES, RESAMPLERS
from ..guidance import STAGE2_SCALE
from ..nano import nano_state
from ..refiner.tiles import TILE
from ..refiner.windows import OVERLAP_FRAMES, WINDOW
from ..samplers import SOLVERS
from ..schedule import STAGE2_SHIFT, TRAIN_STEPS
from ..t5 import MOTIONS, T5Tokens, contexts, load_encoder

BUILT_IN = "nano"
AUTO = "auto"
MOTION = "medium"  # the official script's for stage II
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_file_options(group: argparse._ArgumentGroup) -> None:
    """How OUT is written."""
    group.add_argument("--crf", type=int, default=14, help="quality of the written video: 0 is lossless, default 14")
    group.add_argument(
        "--sound", choices=("copy", "aac", "none"), default="copy", help="copy (default) it as it is, encode it as AAC"
    )
    group.add_argument("--work", type=Path, metavar="DIR", help="folder for what is unfinished (default: beside OUT)")
    group.add_argument("--force", action="store_true", help="replace OUT if it exists")
    group.add_argument("--anew", action="store_true", help="don't go on with an unfinished run: start over")


def add_size_options(group: argparse._ArgumentGroup) -> None:
    """How large the result is."""
    group.add_argument("--short-side", type=int, metavar="N", help="pixels of the shorter side")
    group.add_argument("--scale", type=float, metavar="F", help="both sides times this")
    group.add_argument("--exact", metavar="WxH", help="this size, stretched if need be")
    group.add_argument("--keep-size", action="store_true", help="the size stays")
    group.add_argument("--resample", choices=RESAMPLERS, default=RESAMPLERS[0], help="how pixels are interpolated")


def add_refiner_options(group: argparse._ArgumentGroup) -> None:
    """How stage II works."""
    group.add_argument(
        "--motion", choices=MOTIONS, default=MOTION, help=f"how much moves, put before the prompt (default: {MOTION})"
    )
    for name, kind, default, text in (
        ("steps", int, 4, "4 to 6 is enough"),
        ("cfg", float, STAGE2_SCALE, "how strongly detail follows the prompt; 10 to 13 works well"),
        ("shift", float, STAGE2_SHIFT, "how the steps are spaced; 2 to 3.5 works well"),
        ("seed", int, 0, "another one gives another version of the fine detail"),
        ("window", int, WINDOW, "frames that are refined together, 4n+1; fewer need less memory"),
        ("overlap", int, OVERLAP_FRAMES, "frames that neighbouring windows share, a multiple of 4"),
        ("tile", int, 0, f"pixels of the picture that are refined together, such as {TILE}, an approximation; 0: all"),
    ):
        group.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {default})")
    group.add_argument(
        "--strength",
        type=_strength,
        metavar="N",
        help="how much detail is made anew, 0 to 999, or auto: what the official 675 at 1080p means for the size of "
        f"the result (default: {AUTO}; FlashVideo-Nano: {NANO_STRENGTH})",
    )
    group.add_argument("--solver", choices=SOLVERS, default=SOLVERS[0], help="default: euler")
    group.add_argument(
        "--color", choices=COLOR_MATCHES, default="wavelet", help="how colours are matched to IN's (default: wavelet)"
    )


def add_model_options(group: argparse._ArgumentGroup) -> None:
    """Which files are read, and where the work is done."""
    group.add_argument("--model", metavar="FILE", type=Path, help="stage II (default: the built-in FlashVideo-Nano)")
    group.add_argument("--vae", metavar="FILE", type=Path, help="the VAE that goes with it")
    group.add_argument("--text-encoder", metavar="FILE", type=Path, help="T5-XXL, needed for a prompt with --model")
    group.add_argument("--tokenizer", metavar="FILE", default="", help="T5's tokenizer.json (default: ComfyUI's)")
    group.add_argument(
        "--vae-memory",
        metavar="GiB",
        type=float,
        help="memory for the VAE: beyond it works in tiles, slower (default: most of a CUDA card's, else no limit)",
    )
    group.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the first there is)")
    group.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 and a float16 VAE, on a CPU float32")


def _strength(text: str) -> int | str:
    """--strength: a number of 0 to 999, or AUTO."""
    if text == AUTO:
        return AUTO
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes 0 to {TRAIN_STEPS - 1} or {AUTO}; got {text}") from None


def dtypes(name: str | None, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Data types of the transformers and of the VAE: the one that was asked for, or what the device does well."""
    if name:
        return DTYPES[name], DTYPES[name]
    return (torch.float32, torch.float32) if device.type == "cpu" else (torch.bfloat16, torch.float16)


def model_file(path: Path | None, part: str) -> Any:
    """The file that was asked for, or the built-in one. Raises CommandError if there is no such file."""
    if path is None:
        return nano_state(part)
    if not path.is_file():
        raise CommandError(f"There is no file {path}.")
    return path


def encode_prompt(text: str, options: argparse.Namespace, text_dim: int, device: torch.device) -> Tensor:
    """A text's encoding [1, 226, text_dim] by the encoder that was asked for. Raises CommandError."""
    if options.text_encoder is None and options.model is not None:
        raise CommandError("A prompt needs --text-encoder FILE, T5-XXL (t5xxl_fp16.safetensors).")
    source = model_file(options.text_encoder, "text_encoder")
    tokens = T5Tokens(options.tokenizer)
    dtype = torch.float32 if options.text_encoder is None else torch.bfloat16  # as the official script has it
    context = contexts(load_encoder(source, device, dtype), tokens, [text])
    if context.shape[2] != text_dim:
        raise CommandError(
            f"The text encoder gives {context.shape[2]} numbers a token and the model takes {text_dim}: "
            "they don't belong together."
        )
    return context
