"""Prepare Frames, Finish Frames and Compare inside the real ComfyUI."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

IDS = {
    "FlashVideoPrepareFrames": "FlashVideo Prepare Frames",
    "FlashVideoFinishFrames": "FlashVideo Finish Frames",
    "FlashVideoCompare": "FlashVideo Compare",
}
KEEP = {"size": "keep", "short_side": 1080, "scale": 4.0, "width": 1920, "height": 1080, "resample": "bilinear"}


@pytest.mark.parametrize("node_id", IDS)
def test_every_input_and_output_is_explained(comfy_nodes: dict, node_id: str) -> None:
    schema = comfy_nodes[node_id].GET_SCHEMA()
    assert schema.display_name == IDS[node_id]
    assert schema.category == "FlashVideo"
    assert schema.description
    for port in [*schema.inputs, *schema.outputs]:
        assert str(port.tooltip).endswith("."), port.id
    for choice in schema.inputs:
        if getattr(choice, "default", None) is not None:
            assert "Default: " in choice.tooltip, choice.id


def test_prepare_and_finish_return_the_same_frames_and_size(comfy_nodes: dict) -> None:
    clip = torch.rand(6, 18, 33, 3)
    images, reference, _ = comfy_nodes["FlashVideoPrepareFrames"].execute(clip, **{**KEEP, "size": "scale"}).result
    assert images.shape == (9, 80, 144, 3)
    assert reference.shape == (6, 72, 132, 3)
    finished, _ = comfy_nodes["FlashVideoFinishFrames"].execute(images, reference, "none").result
    assert torch.equal(finished, reference)


def test_finish_brings_the_colours_back(comfy_nodes: dict) -> None:
    clip = torch.rand(6, 18, 33, 3) * 0.5 + 0.25
    images, reference, _ = comfy_nodes["FlashVideoPrepareFrames"].execute(clip, **{**KEEP, "size": "scale"}).result
    refined = images * 0.9 + torch.tensor([0.08, 0.0, 0.04])
    untouched = refined.clone()
    for method, allowed in [("wavelet", 0.1), ("adain", 1e-4)]:  # wavelet keeps the fine detail's lower contrast
        finished, _ = comfy_nodes["FlashVideoFinishFrames"].execute(refined, reference, method).result
        assert finished.shape == reference.shape
        assert (finished.mean((0, 1, 2)) - reference.mean((0, 1, 2))).abs().max() < 1e-4
        assert (finished - reference).abs().max() < allowed
        assert torch.equal(refined, untouched)


def test_finish_offers_wavelet_first_and_still_takes_none(comfy_nodes: dict) -> None:
    schema = comfy_nodes["FlashVideoFinishFrames"].GET_SCHEMA()
    (choice,) = [port for port in schema.inputs if port.id == "color_match"]
    assert choice.options == ["none", "wavelet", "adain"]
    assert choice.default == "wavelet"


def test_detail_size_0_fits_the_model(comfy_nodes: dict, submodule: Callable[[str], ModuleType]) -> None:
    finish, frames = comfy_nodes["FlashVideoFinishFrames"].execute, submodule("flashvideo.frames")
    load, nano_state = submodule("nodes.native.model").load_model, submodule("flashvideo.nano").nano_state
    color = submodule("flashvideo.color")
    refined, coarse = torch.rand(5, 32, 48, 3), torch.rand(5, 8, 12, 3)
    reference = frames.resize(coarse, 32, 48, "bicubic").clamp(0, 1)  # soft: only there the gain counts in full
    drawn, footage = ({"model": load(nano_state(name))} for name in ("stage2", "footage_stage2"))
    for chosen, used in [
        ({}, color.Detail(70)), (drawn, color.Detail(9)), (footage, color.Detail(9, gain=3.5)),
        ({"detail_size": 20}, color.Detail(20)), ({"detail_size": 9} | footage, color.Detail(9)),
    ]:  # fmt: skip
        finished, _ = finish(refined, reference, "wavelet", **chosen).result
        assert torch.equal(finished, frames.finish(refined, reference, "wavelet", used))
    with pytest.raises(ValueError, match=r"^FlashVideo Finish Frames: detail_size must be 5 to 1000 pixels; got 4"):
        finish(refined, reference, "wavelet", 4)
    with pytest.raises(ValueError, match=r"^FlashVideo Finish Frames: model must be FlashVideo stage II"):
        finish(refined, reference, "wavelet", model=load(nano_state("stage1")))


@pytest.mark.parametrize(
    ("choice", "size"), [({"size": "short side", "short_side": 36}, (36, 66)), ({"size": "exact"}, (1080, 1920))]
)
def test_widgets_choose_the_size(comfy_nodes: dict, choice: dict, size: tuple[int, int]) -> None:
    _, reference, _ = (
        comfy_nodes["FlashVideoPrepareFrames"].execute(torch.rand(1, 18, 33, 3), **{**KEEP, **choice}).result
    )
    assert reference.shape == (1, *size, 3)


def test_a_clip_of_8_pixels_and_one_frame_works(comfy_nodes: dict) -> None:
    images, reference, _ = comfy_nodes["FlashVideoPrepareFrames"].execute(torch.rand(1, 8, 8, 3), **KEEP).result
    assert images.shape == (1, 16, 16, 3)
    assert reference.shape == (1, 8, 8, 3)


def test_padding_is_told_in_the_log_and_on_the_node(comfy_nodes: dict, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        output = comfy_nodes["FlashVideoPrepareFrames"].execute(torch.rand(20, 16, 16, 3), **KEEP)
    told = "20 frames of 16x16 become 20 frames of 16x16, padded to 21 frames of 16x16 for the refiner"
    assert f"FlashVideo Prepare Frames: {told}" in caplog.text
    assert told in output.ui.as_dict()["text"][0]


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (torch.zeros(49, 3, 16, 48), "images must be [frames, height, width, 3]; got [49, 3, 16, 48]."),
        (torch.zeros(16, 16, 3), "images must be [frames, height, width, 3]; got [16, 16, 3]."),
        (torch.zeros(0, 16, 16, 3), "images must hold at least one frame of one pixel; got [0, 16, 16, 3]."),
        (
            torch.full((2, 16, 16, 3), torch.nan),
            "images must be finite; frame 0 (the first is 0) has NaN or infinite pixels, 2 of 2 frames do.",
        ),
    ],
)
def test_bad_input_is_explained(comfy_nodes: dict, clip: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError) as error:
        comfy_nodes["FlashVideoPrepareFrames"].execute(clip, **KEEP)
    assert str(error.value) == f"FlashVideo Prepare Frames: {message}"


def test_mixed_up_wires_are_explained(comfy_nodes: dict) -> None:
    clip = torch.rand(5, 16, 16, 3)
    with pytest.raises(ValueError, match=r"^FlashVideo Finish Frames: images must be the refined form of"):
        comfy_nodes["FlashVideoFinishFrames"].execute(clip, torch.rand(5, 40, 16, 3), "none")
    with pytest.raises(ValueError, match=r"^FlashVideo Finish Frames: .* 13 frames; got 16, .* Load FlashVideo VAE"):
        comfy_nodes["FlashVideoFinishFrames"].execute(torch.rand(16, 16, 16, 3), torch.rand(11, 16, 16, 3), "none")
    with pytest.raises(ValueError, match=r"^FlashVideo Compare: before must be"):
        comfy_nodes["FlashVideoCompare"].execute(clip[0], clip, "split")


@pytest.mark.parametrize("color_match", ["none", "wavelet", "adain"])
def test_the_nodes_run_as_a_prompt(run_prompt: Callable, comfy_nodes: dict, color_match: str) -> None:
    """Through the executor: widget ranges, links and the note that the node shows."""
    outputs, events = run_prompt(
        {
            "1": {"class_type": "EmptyImage", "inputs": {"width": 40, "height": 24, "batch_size": 6, "color": 255}},
            "2": {"class_type": "FlashVideoPrepareFrames", "inputs": {"images": ["1", 0], **KEEP, "size": "scale"}},
            "3": {
                "class_type": "FlashVideoFinishFrames",
                "inputs": {"images": ["2", 0], "reference": ["2", 1], "color_match": color_match},
            },
            "4": {
                "class_type": "FlashVideoCompare",
                "inputs": {"before": ["1", 0], "after": ["3", 0], "layout": "side by side"},
            },
            "5": {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}},
        }
    )
    assert len(outputs["5"]["images"]) == 6
    assert "6 frames of 40x24 become 6 frames of 160x96, padded to 9 frames" in outputs["2"]["text"][0]
    assert "execution_error" not in [event[0] for event in events]
