"""Table 4: stage I tuned for another resolution, through adapters or in all its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ...atomic_files import sha256
from ...frames import to_frames
from ..loop.checkpointing import write_whole
from ..loop.metrics import save_picture
from ..scenes.captions import parse_prompt
from ..scenes.prompts import HELD_OUT_PROMPTS, judge_prompts
from ..scenes.stream import SceneStream
from ..tasks.networks import FrozenText
from ..tasks.stage1 import Stage1Task
from .clips import TEST_SEED, TEST_SPLIT
from .evaluation import as_picture
from .lab import STAGE1, Lab
from .measures import mean_of
from .orderings import claims
from .results import Row, TableResult

BATCH = 8  # prompts that are sampled together
PICTURES = 4  # prompts whose drafts are shown
BEFORE, FULL = "before", "all weights"


def table4(lab: Lab) -> TableResult:
    """LoRA and full fine-tuning of stage I for a smaller picture."""
    tuning = lab.settings.draft_tuning
    adapters = f"LoRA, rank {tuning.lora_rank}"
    ways = {
        BEFORE: lab.settings.shipped.stage1,
        FULL: lab.tuned_draft("drafts-full", 0),
        adapters: lab.tuned_draft("drafts-lora", tuning.lora_rank),
    }
    rows = [_row(lab, label, weights) for label, weights in ways.items()]
    names = [*rows[0].clips]
    loop, clips = tuning.loop, tuning.clips
    about = (
        "The shipped stage I, tuned for a smaller picture than it was trained for: all weights, or adapters beside "
        "them. A judge looks for colour, shape and direction in drafts of held-out prompts; how much of v is explained "
        "is measured on held-out clips. The paper: adapters keep what the model knew better than full fine-tuning."
    )
    facts = {
        "prompts": f"{len(names)}, held out",
        "size": f"{clips.width}x{clips.height}, {clips.frames} frames",
        "tuning": f"{loop.steps} steps of {tuning.batch} clips; rate {loop.learning_rate:g}, "
        f"{tuning.lora_learning_rate:g} of adapters",
    }
    return TableResult(
        key="table4",
        title="Table 4: LoRA and full fine-tuning",
        about=about,
        procedural=names,
        real=[],
        metrics=["colour", "shape", "direction", "all_right", "explained", "seconds"],
        rows=rows,
        claims=claims("table4", ways),
        shown=[row.label for row in rows],
        facts=lab.facts(STAGE1, **facts),
    )


def prompts(count: int) -> list[str]:
    """Prompts that training never saw: the fixed ten, then captions of held-out scenes."""
    stream = SceneStream(TEST_SPLIT, 16, 16, 1, TEST_SEED)
    captions = (stream.caption(index) for index in range(4 * count))
    return [*HELD_OUT_PROMPTS, *(text for text in captions if parse_prompt(text))][:count]


def _row(lab: Lab, label: str, weights: Path) -> Row:
    folder = lab.settings.out / "results"
    tuning = lab.settings.draft_tuning
    shipped = [sha256(path, lambda *_: None) for path in (weights, lab.settings.shipped.vae)]
    parts = shipped, tuning.clips, tuning.prompts, tuning.steps, tuning.scale
    stem = "drafts-" + hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    path = folder / f"{stem}.json"
    if path.is_file():
        return dataclasses.replace(Row(**json.loads(path.read_text(encoding="utf-8"))), label=label)
    lab.deadline.check()
    started = time.monotonic()
    row = _judged(lab, label, weights, folder / stem)
    write_whole(path, lambda file: file.write(json.dumps(dataclasses.asdict(row)).encode()))
    score = mean_of([*row.clips.values()])
    sys.stdout.write(f"  {label}: {score['all_right']:.0f} % of prompts followed; {time.monotonic() - started:.1f} s\n")
    return row


@torch.no_grad()
def _judged(lab: Lab, label: str, weights: Path, stem: Path) -> Row:
    settings = lab.draft_settings(weights)
    task = Stage1Task(settings, lab.device)
    task.model.eval()
    explained = task.validate()["explained"] * 100
    text = FrozenText(settings.text, settings.tokenizer, lab.device)
    clips: dict[str, dict[str, float]] = {}
    pictures = {}
    texts = prompts(lab.settings.draft_tuning.prompts)
    for index, (prompt, video, seconds) in enumerate(_drafts(task, text, texts)):
        shown = judge_prompts([prompt], [video])[0].shown
        values = {name: 100.0 * right for name, right in shown.items()}
        clips[prompt] = {
            **values, "all_right": 100.0 * all(shown.values()), "explained": explained, "seconds": seconds,
        }  # fmt: skip
        if index < PICTURES:
            picture = stem.with_name(f"{stem.name}-{index}.png")
            save_picture(picture, as_picture(to_frames(video[None])[video.shape[1] // 2]))
            pictures[prompt] = str(picture)
    return Row(label, clips, pictures)


def _drafts(task: Stage1Task, text: FrozenText, texts: list[str]) -> Iterator[tuple[str, Tensor, float]]:
    """Each prompt with its draft [3, T, H, W], and how long it took."""
    for first in range(0, len(texts), BATCH):
        part = texts[first : first + BATCH]
        started = time.monotonic()
        videos = task.draft(text(part).to(task.device)).cpu()
        seconds = (time.monotonic() - started) / len(part)
        yield from ((prompt, video, seconds) for prompt, video in zip(part, videos, strict=True))
