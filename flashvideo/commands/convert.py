"""`python -m flashvideo convert|info`: write a model as safetensors with ComfyUI's names, and describe a model file."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config import FILE_DTYPES


def add_convert(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "convert",
        description="Writes a model as safetensors or GGUF with ComfyUI's names, its LoRA merged into it; a text "
        "encoder as GGUF; or a CogVideoX LoRA with the names that ComfyUI's LoRA loaders know. IN stays as it is.",
    )
    parser.add_argument("source", metavar="IN", type=Path, help="stage1.pt, 3d-vae.pt, t5xxl_fp16.safetensors, a LoRA")
    parser.add_argument("target", metavar="OUT", type=Path, help="the .safetensors or .gguf file to write")
    parser.add_argument(
        *("--dtype", "--to"),
        choices=FILE_DTYPES,
        type=lambda text: text.replace("-", "_"),
        default="keep",
        help="data type of the new file (default: keep). fp8_scaled, mxfp8 and int8 have scale factors: as small as "
        "fp8_e4m3fn, and int8 is nearer to the original; nvfp4 has 4 bits; gguf_... writes GGUF, and needs the package "
        "gguf",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=_convert)


def add_info(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "info",
        description="Tells what a model file or a LoRA is, by its contents: stage, size, data types, metadata.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="a model, or a LoRA of this pack's training")
    parser.set_defaults(run=_info)


def _convert(options: argparse.Namespace) -> None:
    from .run_convert import convert  # brings PyTorch, which help and mistakes don't wait for

    convert(options)


def _info(options: argparse.Namespace) -> None:
    from .run_convert import info  # brings PyTorch

    info(options.file)
