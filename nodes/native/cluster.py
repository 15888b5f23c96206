"""A long video on the workers of a Ray cluster, which have no ComfyUI: what a graph holds, as a job for the library.

A process of its own talks to Ray. Here are its start, its progress and its end.
"""

from __future__ import annotations

import json
import queue
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor

from ...flashvideo.arguments import shown
from ...flashvideo.commands.handed_over import DONE, NOTE, PROBLEM, PROGRESS, HandedOver
from ...flashvideo.parallel.farm import AUTO, FarmOptions, check_farm
from ...flashvideo.progress import PhaseProgress
from ...flashvideo.refiner.files import file_identity
from ...flashvideo.refiner.run import DECODE, RefineSettings
from .fingerprint import patches_fingerprint
from .loaded_from import file_of
from .long_video import Result, long_files, report_progress
from .model import guarded
from .multidiffusion import tile_of, with_tiles
from .vae import FlashVideoVAE

LOCAL = "local"
FOOTAGE = "footage_"  # begins the names of built-in networks for real footage
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_END = 60.0  # of a cancelled job: its workers finish their step
_ADDRESS = re.compile(r"[^\s:/]+:[0-9]{1,5}")
_PACK = Path(__file__).resolve().parents[2]
# Not by `-m`: the Python of ComfyUI's portable build looks for no modules in the current folder.
_START = "import sys; sys.path.insert(0, sys.argv[1]); from flashvideo.commands import handed_over as job; job.main()"
COMMAND = (sys.executable, "-c", _START, str(_PACK))
_LAST_WORDS = 5  # lines of an error that nobody expected


def checked_cluster(text: str) -> str | None:
    """The address for `FarmOptions`; None for a cluster that begins and ends with the run.

    Raises ValueError for another text, and CommandError without Ray, and for a cluster that doesn't answer.
    """
    text = text.strip()
    if text not in (AUTO, LOCAL) and not _ADDRESS.fullmatch(text):
        raise ValueError(
            f"cluster takes the address of a Ray cluster's head, such as 10.0.0.1:6379, {AUTO} for the one that this "
            f"machine belongs to, or {LOCAL} for all cards of this machine; got {shown(text)}"
        )
    address = None if text == LOCAL else text
    check_farm(FarmOptions(address, None, cards=True))
    return address


def carried(
    model: comfy.model_patcher.ModelPatcher, vae: FlashVideoVAE, positive: list, negative: list
) -> dict[str, Any]:
    """What workers need to have the same networks and the same prompt, as fields of `HandedOver` and of its settings.

    Raises ValueError for what can't be carried to them.
    """
    network = file_of(model.model)
    encoder = file_of(vae.first_stage_model)
    if network is None or encoder is None:
        which = "model" if network is None else "vae"
        raise ValueError(
            f"with cluster, {which} must come from Load FlashVideo {'Model' if network is None else 'VAE'}: the "
            "workers load its file"
        )
    if not network.as_it_is:
        raise ValueError("with cluster, weight_dtype of Load FlashVideo Model must be default: workers load the file")
    tile = tile_of(model)
    if patches_fingerprint(model) != patches_fingerprint(_unpatched(model, tile)):
        raise ValueError(
            "with cluster, nothing but FlashVideo Spatial Tiles may be patched into model: the workers load its file, "
            "without a LoRA or another node behind the loader. ModelSave saves a model with its LoRAs: load that file"
        )
    built_in = [each.source for each in (network, encoder) if isinstance(each.source, str)]
    if len({name.startswith(FOOTAGE) for name in built_in}) > 1:
        raise ValueError("model and vae don't go together: one is for real footage, the other for drawn scenes")
    return {
        "model": None if isinstance(network.source, str) else network.source,
        "vae": None if isinstance(encoder.source, str) else encoder.source,
        "footage": any(name.startswith(FOOTAGE) for name in built_in),
        "vae_memory": vae.first_stage_model.budget,
        "context": _context(positive, negative),
        "tile": tile,
    }


