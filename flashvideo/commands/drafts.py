"""Drafts, stage I without ComfyUI: their options, their files, and the networks that make them."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from ..arguments import shown, width_and_height
from ..atomic_files import remove_abandoned, write_whole
from ..checkpoints import load_dit, load_vae
from ..config import PIXEL_MULTIPLE, STAGE1_LATENT_SCALE, TRAIN_STEPS, is_video_length, latent_shape
from ..devices import open_device
from ..dit import FlashVideoDiT
from ..errors import CommandError
from ..frames import MAX_SIDE, to_bytes, to_frames
from ..guidance import MAX_SCALE
from ..parallel import Ranks, agree
from ..parallel.sharding import shard_weights
from ..progress import PhaseProgress
from ..samplers import sample_stage1
from ..vae import VideoVAE
from .chosen import ModelOptions
from .loading import BUILT_IN, TextEncoder, dtypes, model_file, warn_of_pair
from .terminal import ProgressBars, say

RATE = Fraction(8)  # frames per second of the model's videos
OFFICIAL_DRAFT, NANO_DRAFT = ("480x256", 49), ("112x64", 17)  # size and frames
MAX_FRAMES = 1025  # of a draft; far beyond what the model was trained on
DRAFT_ENDING = ".draft.mkv"  # of the draft beside the result
MADE = "the draft"


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


def draft_path(target: Path) -> Path:
    """The file of a result's draft."""
    return target.parent / (target.name + DRAFT_ENDING)


def ensure_draft(options: DraftOptions, path: Path, *, anew: bool, ranks: Ranks | None = None) -> None:
    """Make the draft's file unless it exists; reports it. Raises CommandError for one with another prompt or other
    settings.
    """
    if not agree(ranks, lambda: anew or not has_draft(options, path)):
        say(f"{path}: the draft exists already")
        return
    with ProgressBars("step") as bars:
        if ranks is None or ranks.leads:
            write_draft(options, path, bars, ranks=ranks)
        else:
            make_draft(options, bars, ranks=ranks)
    if ranks is None or ranks.leads:
        say(f"{path}: {MADE}")


def write_draft(
    options: DraftOptions,
    path: Path,
    report: PhaseProgress,
    networks: DraftNetworks | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Make the draft's file, and remove what a killed run has left of it."""
    from ..video_files import write_lossless

    remove_abandoned(path)
    # Made within, so that a folder that can't be written to is noticed before the work.
    write_whole(
        path,
        lambda part: write_lossless(part, make_draft(options, report, networks, ranks), RATE, _about(options)),
    )


def has_draft(options: DraftOptions, path: Path) -> bool:
    """Whether the draft's file exists. Raises CommandError for one with another prompt or other settings."""
    from ..video_files import read_comment

    if path.is_file() and read_comment(path) != _about(options):
        message = f"{path} is the draft of other words or settings. Give OUT another name."
        raise CommandError(message, "--anew replaces it.")
    return path.is_file()


@dataclass(frozen=True)
class DraftNetworks:
    """What makes drafts, in main memory while it isn't used."""

    text: TextEncoder
    dit: FlashVideoDiT
    vae: VideoVAE


def load_draft_networks(options: DraftOptions) -> DraftNetworks:
    """The networks of several drafts. Raises CommandError and CheckpointError."""
    device = open_device(options.models.device)
    text = TextEncoder(options.models, device, keep=True)
    return DraftNetworks(text, _load_dit(options, device), _load_vae(options, device))


def _load_dit(options: DraftOptions, device: torch.device) -> FlashVideoDiT:
    """Stage I; warns where the VAE doesn't belong to it."""
    dit_dtype, _ = dtypes(options.models.dtype, device)
    dit = load_dit(model_file(options.model, "stage1"), dtype=dit_dtype, stage=1)
    warn_of_pair(options.model or "stage1", dit.config, options.models.vae or "vae")
    return dit


def _load_vae(options: DraftOptions, device: torch.device) -> VideoVAE:
    _, vae_dtype = dtypes(options.models.dtype, device)
    return load_vae(model_file(options.models.vae, "vae"), dtype=vae_dtype)


@torch.no_grad()
def make_draft(
    options: DraftOptions,
    report: PhaseProgress,
    networks: DraftNetworks | None = None,
    ranks: Ranks | None = None,
) -> Tensor | None:
    """Stage I: frames [T, H, W, 3] uint8. The noise is that of FlashVideo Stage I Sampler with the same seed.

    `networks` are loaded for this draft alone unless they are given. `ranks` evaluate the network together; the draft
    is small, and rank 0 decodes it alone: None on the others.
    """
    models = options.models
    device = open_device(models.device)
    dit_dtype, vae_dtype = dtypes(models.dtype, device)
    dit = networks.dit if networks else _load_dit(options, device)
    text_dim = dit.config.text_dim
    encode = networks.text if networks else TextEncoder(models, device)
    context = agree(ranks, lambda: encode(options.prompt, text_dim))
    context = context.to(device, dit_dtype)
    if models.shard_weights:
        shard_weights(dit, dit.blocks, device)
    dit = dit.eval().to(device)
    generator = torch.Generator("cpu").manual_seed(options.seed)
    shape = (1, dit.config.in_channels, *latent_shape(options.shape))

    def noise(_step: int = 0) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    report("draft", 0, options.steps)
    latent = sample_stage1(
        dit, noise(), context, torch.zeros_like(context),
        steps=options.steps, scale=options.cfg, step_noise=noise,
        on_step=lambda done, total, _: report("draft", done, total), ranks=ranks,
    )  # fmt: skip
    if networks:
        dit.to("cpu")
    del dit
    if ranks is not None and not ranks.leads:
        return None
    vae = (networks.vae if networks else _load_vae(options, device)).eval().to(device)
    frames = to_bytes(to_frames(vae.decode((latent / STAGE1_LATENT_SCALE).to(vae_dtype)).float().cpu()))
    vae.to("cpu")
    return frames


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
