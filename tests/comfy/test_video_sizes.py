"""Save Video takes what Prepare Frames makes of a clip's size; an odd size is warned of before the work."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import folder_paths
import pytest
import torch

# Generators' drafts, cameras, phones upright, television, and what is left of them after a crop.
COMMON_SIZES = [
    (480, 256), (512, 288), (640, 272), (640, 360), (640, 480), (672, 384), (704, 480), (720, 480), (720, 576),
    (768, 512), (832, 480), (848, 480), (854, 480), (864, 480), (960, 540), (960, 544), (1024, 576), (1024, 436),
    (1216, 704), (1280, 534), (1280, 720), (1440, 1080), (1920, 800), (1920, 1080), (2048, 858), (480, 832),
    (720, 1280), (1080, 1920),
]  # fmt: skip
SIZE = {"size": "short side", "short_side": 1080, "scale": 4.0, "width": 1920, "height": 1080, "resample": "bilinear"}
NANO = "FlashVideo-Nano (built-in)"
STAGE2 = {"model_name": "FlashVideo-Nano Stage II (built-in)", "weight_dtype": "default"}


def clip(width: int, height: int, count: int = 1) -> torch.Tensor:
    """Frames [count, height, width, 3] of soft colours."""
    waves = [torch.linspace(0, 1 + k, height)[:, None] * torch.linspace(0, 2, width)[None] for k in range(3)]
    return (torch.stack(waves, dim=-1) % 1)[None].expand(count, -1, -1, -1)


def saved(images: list[Any]) -> dict[str, Any]:
    """ComfyUI's own nodes at the end of the workflows: mp4 with h264."""
    return {
        "create": {"class_type": "CreateVideo", "inputs": {"images": images, "fps": 24.0}},
        "save": {
            "class_type": "SaveVideo",
            "inputs": {"video": ["create", 0], "filename_prefix": "sizes", "format": "auto", "codec": "auto"},
        },
    }


def stream_of(outputs: dict[str, Any]) -> tuple[str, int, int, str]:
    """Codec, width, height and pixel format of the file that Save Video reported."""
    (entry,) = outputs["save"]["images"]
    path = Path(folder_paths.get_output_directory()) / entry["subfolder"] / entry["filename"]
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        found = (context.name, context.width, context.height, context.pix_fmt)
    path.unlink()
    return found


@pytest.fixture()
def prepared(run_prompt: Any, values: dict[str, Any]) -> Callable[..., tuple[str, int, int, str]]:
    """A clip of one frame through Prepare Frames, Finish Frames and Save Video; what was saved."""

    def run(width: int, height: int, **changes: Any) -> tuple[str, int, int, str]:
        values["clip"] = clip(width, height)
        prompt = {
            "clip": {"class_type": "TestValue", "inputs": {"name": "clip"}},
            "prepare": {"class_type": "FlashVideoPrepareFrames", "inputs": {"images": ["clip", 0], **SIZE, **changes}},
            "finish": {
                "class_type": "FlashVideoFinishFrames",
                "inputs": {"images": ["prepare", 0], "reference": ["prepare", 1], "color_match": "none"},
            },
            **saved(["finish", 0]),
        }
        return stream_of(run_prompt(prompt)[0])

    return run


@pytest.mark.parametrize(("width", "height"), COMMON_SIZES)
def test_common_sizes_can_be_saved(prepared: Callable[..., tuple], width: int, height: int) -> None:
    """Each at 360, since what is odd at 1080 is a matter of the ratio: the library tests sides at any target."""
    codec, wide, high, pixels = prepared(width, height, short_side=360)
    assert (codec, pixels) == ("h264", "yuv420p")
    assert min(wide, high) == 360
    assert abs(wide / high - width / height) <= max(width / height, 1) * 2 / 360


@pytest.mark.parametrize(
    ("width", "height", "changes"),
    [
        (480, 256, {}),
        (640, 272, {}),
        (333, 187, {"size": "scale", "scale": 1.5}),
        (101, 77, {"size": "scale", "scale": 3.3}),
        (77, 101, {"size": "short side", "short_side": 333}),
    ],
)
def test_short_side_and_scale_always_give_what_can_be_saved(
    prepared: Callable[..., tuple], width: int, height: int, changes: dict[str, Any]
) -> None:
    codec, wide, high, _ = prepared(width, height, **changes)
    assert codec == "h264"
    assert wide % 2 == high % 2 == 0


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (1920, 1080)])
def test_refine_any_video_at_its_own_defaults_can_be_saved(
    run_prompt: Any, values: dict[str, Any], text: dict[str, list], width: int, height: int
) -> None:
    values |= {"clip": clip(width, height, 2), **text}
    nodes = {
        "clip": ("TestValue", {"name": "clip"}),
        "positive": ("TestValue", {"name": "positive"}),
        "negative": ("TestValue", {"name": "negative"}),
        "model": ("FlashVideoModelLoader", STAGE2),
        "vae": ("FlashVideoVAELoader", {"vae_name": NANO}),
        "prepare": ("FlashVideoPrepareFrames", {"images": ["clip", 0], **SIZE, "short_side": 192}),
        "encode": ("VAEEncode", {"pixels": ["prepare", 0], "vae": ["vae", 0]}),
        "degrade": ("FlashVideoLatentDegradation", {"latent": ["encode", 0], "strength": 60, "seed": 1}),
        "refine": (
            "FlashVideoStage2Refiner",
            {
                **{"model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0]},
                **{"latent": ["degrade", 0], "steps": 1, "cfg": 1.0, "shift": 2.5, "solver": "euler"},
            },
        ),
        "decode": ("VAEDecode", {"samples": ["refine", 0], "vae": ["vae", 0]}),
        "finish": (
            "FlashVideoFinishFrames",
            {"images": ["decode", 0], "reference": ["prepare", 1], "color_match": "wavelet"},
        ),
    }
    prompt = {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}
    outputs, _ = run_prompt({**prompt, **saved(["finish", 0])})
    assert stream_of(outputs) == ("h264", 342, 192, "yuv420p")


@pytest.mark.parametrize("changes", [{"size": "exact", "width": 101, "height": 64}, {"size": "keep"}])
def test_an_odd_size_that_was_asked_for_is_made_and_warned_of_at_once(
    comfy_nodes: dict[str, Any], caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    with caplog.at_level(logging.WARNING):
        output = comfy_nodes["FlashVideoPrepareFrames"].execute(clip(101, 64), **{**SIZE, **changes})
    assert output.result[1].shape == (1, 64, 101, 3)
    (warning,) = (record.getMessage() for record in caplog.records if "odd" in record.getMessage())
    assert warning.startswith("FlashVideo Prepare Frames: 101x64 has an odd side")
    assert "101x64 has an odd side" in output.ui.as_dict()["text"][0]