def _unpatched(model: comfy.model_patcher.ModelPatcher, tile: int) -> comfy.model_patcher.ModelPatcher:
    """The MODEL as its loader gives it, or as Spatial Tiles does."""
    plain = guarded(comfy.model_patcher.ModelPatcher(model.model, model.load_device, model.offload_device))
    return with_tiles(plain, tile) if tile else plain


def _context(positive: list, negative: list) -> Tensor:
    extras = {name for conditioning in (positive, negative) for _, more in conditioning for name in more}
    if len(positive) != 1 or len(negative) != 1 or extras - {"pooled_output"}:
        raise ValueError(
            "with cluster, positive and negative must come straight from FlashVideo Prompt: areas, masks, hooks and "
            "combined prompts stay in ComfyUI"
        )
    context, nothing = positive[0][0], negative[0][0]
    if nothing.shape != context.shape or torch.count_nonzero(nothing):
        raise ValueError("with cluster, negative must be FlashVideo Prompt's second output, the empty prompt")
    return context.float()


def refine_on_cluster(
    address: str | None,
    carry: dict[str, Any],
    video: Any,
    settings: RefineSettings,
    *,
    result: Result,
    warn: Callable[[str], None],
    note: Callable[[str], None],
) -> Path:
    """The same as `refine_long_video`, by the workers of a cluster; `carry`: see `carried`."""
    settings = replace(settings, tile=carry["tile"])
    networks = {name: carry[name] and file_identity(carry[name]) for name in ("model", "vae")}
    with long_files(video, result, settings, carry | networks, warn) as (source, target, _):
        if not target.is_file():
            fields = {name: value for name, value in carry.items() if name != "tile"}
            files = {"source": source.resolve(), "target": target.resolve(), "work": result.unfinished.resolve()}
            written = {"codec": result.codec, "bits": result.bits}
            hand_over(HandedOver(address, **files, **fields, settings=settings, **written), report_progress(), note)
    return target


def hand_over(job: HandedOver, report: PhaseProgress, note: Callable[[str], None]) -> None:
    """Let a cluster make the job's target. Raises ValueError where it can't, and ComfyUI's exception for Cancel."""
    comfy.model_management.unload_all_models()  # a worker may take this machine's card
    comfy.model_management.soft_empty_cache()
    process = subprocess.Popen(
        COMMAND, cwd=_PACK, text=True, encoding="utf-8",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,  # a Ctrl+C in the terminal is ComfyUI's; what it started ends with its input
    )  # fmt: skip
    last: deque[str] = deque(maxlen=_LAST_WORDS)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for read in (lambda: last.extend(process.stderr), lambda: _forward(process.stdout, lines)):
        threading.Thread(target=read, daemon=True).start()
    try:
        with suppress(BrokenPipeError):
            process.stdin.write(job.written() + "\n")
            process.stdin.flush()
        problem = _follow(lines, report, note)
        if problem is None:
            report(DECODE, 1, 1)
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)  # the cluster is left, or ends
    finally:
        _end(process)
    if problem is not None:
        raise ValueError(problem or f"the process that talks to Ray has ended: {''.join(last).strip()}")


def _follow(lines: queue.SimpleQueue[str | None], report: PhaseProgress, note: Callable[[str], None]) -> str | None:
    """Pass on what a job writes, until its end; returns why it failed, an empty text if it didn't say, else None."""
    while True:
        comfy.model_management.throw_exception_if_processing_interrupted()
        try:
            line = lines.get(timeout=SECONDS_BETWEEN_LOOKS)
        except queue.Empty:
            continue
        if line is None:
            return ""
        try:
            ((kind, value),) = json.loads(line).items()
        except (ValueError, AttributeError):  # another line of the command's
            continue
        if kind == PROGRESS:
            report(*value)
        elif kind == NOTE:
            note(value)
        elif kind == PROBLEM:
            return value
        elif kind == DONE:
            return None


def _forward(source: TextIO, lines: queue.SimpleQueue[str | None]) -> None:
    for line in source:
        lines.put(line)
    lines.put(None)


def _end(process: subprocess.Popen) -> None:
    """Cancel the job, if it still runs, and wait for its end."""
    with suppress(OSError):
        process.stdin.close()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
