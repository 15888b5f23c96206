"""Trainings that tests run on several ranks and in one process, with the same code: `ranks` is None there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from small_recipes import CLIPS, CROPS, SMALL_VAE, VALIDATION, head

from flashvideo.parallel import Ranks
from flashvideo.parallel.counting import GRADIENTS
from flashvideo.training.command import _settings, _task
from flashvideo.training.data import latents
from flashvideo.training.loop.optimise import trainable
from flashvideo.training.loop.trainer import Limits, Trainer

STEPS = 2
# Of AdamW: its usual one lets weights that change nothing, such as biases before a norm, walk as rounding pushes them.
DAMPING = 1e-4


def _loop(**more: str | int) -> str:
    values = {"steps": STEPS, "learning_rate": 1e-4, "warmup": 1, "log_every": 1, "validate_every": STEPS, **more}
    return "[loop]\nbf16_cpu = false\n" + "".join(f"{name} = {value!r}\n" for name, value in values.items())


MIXED_SIZES = "[[crops]]\nrender = [16, 24]\nsize = [8, 16]\nframes = 1\nclips = 1\ncrops = 5\n"
TWO_FILES = CLIPS.replace("clips = 2", "clips = 3", 1)  # of latents
# Batches that neither two nor three ranks divide, alone or with the others of a step.
RECIPES = {
    "text": f"batch = 5\nvocabulary_captions = 300\nvalidation_captions = 4\n{_loop(optimiser='muon')}",
    "vae": (
        f"{SMALL_VAE}{_loop(accumulate=4)}[loss]\ntexture = 0.1\n{CROPS}{MIXED_SIZES}"
        f"{VALIDATION.replace('clips = 2', 'clips = 1')}"
    ),
    "stage1": (f"batch = 5\nlayout_weight = 0.5\n[clips]\n{TWO_FILES}{_loop()}[sheet]\ncount = 1\nsteps = 2\n"),
    "stage2": (
        f"{_loop(accumulate=5)}[network]\nweights = 'MODELS/stage2.safetensors'\nlora_rank = 4\n"
        "[pixels]\nweight = 0.5\nwindow = 2\nedge = 0\n"
        "[degradation]\nlatent_steps = [100, 900]\n[sheet]\nclips = 1\nsteps = 1\n"
        f"[[phases]]\nuntil = {STEPS}\nbatch = 1\nlengths = [1, 2]\n[phases.clips]\n{CLIPS}"
    ),
}


def write_config(kind: str, models: Path, run: Path) -> None:
    """Write a recipe into the folder of its run and its latents."""
    files = {} if kind == "vae" else {"tokenizer": models / "tokenizer.json"}
    if kind.startswith("stage"):
        files |= {"cache": run / "latents", "vae": models / "vae.safetensors"}
        files["text"] = models / "text_encoder.safetensors"
    run.mkdir(exist_ok=True)
    recipe = RECIPES[kind].replace("MODELS", models.as_posix())
    (run / f"{kind}.toml").write_text(head(run / kind, **files) + recipe)


def trained(
    ranks: Ranks | None, run: Path, kinds: Sequence[str], steps: int = STEPS, *, resume: bool = False
) -> dict[str, dict[str, Any]]:
    """Train each kind: the weights that learn, and the bytes of gradients that this rank has received in a step."""
    torch.set_num_threads(1)  # as ranks do: several threads round otherwise
    found = {}
    for kind in kinds:
        settings = _settings(kind, run / f"{kind}.toml", None)
        with patch.object(latents, "SHARD", 2):
            trainer = Trainer(_task(kind, settings, "cpu", ranks), settings.loop, settings.out, ranks)
            for group in trainer.optimiser.param_groups:
                group["eps"] = DAMPING
            before = ranks.traffic.received[GRADIENTS] if ranks else 0
            trainer.train(Limits(steps), resume=resume)
        received = ranks.traffic.received[GRADIENTS] - before if ranks else 0
        weights = {name: weight.detach().clone() for name, weight in trainable(trainer.task.model).items()}
        found[kind] = {"weights": weights, "received": received / steps}
    return found


def take_turns(ranks: Ranks, run: Path, whole: Sequence[str], begun: str, to_begin: str) -> dict[str, dict[str, Any]]:
    """Train some kinds; end one that another process has begun; and begin one."""
    ended = trained(ranks, run, (begun,), STEPS - 1, resume=True)
    return trained(ranks, run, whole) | ended | trained(ranks, run, (to_begin,), 1)
