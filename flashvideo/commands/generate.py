"""`python -m flashvideo generate WORDS OUT`: a video from words without ComfyUI, draft and refined."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from ..arguments import real, shown, whole, width_and_height
from ..atomic_files import write_whole
from ..checkpoints import load_dit, load_vae
from ..color import DETAIL_SIZE
from ..config import PIXEL_MULTIPLE, STAGE1_LATENT_SCALE, is_video_length, latent_shape
from ..devices import open_device
from ..errors import CommandError
from ..frames import MAX_SIDE, TargetSize, to_bytes, to_frames
from ..guidance import MAX_SCALE, STAGE1_SCALE
from ..parallel import Ranks, agree
from ..parallel.sharding import shard_weights
from ..samplers import sample_stage1
from ..schedule import TRAIN_STEPS
from .loading import BUILT_IN, dtypes, encode_prompt, model_file
from .options import ModelOptions, add_file_options, add_model_options, add_refiner_options, add_size_options
from .refine import refine, refine_options
from .terminal import ProgressBars, say

RATE = Fraction(8)  # frames per second of the model's videos
OFFICIAL_DRAFT, NANO_DRAFT = ("480x256", 49), ("112x64", 17)  # size and frames
MAX_FRAMES = 1025  # of a draft; far beyond what the model was trained on
NANO_SCALE = 4.0  # from its draft to its refined video
DRAFT_ENDING = ".draft.mkv"  # of the draft beside the result


def add_generate(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "generate",
        help="make a video from words",
        description="Make a video from words: a draft (stage I), stored without loss beside OUT, which is then refined "
        "(stage II). If the draft exists already, it is only refined; an interrupted run resumes.",
    )
    parser.add_argument("prompt", metavar="WORDS", help="what the video shows")
    parser.add_argument("target", metavar="OUT", type=Path, help="the file to write (.mp4, .mov, .mkv)")
    group = parser.add_argument_group("draft")
    group.add_argument("--draft-size", metavar="WxH", help="multiples of 16 (default: 480x256; Nano: 112x64)")
    group.add_argument("--frames", type=whole, metavar="N", help="4n+1 (default: 49; Nano: 17)")
    group.add_argument("--draft-steps", type=whole, default=50, metavar="N", help="useful: 30 to 50 (default: 50)")
    group.add_argument("--draft-cfg", type=real, default=STAGE1_SCALE, metavar="F", help="useful: 6 to 8 (default: 8)")
    group.add_argument("--draft-only", action="store_true", help="make the draft only")
    add_size_options(parser.add_argument_group("size of the result (default: --short-side 1080; Nano: --scale 4)"))
    add_refiner_options(parser.add_argument_group("refiner"))
    models = parser.add_argument_group("models")
    models.add_argument("--draft-model", metavar="FILE", type=Path, help="stage I (default: the built-in Nano)")
    add_model_options(models)
    add_file_options(parser.add_argument_group("files"))
    parser.set_defaults(run=_generate, ranks=None)  # `ranks`: see `refine`


@dataclass(frozen=True)
class DraftOptions:
    """The options of the draft: `shape` is (frames, height, width), `model` stage I's file, None for Nano's."""

    prompt: str
    shape: tuple[int, int, int]
    steps: int
    cfg: float
    seed: int
    model: Path | None
    models: ModelOptions


def draft_options(options: argparse.Namespace, models: ModelOptions) -> DraftOptions:
    """The options of the draft. Raises CommandError for invalid ones."""
    if (options.draft_model is None) != (models.model is None):
        raise CommandError("--draft-model and --model go together: Nano and the official models don't share drafts.")
    if not 2 <= options.draft_steps <= TRAIN_STEPS:
        raise CommandError(f"--draft-steps must be at least 2 and at most {TRAIN_STEPS}; got {options.draft_steps}.")
    if not 0 <= options.draft_cfg <= MAX_SCALE:
        raise CommandError(f"--draft-cfg must be 0 to {MAX_SCALE:g}; got {options.draft_cfg:g}.")
    if options.draft_model is not None:
        model_file(options.draft_model, "")
    return DraftOptions(
        prompt=options.prompt,
        shape=_shape(options.draft_size, options.frames, NANO_DRAFT if models.model is None else OFFICIAL_DRAFT),
        steps=options.draft_steps,
        cfg=options.draft_cfg,
        seed=options.seed,
        model=options.draft_model,
        models=models,
    )


def _shape(size: str | None, count: int | None, default: tuple[str, int]) -> tuple[int, int, int]:
    """(frames, height, width) of the draft."""
    size, count = default[0] if size is None else size, default[1] if count is None else count
    sides = width_and_height(size)
    if sides is None or not all(0 < side <= MAX_SIDE and side % PIXEL_MULTIPLE == 0 for side in sides):
        raise CommandError(
            f"--draft-size takes a width and a height in multiples of 16, such as 480x256, up to {MAX_SIDE}; "
            f"got {shown(size)}."
        )
    if not is_video_length(count) or count > MAX_FRAMES:
        raise CommandError(f"--frames must be 1, 5, 9, ..., 49, ... (4n+1), up to {MAX_FRAMES}; got {count}.")
    return count, sides[1], sides[0]


def _generate(options: argparse.Namespace) -> int:
    # Imported here, so that the other commands don't need PyAV.
    try:
        from ..refiner.files import check_target
        from ..video_files import CONTAINERS
    except ModuleNotFoundError as error:
        raise CommandError(f"Video files need the package {error.name}: use ComfyUI's Python.") from error
    path = options.target.parent / (options.target.name + DRAFT_ENDING)
    size = TargetSize("scale", scale=NANO_SCALE) if options.model is None else TargetSize()
    refining = refine_options(options, path, size)
    if refining.settings.detail_size is None:  # stage II is trained to mend stage I's drafts, the miniature's, too
        refining = replace(refining, settings=replace(refining.settings, detail_size=DETAIL_SIZE))
    draft = draft_options(options, refining.models)
    if options.target.suffix.lower() not in CONTAINERS:
        raise CommandError(f"{options.target.name} should end in {', '.join(CONTAINERS)}.")
    agree(options.ranks, lambda: check_target(options.target, force=options.force))
    _ensure_draft(draft, path, anew=options.anew, ranks=options.ranks)
    return 0 if options.draft_only else refine(refining)


def _ensure_draft(options: DraftOptions, path: Path, *, anew: bool, ranks: Ranks | None = None) -> None:
    """Make the draft's file unless it exists. Raises CommandError for one with another prompt or other settings."""
    from ..video_files import write_lossless

    about = _about(options)
    if not agree(ranks, lambda: anew or not _has_draft(path, about)):
        say(f"{path}: the draft exists already")
    elif ranks is None or ranks.leads:
        # Made within, so that a folder that can't be written to is noticed before the work.
        write_whole(path, lambda part: write_lossless(part, make_draft(options, ranks), RATE, about))
        say(f"{path}: the draft")
    else:
        make_draft(options, ranks)


