"""The two-stage graph through ComfyUI's server beside the library alone: `python benchmarks/pipeline.py`.

Run with the Python that runs ComfyUI; COMFYUI_PATH (or FLASHVIDEO_COMFYUI) names its folder. FlashVideo-Nano drafts
and refines a clip; "cold" is the first run with loading, "warm" a run with another seed, server and library in turn.
On a CPU with one thread both are seconds of processor time, the server's read from the kernel (Linux); else wall time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import ROOT, SEED, add_options, is_single_thread, load_library, report, synchronize

sys.path.append(str(ROOT / "scripts"))
from harness.bed import Bed, stop_on_terminate
from harness.comfy_client import Failure
from harness.comfy_server import ComfyServer

load_library()

from flashvideo import degrade_latent, load_dit, load_vae, sample_stage1, sample_stage2  # noqa: E402
from flashvideo.config import (  # noqa: E402
    NANO_STAGE1,
    STAGE1_LATENT_SCALE,
    STAGE2_LATENT_SCALE,
    TEXT_TOKENS,
)
from flashvideo.frames import TargetSize, finish, prepare, to_frames, to_video  # noqa: E402
from flashvideo.nano import nano_state  # noqa: E402

WIDTH, HEIGHT, FRAMES, SCALE = 128, 96, 17, 2.0
STEPS1, STEPS2 = 10, 4
NANO = "FlashVideo-Nano"
SAME_WORK = ["--use-pytorch-cross-attention", "--force-fp32", "--fp32-vae"]  # as the library computes here


def main() -> None:
    """Run both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    stop_on_terminate()
    comfyui = os.environ.get("COMFYUI_PATH") or os.environ.get("FLASHVIDEO_COMFYUI")
    if not comfyui:
        raise SystemExit("Set COMFYUI_PATH to ComfyUI's folder.")
    bed = Bed(sys.executable, comfyui, "yours", True, "")
    if options.device not in ("cpu", "cuda"):
        raise SystemExit("--device takes cuda or cpu: ComfyUI picks any other by itself.")
    device_options = ["--cpu"] if options.device == "cpu" else []
    with (
        tempfile.TemporaryDirectory() as base,
        ComfyServer(bed, Path(base), device_options=device_options, options=SAME_WORK) as server,
    ):
        clock = _server_clock(server.pid) if is_single_thread(options.device) else time.perf_counter
        library = run_library(options.device)
        pairs = [(run_server(server, seed, clock), next(library)) for seed in range(options.rounds + 1)]
    through_server, alone = zip(*pairs, strict=True)
    rows = []
    for name, pick in (("cold", lambda runs: runs[0]), ("warm", lambda runs: statistics.median(runs[1:]))):
        server_seconds, library_seconds = pick(through_server), pick(alone)
        rows.append([name, server_seconds, library_seconds, server_seconds / library_seconds])
    facts = {"draft": f"{WIDTH}x{HEIGHT}x{FRAMES}, {STEPS1} steps", "refined": f"x{SCALE}, {STEPS2} steps"}
    columns = ["run", "server, s", "library, s", "server / library"]
    title = "Two stages through ComfyUI's server and without it"
    report(title, columns, rows, device=options.device, facts=facts, target=options.json)


def _server_clock(pid: int) -> Callable[[], float]:
    """Processor time of a process in seconds."""
    ticks = os.sysconf("SC_CLK_TCK")

    def clock() -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / ticks

    return clock


def run_server(server: ComfyServer, seed: int, clock: Callable[[], float]) -> float:
    """Seconds that a prompt takes."""
    with server.client() as client:
        start = clock()
        end = client.run(graph(seed))[-1]
        if isinstance(end, Failure):
            raise SystemExit(f"{end.node_type}: {end.message}")
        return clock() - start


def graph(seed: int) -> dict[str, Any]:
    """Text to a refined clip, on the built-in miniature."""
    text = {"positive": ["text", 0], "negative": ["text", 1]}
    nodes = {
        "model1": ("FlashVideoModelLoader", {"model_name": f"{NANO} Stage I (built-in)", "weight_dtype": "default"}),
        "model2": ("FlashVideoModelLoader", {"model_name": f"{NANO} Stage II (built-in)", "weight_dtype": "default"}),
        "clip": ("FlashVideoTextEncoderLoader", {"text_encoder_name": f"{NANO} (built-in)"}),
        "vae": ("FlashVideoVAELoader", {"vae_name": f"{NANO} (built-in)"}),
        "text": ("FlashVideoTextEncode", {"clip": ["clip", 0], "text": "a red kite", "motion": "none"}),
        "empty": (
            "EmptyFlashVideoLatent", {"width": WIDTH, "height": HEIGHT, "length": FRAMES, "batch_size": 1},
        ),
        "stage1": (
            "FlashVideoStage1Sampler",
            {"model": ["model1", 0], **text, "latent": ["empty", 0], "seed": seed, "steps": STEPS1, "cfg": 8.0,
             "dynamic_cfg": True},
        ),
        "draft": ("VAEDecode", {"samples": ["stage1", 0], "vae": ["vae", 0]}),
        "prepare": (
            "FlashVideoPrepareFrames",
            {"images": ["draft", 0], "size": "scale", "short_side": 1080, "scale": SCALE, "width": 64, "height": 64,
             "resample": "bilinear"},
        ),
        "encode": ("VAEEncode", {"pixels": ["prepare", 0], "vae": ["vae", 0]}),
        "degrade": ("FlashVideoLatentDegradation", {"latent": ["encode", 0], "strength": 675, "seed": seed}),
        "stage2": (
            "FlashVideoStage2Refiner",
            {"model": ["model2", 0], **text, "latent": ["degrade", 0], "steps": STEPS2, "cfg": 13.0, "shift": 2.5,
             "solver": "euler"},
        ),
        "decode": ("VAEDecode", {"samples": ["stage2", 0], "vae": ["vae", 0]}),
        "finish": (
            "FlashVideoFinishFrames",
            {"images": ["decode", 0], "reference": ["prepare", 1], "color_match": "none"},
        ),
        "out": ("PreviewAny", {"source": ["finish", 0]}),
    }  # fmt: skip
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


@torch.inference_mode()
def run_library(device: str) -> Iterator[float]:
    """Seconds of each run; the first one loads the models. The text's vectors are random: warm runs keep them."""
    clock = time.process_time if is_single_thread(device) else time.perf_counter
    start = clock()
    dits = [load_dit(nano_state(part), device=device, dtype=torch.float32) for part in ("stage1", "stage2")]
    vae = load_vae(nano_state("vae"), device=device, dtype=torch.float32)
    generator = torch.Generator().manual_seed(SEED)

    def normal(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    text, no_text = (normal((1, TEXT_TOKENS, NANO_STAGE1.text_dim)) for _ in "pn")
    shape = (1, 16, (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
    while True:
        draft = sample_stage1(dits[0], normal(shape), text, no_text, steps=STEPS1, step_noise=lambda _: normal(shape))
        images = to_frames(vae.decode(draft / STAGE1_LATENT_SCALE))
        prepared = prepare(images, TargetSize("scale", scale=SCALE), "bilinear")
        latent = vae.encode(to_video(prepared.frames)).mode() * STAGE2_LATENT_SCALE
        refined = sample_stage2(
            dits[1], degrade_latent(latent, normal(tuple(latent.shape))), text, no_text, steps=STEPS2
        )
        finish(to_frames(vae.decode(refined / STAGE2_LATENT_SCALE)), prepared.reference)
        synchronize(device)
        yield clock() - start
        start = clock()


if __name__ == "__main__":
    main()
