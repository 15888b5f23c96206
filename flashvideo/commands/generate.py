"""`python -m flashvideo generate WORDS OUT`: a video from words without ComfyUI, draft and refined."""

from __future__ import annotations

import argparse
import json
import sys
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..atomic_files import write_whole
from ..checkpoints import load_dit, load_vae
from ..config import PIXEL_MULTIPLE, STAGE1_LATENT_SCALE, is_video_length, latent_shape
from ..devices import open_device
from ..errors import CommandError
from ..frames import to_bytes, to_frames
from ..guidance import STAGE1_SCALE
from ..samplers import sample_stage1
from .options import (
    BUILT_IN,
    add_file_options,
    add_model_options,
    add_refiner_options,
    add_size_options,
    dtypes,
    encode_prompt,
    model_file,
)
from .refine import refine

RATE = Fraction(8)  # frames a second: what the model makes
OFFICIAL_DRAFT, NANO_DRAFT = ("480x256", 49), ("112x64", 17)  # size and frames
NANO_SCALE = 4.0  # from its draft to its refined video
DRAFT_ENDING = ".draft.mkv"  # of the draft beside the result


def add_generate(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "generate",
        help="make a video from words",
        description="Make a video from words: a draft (stage I), which is kept beside OUT, without loss, and then "
        "refined (stage II). Where the draft is there already, only the refining is done, and goes on where it was.",
    )
    parser.add_argument("prompt", metavar="WORDS", help="what the video shows")
    parser.add_argument("target", metavar="OUT", type=Path, help="the file to write (.mp4, .mov, .mkv)")
    group = parser.add_argument_group("draft")
    group.add_argument("--draft-size", metavar="WxH", help="multiples of 16 (default: 480x256; Nano: 112x64)")
    group.add_argument("--frames", type=int, metavar="N", help="4n+1 (default: 49; Nano: 17)")
    group.add_argument("--draft-steps", type=int, default=50, metavar="N", help="30 to 50 is useful (default: 50)")
    group.add_argument("--draft-cfg", type=float, default=STAGE1_SCALE, metavar="F", help="6 to 8 (default: 8)")
    group.add_argument("--draft-only", action="store_true", help="leave it at the draft")
    add_size_options(parser.add_argument_group("size of the result (default: --short-side 1080; Nano: --scale 4)"))
    add_refiner_options(parser.add_argument_group("refiner"))
    models = parser.add_argument_group("models")
    models.add_argument("--draft-model", metavar="FILE", type=Path, help="stage I (default: the built-in Nano)")
    add_model_options(models)
    add_file_options(parser.add_argument_group("files"))
    parser.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> int:
    # Imported here, so that the other commands don't need PyAV.
    try:
        from ..refiner.files import check_target
        from ..video_files import CONTAINERS, read_comment, write_lossless
    except ModuleNotFoundError as error:
        raise CommandError(f"Video files need the package {error.name}: use ComfyUI's Python.") from error
    if (options.draft_model is None) != (options.model is None):
        raise CommandError("--draft-model and --model go together: Nano's drafts are no official ones.")
    if options.target.suffix.lower() not in CONTAINERS:
        raise CommandError(f"{options.target.name} should end in {', '.join(CONTAINERS)}.")
    check_target(options.target, force=options.force)
    draft, about = options.target.with_name(options.target.name + DRAFT_ENDING), _about(options)
    if options.anew or not draft.is_file():
        frames = make_draft(options)
        write_whole(draft, lambda part: write_lossless(part, frames, RATE, about))
        sys.stdout.write(f"{draft}: the draft\n")
    elif read_comment(draft) != about:
        told = f"{draft} is the draft of other words or settings. Give OUT another name."
        raise CommandError(told, "--anew replaces it.")
    else:
        sys.stdout.write(f"{draft}: the draft is there already\n")
    if options.draft_only:
        return 0
    if options.model is None and not any((options.short_side, options.scale, options.exact, options.keep_size)):
        options.scale = NANO_SCALE
    options.source = draft
    return refine(options)


@torch.inference_mode()
def make_draft(options: argparse.Namespace) -> Tensor:
    """Stage I for the options: frames [T, H, W, 3] uint8. The noise is that of FlashVideo Stage I Sampler's seed."""
    height, width, count = _shape(options)
    device = open_device(options.device)
    dit_dtype, vae_dtype = dtypes(options.dtype, device)
    dit = load_dit(model_file(options.draft_model, "stage1"), dtype=dit_dtype, stage=1)
    context = encode_prompt(options.prompt, options, dit.config.text_dim, device).to(device, dit_dtype)
    dit = dit.eval().to(device)
    generator = torch.Generator("cpu").manual_seed(options.seed)
    shape = (1, dit.config.in_channels, *latent_shape((count, height, width)))

    def noise(_step: int = 0) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    with tqdm(total=options.draft_steps, desc="draft", unit="step") as bar:
        latent = sample_stage1(
            dit, noise(), context, torch.zeros_like(context),
            steps=options.draft_steps, scale=options.draft_cfg, step_noise=noise, on_step=lambda *_: bar.update(),
        )  # fmt: skip
    del dit
    vae = load_vae(model_file(options.vae, "vae"), dtype=vae_dtype).eval().to(device)
    return to_bytes(to_frames(vae.decode((latent / STAGE1_LATENT_SCALE).to(vae_dtype)).float().cpu()))


def _about(options: argparse.Namespace) -> str:
    """What the draft depends on."""
    from ..refiner.files import file_identity

    names = ("draft_model", "vae", "text_encoder")
    files = {name: file_identity(path) if (path := getattr(options, name)) else BUILT_IN for name in names}
    choices = {name: getattr(options, name) for name in ("prompt", "draft_steps", "draft_cfg", "seed", "dtype")}
    return json.dumps({**choices, "shape": _shape(options), **files})


def _shape(options: argparse.Namespace) -> tuple[int, int, int]:
    """(height, width, frames) of the draft."""
    size, count = NANO_DRAFT if options.model is None else OFFICIAL_DRAFT
    size, count = options.draft_size or size, options.frames or count
    sides = size.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) and int(side) % PIXEL_MULTIPLE == 0 for side in sides):
        raise CommandError(f"--draft-size takes a width and a height in multiples of 16, such as 480x256; got {size}.")
    if not is_video_length(count):
        raise CommandError(f"--frames must be 1, 5, 9, ..., 49, ... (4n+1); got {count}.")
    if options.draft_steps < 1:
        raise CommandError(f"--draft-steps must be at least 1; got {options.draft_steps}.")
    return int(sides[1]), int(sides[0]), count
