"""Ten prompts about things that FlashVideo-Nano never saw together, drafted through ComfyUI and judged by rule."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .bed import ROOT
from .comfy_server import ComfyServer
from .contact_sheet import Row, contact_sheet, read_frames
from .workflow_runs import api_prompt, run_prompt

DRAFT = "flashvideo/draft"  # prefix under which the workflow saves its draft
PROMPT_NODE, SAMPLER_NODE = "FlashVideoTextEncode", "FlashVideoStage1Sampler"
STEPS = 16  # a third of the official ones: as many prompts are followed, in a third of the time
ENOUGH = 8  # of ten


def draft_prompts(server: ComfyServer, workflow: Path, folder: Path, say: Callable[[str], None]) -> int:
    """Draft all prompts with a workflow's first stage; returns how many follow theirs.

    Writes the drafts and a sheet of them with the verdicts to `folder`.
    """
    sys.path.append(str(ROOT))  # last, so that nothing of the pack hides another module
    from flashvideo.training.scenes.prompts import HELD_OUT_PROMPTS, judge_prompts

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    drafts, prompt = [], api_prompt(server, workflow)
    for number, text in enumerate(HELD_OUT_PROMPTS, start=1):
        _draft(prompt, text)
        run = run_prompt(server, prompt, lambda _line: None)
        drafts.append(Path(shutil.copy2(run.files[DRAFT][0], folder / f"{number:02d}.mp4")))
        say(f"  drafted: {text}")
    verdicts = judge_prompts(HELD_OUT_PROMPTS, [_tensor(path) for path in drafts])
    rows = [Row(str(verdict), path) for verdict, path in zip(verdicts, drafts, strict=True)]
    followed = sum(verdict.follows for verdict in verdicts)
    summary = f"{followed} of {len(verdicts)} drafts show the colour, shape and direction that their prompt asks for"
    contact_sheet(rows, folder / "contact-sheet.png", [summary])
    for verdict in verdicts:
        say(f"  {verdict}")
    say(f"  {summary}.")
    return followed


def _draft(prompt: dict[str, Any], text: str) -> None:
    """Let an API-format workflow draft this text and nothing more."""
    ends = [key for key, node in prompt.items() if node["inputs"].get("filename_prefix") == DRAFT]
    needed, waiting = set(), list(ends)
    while waiting:
        key = waiting.pop()
        needed.add(key)
        links = [value for value in prompt[key]["inputs"].values() if isinstance(value, list)]
        waiting += [str(link[0]) for link in links if str(link[0]) not in needed]
    for key in set(prompt) - needed:
        del prompt[key]
    for node in prompt.values():
        if node["class_type"] == PROMPT_NODE:
            node["inputs"]["text"] = text
        elif node["class_type"] == SAMPLER_NODE:
            node["inputs"]["steps"] = STEPS


def _tensor(video: Path) -> Any:
    """A video file as the judge takes it: [3, T, H, W] in [-1, 1]."""
    import numpy as np
    import torch

    frames = np.stack([np.asarray(frame) for frame in read_frames(video)])
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1
