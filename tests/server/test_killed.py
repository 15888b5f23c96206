"""ComfyUI dies in the middle of a long refine: started again and queued again, it goes on, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from harness.bed import Bed
from harness.comfy_client import ComfyClient, Progress, Success, saved_files
from harness.comfy_server import ComfyServer

REFINER = "6"
ENCODING, KILL_AT = (0.025, 0.195), 0.55  # of the bar: while the clip is encoded; the middle of stage II


def prompt() -> dict[str, Any]:
    """Load a clip, refine it with Refine Long Video on Nano, save it; as ComfyUI's API takes it."""
    stage2, others = "FlashVideo-Nano Stage II (built-in)", "FlashVideo-Nano (built-in)"
    nodes = {
        "1": ("FlashVideoModelLoader", {"model_name": stage2, "weight_dtype": "default"}),
        "2": ("FlashVideoTextEncoderLoader", {"text_encoder_name": others}),
        "3": ("FlashVideoVAELoader", {"vae_name": others, "memory_budget": "auto"}),
        "4": ("FlashVideoTextEncode", {"clip": ["2", 0], "text": "a red square", "motion": "medium"}),
        "5": ("LoadVideo", {"file": "clip.mp4"}),
        REFINER: (
            "FlashVideoRefineLongVideo",
            {
                "model": ["1", 0], "vae": ["3", 0], "positive": ["4", 0], "negative": ["4", 1], "video": ["5", 0],
                "size": "keep", "short_side": 1080, "scale": 4.0, "width": 48, "height": 32, "resample": "bilinear",
                "strength": 450, "steps": 4, "cfg": 4.0, "shift": 2.5, "seed": 5, "window": 17, "overlap": 8,
                "color_match": "wavelet",
            },
        ),
        "7": ("SaveVideo", {"video": [REFINER, 0], "filename_prefix": "long", "format": "auto", "codec": "auto"}),
    }  # fmt: skip
    return {number: {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in nodes.items()}


def write_clip(path: Path) -> None:
    """40 frames of 48x32: a square that moves to the right."""
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=12)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        for i in range(40):
            picture = np.full((32, 48, 3), (60, 110, 60), np.uint8)
            picture[8:24, 2 + i // 2 : 18 + i // 2] = (220, 60, 40)
            file.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(video.encode())


def frames_of(path: Path) -> np.ndarray:
    """All frames of a video."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def finish(server: ComfyServer) -> tuple[np.ndarray, list[float]]:
    """Queue the prompt to its end: the saved frames, and where the refiner's bar was."""
    with server.client() as client:
        queued = client.queue(prompt())
        bar = []
        for event in client.events(queued):
            if isinstance(event, Progress) and event.node == REFINER:
                bar.append(event.value / event.maximum)
        assert isinstance(event, Success), event
        outputs = client.history(queued)["outputs"]
    return frames_of(saved_files(outputs["7"], server.output)[0]), bar


def kill_within(server: ComfyServer, client: ComfyClient) -> None:
    """Queue the prompt, and end ComfyUI the hard way in the middle of the refiner's work."""
    for event in client.events(client.queue(prompt())):
        if isinstance(event, Progress) and event.node == REFINER and event.value / event.maximum >= KILL_AT:
            os.kill(server.pid, signal.SIGKILL)
            return
        assert not isinstance(event, Success), "it was over too soon"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_comfyui_killed_in_a_long_refine_goes_on_where_it_was(
    bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last bits of sums depend on the number of threads, and PyTorch takes as many as a process may use when it
    # starts: on a machine that is shared that needn't be the same for all three servers.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    clip = tmp_path / "clip.mp4"
    write_clip(clip)  # once: two files of the same pictures have been seen to differ, and the results with them
    whole_run = ComfyServer(bed, tmp_path / "whole")
    with whole_run as server:
        shutil.copy(clip, server.input)
        whole, bar = finish(server)
    assert any(ENCODING[0] < place < ENCODING[1] for place in bar)
    interrupted = tmp_path / "interrupted"
    with ComfyServer(bed, interrupted) as server:
        shutil.copy(clip, server.input)
        with server.client() as client:
            kill_within(server, client)
    with ComfyServer(bed, interrupted) as server:
        again, bar = finish(server)
        kept = list((server.output / "flashvideo-unfinished").glob("*"))
    assert not any(ENCODING[0] < place < ENCODING[1] for place in bar), "it began anew"
    assert again.shape == whole.shape
    other = [frame for frame in range(len(whole)) if not np.array_equal(again[frame], whole[frame])]
    assert not other, f"frames {other} differ, by up to {np.abs(again.astype(int) - whole).max()} levels"
    assert not kept
