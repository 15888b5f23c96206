"""`python -m flashvideo models list|verify|download`: which model files exist and are complete, how to get others."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..model_files import DOWNLOADS


def add_models(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    listing = ", ".join(f"{name} ({file.file})" for name, (_, file) in DOWNLOADS.items())
    parser = commands.add_parser(
        "models",
        description="Lists the model files that FlashVideo needs and which of them ComfyUI has; verifies them by their "
        "contents and by the checksums that Hugging Face publishes; downloads the named files only.",
        epilog=f"NAME is one of {listing}.",
    )
    parser.add_argument(
        "action", nargs="?", choices=("list", "verify", "download"), default="list", help="what to do (default: list)"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which files (list and verify: all by default)")
    default = "default: COMFYUI_PATH, else the ComfyUI this pack is in"
    parser.add_argument("--comfyui", type=Path, metavar="PATH", help=f"ComfyUI's folder ({default})")
    parser.add_argument(
        "--extra-model-paths", type=Path, metavar="FILE", help="extra_model_paths.yaml to use (default: ComfyUI's own)"
    )
    parser.add_argument("--offline", action="store_true", help="verify by contents only, without Hugging Face")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from .run_models import run  # brings PyTorch, which help and mistakes don't wait for

    return run(options)
