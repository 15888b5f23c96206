"""What the sampling nodes demand of their inputs, in a user's words. Each check raises ValueError."""

from __future__ import annotations

import math
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor

from ..flashvideo.config import (
    PIXEL_MULTIPLE,
    SPATIAL_FACTOR,
    TEMPORAL_FACTOR,
    is_video_length,
    latent_frames,
    video_frames,
)
from .native.model import FlashVideoModel
from .native.schedule_guard import NOT_FINITE
from .native.stages import is_guided_otherwise

MAX_BATCH_INDEX = 4095  # no node of ComfyUI makes larger ones; each draw before it costs time
STAGE_NAMES = {1: "stage I (the draft model)", 2: "stage II (the refiner)"}


def check_model(model: comfy.model_patcher.ModelPatcher) -> None:
    """The MODEL must be FlashVideo's, of either stage."""
    if not isinstance(model.model, FlashVideoModel):
        raise ValueError(
            "model must be FlashVideo stage I or stage II, from Load FlashVideo Model; "
            f"got a {type(model.model).__name__} model"
        )


def check_stage(model: comfy.model_patcher.ModelPatcher, stage: int) -> None:
    """The MODEL must be FlashVideo's, of that stage."""
    wanted = STAGE_NAMES[stage]
    if not isinstance(model.model, FlashVideoModel):
        raise ValueError(
            f"model must be FlashVideo {wanted}, from Load FlashVideo Model; got a {type(model.model).__name__} model"
        )
    if model.model.diffusion_model.config.stage != stage:
        raise ValueError(f"model must be FlashVideo {wanted}; got FlashVideo {STAGE_NAMES[3 - stage]}")


def check_guidance(model: comfy.model_patcher.ModelPatcher) -> None:
    """No other node may decide how cfg works where FlashVideo's dynamic cfg does."""
    if is_guided_otherwise(model):
        raise ValueError(
            "model comes through a node that changes how cfg works, such as RescaleCFG; dynamic cfg would undo that. "
            "Take that node out, or do without dynamic cfg"
        )


def check_latent(latent: dict[str, Any]) -> Tensor:
    """The LATENT must be one video of 16 channels whose picture size is a multiple of 16; returns its samples."""
    samples = latent["samples"]
    if not isinstance(samples, Tensor) or samples.is_nested:
        raise ValueError("latent must hold one kind of video; this one mixes several, such as pictures and sound")
    if not samples.is_floating_point() or samples.itemsize < 2:
        raise ValueError(f"latent must hold numbers of 16 or 32 bits; these are {samples.dtype}")
    if samples.ndim != 5 or samples.shape[1] != 16 or not samples.numel():
        raise ValueError(
            "latent must be a video latent with 16 channels, [videos, 16, frames, height, width], from Empty "
            f"FlashVideo Latent or from VAE Encode with FlashVideo's VAE; got {list(samples.shape)}"
        )
    height, width = (SPATIAL_FACTOR * size for size in samples.shape[-2:])
    if height % PIXEL_MULTIPLE or width % PIXEL_MULTIPLE:
        raise ValueError(
            f"the video's width and height must be multiples of {PIXEL_MULTIPLE}; got {width}x{height}. "
            "FlashVideo Prepare Frames pads a video to such a size, and Finish Frames crops it back"
        )
    if not torch.isfinite(samples).all():
        raise ValueError("latent holds numbers that are not finite (NaN); look at the node that made it")
    return samples


def check_batch(latent: dict[str, Any]) -> list[int] | None:
    """Which videos of a batch these are (ComfyUI's batch_index); None where the LATENT doesn't say."""
    numbers, count = latent.get("batch_index"), len(latent["samples"])
    if numbers is None:
        return None
    if len(numbers) != count or not all(isinstance(each, int) and 0 <= each <= MAX_BATCH_INDEX for each in numbers):
        raise ValueError(
            f"latent holds {count} videos, and its batch_index is {numbers}: a node before changed one and not the "
            "other. Leave that node out"
        )
    return numbers


def batch_of(latent: dict[str, Any]) -> dict[str, Any]:
    """What a LATENT made of this one takes over: which videos of a batch they are."""
    return {name: latent[name] for name in ("batch_index",) if name in latent}


def check_room(what: str, shape: tuple[int, ...]) -> None:
    """An empty latent of a shape, in 32 bits, must fit into main memory."""
    needed, there = 4 * math.prod(shape), comfy.model_management.get_total_memory(torch.device("cpu"))
    if needed > there:
        raise ValueError(
            f"{what} need {needed / 2**30:.0f} GiB of main memory for the latent; there are {there / 2**30:.0f}"
        )


def check_text(model: comfy.model_patcher.ModelPatcher, **conditionings: list) -> None:
    """Each CONDITIONING must come from the text encoder that the model was made for."""
    wanted = model.model.diffusion_model.config.text_dim
    for name, conditioning in conditionings.items():
        if not conditioning:
            raise ValueError(f"{name} is empty; connect FlashVideo Prompt")
        width = conditioning[0][0].shape[-1]
        if not all(torch.isfinite(cond).all() for cond, _ in conditioning):
            raise ValueError(
                f"{name} holds numbers that are not finite (NaN). Look for a weight that is too large in the prompt, "
                "such as (word:1e40), or at the node that made it"
            )
        if width != wanted:
            raise ValueError(
                f"{name} comes from another text encoder: it has {width} numbers a word, this model reads {wanted}. "
                "The official models take T5-XXL, FlashVideo-Nano its built-in text encoder"
            )
        if not all(torch.isfinite(text).all() for text, *_ in conditioning):
            raise ValueError(f"{name} {NOT_FINITE}")


def check_size(width: int, height: int, length: int) -> None:
    """Pixels and frames of a new video."""
    for name, size in (("width", width), ("height", height)):
        if size % PIXEL_MULTIPLE or size <= 0:
            nearest = max(PIXEL_MULTIPLE, round(size / PIXEL_MULTIPLE) * PIXEL_MULTIPLE)
            raise ValueError(f"{name} must be a multiple of {PIXEL_MULTIPLE}; got {size} (nearest: {nearest})")
    if not is_video_length(length):
        nearest = video_frames(latent_frames(max(1, length + TEMPORAL_FACTOR // 2 - 1)))
        raise ValueError(f"length must be 4n+1 frames (1, 5, 9, ... 49); got {length} (nearest: {nearest})")
