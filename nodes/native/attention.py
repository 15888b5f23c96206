"""Which attention the networks use: exact, or the approximation that a MODEL's transformer options name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import torch
from comfy.cli_args import args
from comfy.ldm.modules.attention import attention_pytorch, get_attention_function, optimized_attention
from torch import Tensor

from ...flashvideo.dit.tile_attention import Grid, share
from ...flashvideo.memory import LAYER_SEQUENCES

ATTENTION_TILES = "flashvideo_attention_tiles"  # how the video is cut, as `tile_attention.WindowAttention` takes it
OVERRIDE = "optimized_attention_override"  # ComfyUI's own
SAGE = "sage"  # ComfyUI's name for SageAttention


def exact_attention(device: torch.device) -> Callable[..., Tensor]:
    """The attention function for a device: ComfyUI's, but PyTorch's on a CPU, unless a start option names another.

    On a CPU ComfyUI takes its sub-quadratic attention, which writes parts of the attention matrix to memory: 3.5 times
    the processor time of PyTorch's for 9,186 tokens (docs/performance.md). It also can't be compiled as one graph.
    """
    named = args.use_quad_cross_attention or args.use_split_cross_attention
    return attention_pytorch if device.type == "cpu" and not named else optimized_attention


def with_attention_windows(model: comfy.model_patcher.ModelPatcher, tiles: Grid) -> comfy.model_patcher.ModelPatcher:
    """A clone of a MODEL whose video attends within windows; see `flashvideo.dit.tile_attention`."""
    clone = model.clone()
    clone.model_options["transformer_options"][ATTENTION_TILES] = tiles

    def reserve(executor: Callable[..., Any], model: Any, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
        """Let ComfyUI reserve memory for a window's keys and values too, by a wider picture."""
        *shape, columns = noise_shape
        columns = math.ceil(columns * (1 + 2 * share(tiles) / LAYER_SEQUENCES))
        return executor(model, [*shape, columns], *args, **kwargs)

    preparing = comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING
    clone.remove_wrappers_with_key(preparing, ATTENTION_TILES)  # of windows that were chosen before
    clone.add_wrapper_with_key(preparing, ATTENTION_TILES, reserve)
    return clone


def has_sage() -> bool:
    """Whether ComfyUI found SageAttention."""
    return get_attention_function(SAGE, None) is not None


def with_sage(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone of a MODEL whose attention is SageAttention's (arXiv 2410.02367), in 8 bits."""
    clone = model.clone()
    clone.model_options["transformer_options"][OVERRIDE] = sage
    return clone


def sage(_function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """SageAttention, called instead of the attention function that ComfyUI chose."""
    return get_attention_function(SAGE)(*args, **kwargs)
