"""Transparent clips through the graph, with ComfyUI's own nodes at both ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import pytest
import torch
from comfy_extras.nodes_compositing import JoinImageWithAlpha, SplitImageWithAlpha
from PIL import Image
from torch import Tensor

import nodes

KEEP = {"size": "keep", "short_side": 1080, "scale": 4.0, "width": 1920, "height": 1080, "resample": "bilinear"}
TWICE = {**KEEP, "size": "scale", "scale": 2.0}
COLOUR = torch.tensor([200, 90, 40]) / 255
STEP = 1 / 255
EMPTY = torch.zeros(1, 64, 64)  # Load Image's mask of a picture without transparency


def discs(count: int, height: int = 34, width: int = 50) -> Tensor:
    """Soft discs that move, straight [T, H, W, 4] in steps of 1/255; outside them the hidden colour is white."""
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    distance = torch.stack([torch.hypot(y - 15, x - 14 - 2 * index) for index in range(count)])
    alpha = (((9 - distance) / 3 + 0.5).clamp(0, 1) * 255).round()[..., None] / 255
    return torch.cat([torch.where(alpha > 0, COLOUR, torch.ones(3)), alpha], dim=3)


@pytest.fixture
def prepare(comfy_nodes: dict[str, Any]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *args, **inputs: comfy_nodes["FlashVideoPrepareFrames"].execute(*args, **inputs).result


@pytest.fixture
def finish(comfy_nodes: dict[str, Any]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *args, **inputs: comfy_nodes["FlashVideoFinishFrames"].execute(*args, **inputs).result


@pytest.mark.parametrize("count", [1, 6])
def test_a_clip_that_isnt_changed_comes_back_with_its_alpha_and_straight_colours(
    prepare: Callable[..., Any], finish: Callable[..., Any], count: int
) -> None:
    clip = discs(count)
    colours, mask = SplitImageWithAlpha.execute(clip).result
    for given in ({"images": colours, "alpha": mask}, {"images": clip}):
        images, reference, alpha = prepare(**given, **KEEP)
        assert torch.allclose(alpha, mask)
        assert torch.allclose(reference, colours * (1 - mask)[..., None])
        refined, hidden = finish(images, reference, "none", alpha=alpha)
        (joined,) = JoinImageWithAlpha.execute(refined, hidden).result
        assert joined.shape == clip.shape
        assert (joined[..., 3] - clip[..., 3]).abs().max() < STEP
        assert (joined - clip)[clip[..., 3] > 0].abs().max() < STEP
        assert (joined[clip[..., 3] == 0] == 0).all()


def test_an_enlarged_clip_has_no_rim_of_the_hidden_colour(
    prepare: Callable[..., Any], finish: Callable[..., Any]
) -> None:
    images, reference, alpha = prepare(discs(2), **TWICE)
    for match in ("none", "wavelet", "adain"):
        refined, hidden = finish(images, reference, match, alpha=alpha)
        assert hidden.shape == refined.shape[:3] == (2, 68, 100)
        visible = hidden < 1 - 3 * STEP
        assert (refined - COLOUR)[visible].abs().max() < 2 * STEP


def test_colours_of_opaque_pixels_dont_depend_on_alpha(prepare: Callable[..., Any], finish: Callable[..., Any]) -> None:
    images, reference, alpha = prepare(discs(5), **TWICE)
    refined = (images + 0.1 * torch.rand(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    without, nothing = finish(refined, reference, "wavelet")
    colours, hidden = finish(refined, reference, "wavelet", alpha=alpha)
    assert nothing.shape == hidden.shape and not nothing.any()
    assert torch.equal(colours[hidden == 0], without[hidden == 0])


def test_a_picture_file_goes_through_with_stock_nodes(prepare: Callable[..., Any], finish: Callable[..., Any]) -> None:
    stored = (discs(1)[0] * 255).round().byte().numpy()
    Image.fromarray(stored).save(Path(folder_paths.get_input_directory()) / "disc.png")
    colours, mask = nodes.LoadImage().load_image("disc.png")[:2]
    images, reference, alpha = prepare(colours, alpha=mask, **KEEP)
    (joined,) = JoinImageWithAlpha.execute(*finish(images, reference, "none", alpha=alpha)).result
    saved = nodes.SaveImage().save_images(joined, "flashvideo-alpha")["ui"]["images"][0]
    with Image.open(Path(folder_paths.get_output_directory()) / saved["subfolder"] / saved["filename"]) as image:
        found = np.array(image).astype(int)
    assert np.abs(found[..., 3] - stored[..., 3]).max() <= 1
    assert np.abs(found - stored)[stored[..., 3] > 0].max() <= 1


def test_an_empty_mask_of_any_size_means_opaque(prepare: Callable[..., Any], finish: Callable[..., Any]) -> None:
    clip = torch.rand(5, 32, 48, 3)
    plain = prepare(clip, **KEEP)
    for empty in (EMPTY, torch.zeros(7, 64, 64)):
        found = prepare(clip, alpha=empty, **KEEP)
        assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))
        refined, hidden = finish(plain[0], plain[1], "none", alpha=empty)
        assert torch.equal(refined, clip) and hidden.shape == (5, 32, 48) and not hidden.any()


def test_one_mask_serves_all_frames(prepare: Callable[..., Any], finish: Callable[..., Any]) -> None:
    clip = discs(5)
    images, reference, alpha = prepare(clip[..., :3], alpha=1 - clip[:1, ..., 3], **KEEP)
    assert alpha.shape == (5, 34, 50)
    _, hidden = finish(images, reference, "none", alpha=alpha[:1])
    assert torch.allclose(hidden, alpha, atol=STEP / 2)


def test_a_transparent_clip_is_told_of(
    prepare: Callable[..., Any], finish: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        images, reference, _ = prepare(discs(1), **KEEP)
    assert "FlashVideo Prepare Frames: images are transparent" in caplog.text
    assert "connect alpha to Finish Frames" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        finish(images, torch.cat([reference, reference[..., :1]], dim=3), "none")
    assert "FlashVideo Finish Frames: reference had an alpha channel; it was dropped" in caplog.text


def test_comparing_transparent_pictures_says_that_alpha_isnt_shown(
    comfy_nodes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        comfy_nodes["FlashVideoCompare"].execute(discs(1)[..., :3], discs(1), "split")
    assert "FlashVideo Compare: after had an alpha channel" in caplog.text
    assert "before had" not in caplog.text


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(1, 16, 50), "alpha must have the size of images, 50x34; got 50x16. Take both from the same node."),
        (torch.ones(3, 34, 50), "alpha must have 1 frame, or as many as the clip, 2; got 3."),
        (torch.full((1, 34, 50), torch.nan), "alpha holds numbers that are not finite (NaN)"),
        (torch.ones(1, 34, 50, 3), "alpha must be [frames, height, width]; got [1, 34, 50, 3]."),
    ],
)
def test_masks_that_dont_fit_get_one_sentence(prepare: Callable[..., Any], mask: Tensor, words: str) -> None:
    with pytest.raises(ValueError) as refused:
        prepare(discs(2)[..., :3], alpha=mask, **KEEP)
    assert str(refused.value).startswith(f"FlashVideo Prepare Frames: {words}")


def test_finish_refuses_alpha_of_another_clip(prepare: Callable[..., Any], finish: Callable[..., Any]) -> None:
    images, reference, _ = prepare(discs(2), **KEEP)
    with pytest.raises(ValueError, match=r"^FlashVideo Finish Frames: alpha must have 1 frame, or as many as the clip"):
        finish(images, reference, "none", alpha=torch.ones(3, 34, 50))
    with pytest.raises(ValueError, match=r"^FlashVideo Finish Frames: alpha holds numbers that are not finite"):
        finish(images, reference, "none", alpha=torch.full((2, 34, 50), torch.nan))
