"""Table 2: drafts of stage I from prompts that training never saw, before and after stage II.

There is no truth: a judge of prompts looks for colour, shape and direction, and NIQE, fitted to drawn scenes, says how
natural the picture is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from ...atomic_files import sha256
from ...checkpoints import load_dit
from ...config import SPATIAL_FACTOR, STAGE1_LATENT_SCALE, TEMPORAL_FACTOR
from ...frames import to_frames, to_video
from ...samplers import sample_stage1
from ..loop.checkpointing import write_whole
from ..loop.metrics import save_picture
from ..randomness import generator_for
from ..scenes.prompts import judge_prompts
from .clips import FACTOR, TEST_SEED, held_out_clip
from .drafts import prompts
from .evaluation import FORMAT, Evaluator, Measured, Method, as_picture, enlarge
from .lab import STAGE1, STAGE2, Lab
from .measures import sharpness
from .orderings import claims
from .results import Row, TableResult

ENLARGED, REFINED = "draft, enlarged", "refined"
METRICS = ("colour", "shape", "direction", "all_right", "niqe", "sharpness", "seconds")


def table2(lab: Lab) -> TableResult:
    """Generated drafts before and after stage II."""
    settings = lab.settings.generated
    texts = prompts(settings.prompts)
    ways = {ENLARGED: Method("bicubic"), REFINED: lab.refiner()}
    measured: dict[str, dict[str, Measured]] = {label: {} for label in ways}
    for index, prompt in enumerate(texts):
        for label, result in _measured(lab, index, prompt, ways).items():
            measured[label][prompt] = result
    about = (
        f"Drafts of {settings.width}x{settings.height} by the shipped stage I, each enlarged {FACTOR} times by bicubic "
        "and by the shipped refiner. The judge of prompts looks for colour, shape and direction; NIQE is fitted to "
        "drawn scenes of the refined size. The paper: stage II raises the quality of the picture and keeps what the "
        "prompt asked for."
    )
    height, width = FACTOR * settings.height, FACTOR * settings.width
    facts = {
        "prompts": f"{len(texts)}, held out",
        "size": f"{width}x{height}, {settings.frames} frames",
        "drafts": f"{settings.steps} steps, guidance {settings.scale:g}",
        "strength": lab.said_strength(lab.suite_of(height, width, settings.frames)),
    }
    return TableResult(
        key="table2",
        title="Table 2: generated drafts, before and after stage II",
        about=about,
        procedural=texts,
        real=[],
        metrics=[*METRICS],
        rows=[Row.of(label, results) for label, results in measured.items()],
        claims=claims("table2", ways),
        shown=[*ways],
        facts={**lab.facts(STAGE1, **facts), STAGE2: lab.facts()[STAGE2]},
    )


def _measured(lab: Lab, index: int, prompt: str, ways: dict[str, Method]) -> dict[str, Measured]:
    """A prompt's draft by every way, from the disk if it was made before."""
    shipped, settings = lab.settings.shipped, lab.settings.generated
    evaluator = lab.evaluator
    files = [sha256(path, lambda *_: None) for path in (shipped.stage1, shipped.stage2, shipped.vae)]
    methods = [dataclasses.replace(method, weights=None) for method in ways.values()]
    parts = (FORMAT, files, settings, index, prompt, methods, evaluator.judges.names, evaluator.store.text.digest)
    stem = "generated-" + hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    folder: Path = lab.settings.out / "results"
    path = folder / f"{stem}.json"
    pictures = {label: folder / f"{stem}-{number}.png" for number, label in enumerate(ways)}
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        return {label: Measured(values[label], pictures[label]) for label in ways}
    lab.deadline.check()
    draft, context, seconds = _draft(lab, index, prompt)
    results = {}
    for label, method in ways.items():
        started = time.monotonic()
        frames = _finished(evaluator, method, draft, context, stem)
        frames = (frames * 255).round() / 255
        spent = seconds + time.monotonic() - started
        results[label] = {**_judged(evaluator, prompt, frames), "seconds": spent}
        save_picture(pictures[label], as_picture(frames[len(frames) // 2]))
    write_whole(path, lambda file: file.write(json.dumps(results).encode()))
    niqe = " to ".join(f"{results[label]['niqe']:.2f}" for label in ways)
    sys.stdout.write(f"  {prompt}: NIQE {niqe}\n")
    return {label: Measured(results[label], pictures[label]) for label in ways}


@torch.no_grad()
def _draft(lab: Lab, index: int, prompt: str) -> tuple[Tensor, Tensor, float]:
    """A draft's frames [T, h, w, 3] of 8 bits, the prompt's context, and the seconds that it took."""
    settings, evaluator = lab.settings.generated, lab.evaluator
    started = time.monotonic()
    dit = load_dit(lab.settings.shipped.stage1, device=lab.device, dtype=torch.float32, stage=1).eval()
    context = evaluator.store.text([prompt]).to(lab.device, torch.float32)
    frames = (settings.frames - 1) // TEMPORAL_FACTOR + 1
    shape = (1, dit.config.in_channels, frames, settings.height // SPATIAL_FACTOR, settings.width // SPATIAL_FACTOR)

    def noise(step: int) -> Tensor:
        return torch.randn(shape, generator=generator_for(TEST_SEED, "generated", index, step)).to(lab.device)

    latent = sample_stage1(
        dit, noise(-1), context, torch.zeros_like(context), steps=settings.steps, scale=settings.scale, step_noise=noise
    )
    video = to_frames(evaluator.store.vae.decode(latent / STAGE1_LATENT_SCALE))
    return (video * 255).round() / 255, context, time.monotonic() - started


def _finished(evaluator: Evaluator, method: Method, draft: Tensor, context: Tensor, name: str) -> Tensor:
    height, width = (FACTOR * side for side in draft.shape[1:3])
    if method.kind == "bicubic":
        return enlarge(draft, height, width, "bicubic")
    return evaluator.finished(method, held_out_clip(evaluator.store.vae, name, draft, context))


def _judged(evaluator: Evaluator, prompt: str, frames: Tensor) -> dict[str, float]:
    shown = judge_prompts([prompt], [to_video(frames)[0]])[0].shown
    right = {name: 100.0 * seen for name, seen in shown.items()}
    niqe = evaluator.judges(frames, tuple(frames.shape[:3]), real=False).get("niqe", math.nan)
    return {**right, "all_right": 100.0 * all(shown.values()), "niqe": niqe, "sharpness": sharpness(frames)}
