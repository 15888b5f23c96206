"""Clips of 10 bits through the graph, with ComfyUI's own nodes at both ends, where these have more than 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from comfy_api.latest import InputImpl
from comfy_extras.nodes_video import CreateVideo, GetVideoComponents

KEEP = {"size": "keep", "short_side": 1080, "scale": 4.0, "width": 1920, "height": 1080, "resample": "bilinear"}
FRAMES, HEIGHT, WIDTH = 5, 32, 640
DARK, GREY = 200, 512  # luma of the first column, and chroma without colour, of 0 to 1023


def ramp() -> np.ndarray:
    """Luma that rises by 1 of 1023 a column: [H, W]."""
    return np.broadcast_to(DARK + np.arange(WIDTH), (HEIGHT, WIDTH)).astype("<u2")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A grey ramp of 10 bits, without loss."""
    planes = [ramp(), *(np.full((HEIGHT // 2, WIDTH // 2), GREY, "<u2") for _ in range(2))]
    path = tmp_path / "ramp.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p10le"
        for _ in range(FRAMES):
            frame = av.VideoFrame(WIDTH, HEIGHT, "yuv420p10le")
            for plane, values in zip(frame.planes, planes, strict=True):
                rows = np.zeros((plane.height, plane.line_size // 2), "<u2")
                rows[:, : values.shape[1]] = values
                plane.update(rows.tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def luma(path: Path) -> np.ndarray:
    """Stored luma of all frames of a video of 10 bits: [T, H, W]."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert {frame.format.components[0].bits for frame in frames} == {10}
    planes = [np.frombuffer(frame.planes[0], "<u2").reshape(HEIGHT, -1)[:, :WIDTH] for frame in frames]
    return np.stack(planes).astype(int)


@pytest.mark.skipif(
    "bit_depth" not in {each.id for each in CreateVideo.define_schema().inputs},
    reason="this version of ComfyUI writes 8 bits",
)
def test_ten_bits_stay_ten_bits(comfy_nodes: dict[str, Any], clip: Path, tmp_path: Path) -> None:
    images, audio, fps, bits, _space = GetVideoComponents.execute(InputImpl.VideoFromFile(str(clip))).result
    assert bits == 10
    prepared, reference, _ = comfy_nodes["FlashVideoPrepareFrames"].execute(images, **KEEP).result
    finished = comfy_nodes["FlashVideoFinishFrames"].execute(prepared, reference, "none").result[0]
    (video,) = CreateVideo.execute(finished, fps, audio, bits).result
    target = tmp_path / "out.mp4"
    video.save_to(str(target))
    written = luma(target)
    assert written.shape == (FRAMES, HEIGHT, WIDTH)
    assert np.abs(written - ramp()).mean() < 1
    assert len(np.unique(written)) > WIDTH / 2  # 8 bits have a quarter as many