def _has_draft(path: Path, about: str) -> bool:
    from ..video_files import read_comment

    if path.is_file() and read_comment(path) != about:
        message = f"{path} is the draft of other words or settings. Give OUT another name."
        raise CommandError(message, "--anew replaces it.")
    return path.is_file()


@torch.no_grad()
def make_draft(options: DraftOptions, ranks: Ranks | None = None) -> Tensor | None:
    """Stage I: frames [T, H, W, 3] uint8. The noise is that of FlashVideo Stage I Sampler with the same seed.

    `ranks` evaluate the network together; the draft is small, and rank 0 decodes it alone: None on the others.
    """
    models = options.models
    device = open_device(models.device)
    dit_dtype, vae_dtype = dtypes(models.dtype, device)
    dit = load_dit(model_file(options.model, "stage1"), dtype=dit_dtype, stage=1)
    text_dim = dit.config.text_dim
    context = agree(ranks, lambda: encode_prompt(options.prompt, models, text_dim, device).cpu())
    context = context.to(device, dit_dtype)
    if models.shard_weights:
        shard_weights(dit, dit.blocks, device)
    dit = dit.eval().to(device)
    generator = torch.Generator("cpu").manual_seed(options.seed)
    shape = (1, dit.config.in_channels, *latent_shape(options.shape))

    def noise(_step: int = 0) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    with ProgressBars("step") as bars:
        bars("draft", 0, options.steps)
        latent = sample_stage1(
            dit, noise(), context, torch.zeros_like(context),
            steps=options.steps, scale=options.cfg, step_noise=noise,
            on_step=lambda done, total, _: bars("draft", done, total), ranks=ranks,
        )  # fmt: skip
    del dit
    if ranks is not None and not ranks.leads:
        return None
    vae = load_vae(model_file(models.vae, "vae"), dtype=vae_dtype).eval().to(device)
    return to_bytes(to_frames(vae.decode((latent / STAGE1_LATENT_SCALE).to(vae_dtype)).float().cpu()))


def _about(options: DraftOptions) -> str:
    """What the draft depends on; stored in its file. Another text for the same draft would refuse existing drafts."""
    from ..refiner.files import file_identity

    models = options.models
    paths = {"draft_model": options.model, "vae": models.vae, "text_encoder": models.text_encoder}
    files = {name: file_identity(path) if path else BUILT_IN for name, path in paths.items()}
    choices = {"prompt": options.prompt, "draft_steps": options.steps, "draft_cfg": options.cfg}
    choices |= {"seed": options.seed, "dtype": models.dtype}
    frames, height, width = options.shape
    return json.dumps({**choices, "shape": (height, width, frames), **files})
