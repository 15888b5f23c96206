"""MODELs that evaluate a latent in pieces (windows of time or tiles of the picture) and blend them at every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import torch
from torch import Tensor

from ...flashvideo.refiner.tiles import plan_tiles
from ...flashvideo.refiner.windows import Piece, blend, plan_windows
from .attention import ATTENTION_TILES
from .sampling import sigma_to_flow

Wrapper = Callable[[Callable[..., Tensor], dict[str, Any]], Tensor]  # of ComfyUI's model function
WINDOWS, TILES = "windows", "tiles"  # kinds of pieces
HELD_LATENTS = 15  # in float32, that ComfyUI's samplers hold at most, as tests/comfy/test_pretended_card.py counts
Plan = Callable[[float, int, int, int], list[Piece]]  # at a time of the flow, of latent frames, rows and columns


def with_windows(
    model: comfy.model_patcher.ModelPatcher, window: int, overlap: int
) -> comfy.model_patcher.ModelPatcher:
    """A clone of a stage-II MODEL that refines longer latents in windows of time; see `flashvideo.refiner.windows`.

    `window` and `overlap` are in frames; `window` 0 leaves the model as it is. Raises ValueError for invalid numbers.
    A latent that fits one window is evaluated whole.
    """
    if not window:
        return model.clone()
    plan_windows(1, window, overlap)

    def plan(time: float, frames: int, *_: int) -> list[Piece]:
        return plan_windows(frames, window, overlap).at(time).pieces()

    return _in_pieces(model, WINDOWS, (window, overlap), plan)


def with_tiles(model: comfy.model_patcher.ModelPatcher, tile: int) -> comfy.model_patcher.ModelPatcher:
    """A clone of a stage-II MODEL that sees large pictures in tiles; see `flashvideo.refiner.tiles`.

    `tile` is in pixels. Raises ValueError for an invalid size. A picture that fits one tile is evaluated whole.
    """
    plan_tiles(2, 2, tile)
    return _in_pieces(model, TILES, (tile,), lambda _time, _frames, *sides: plan_tiles(*sides, tile))


def tile_of(model: comfy.model_patcher.ModelPatcher) -> int:
    """The tile of `with_tiles` in pixels, the smallest if there are several; 0 where a MODEL sees whole pictures."""
    return min(settings_of(model, TILES), default=0)


def settings_of(model: comfy.model_patcher.ModelPatcher, kind: str) -> list[int]:
    """The sizes of a MODEL's windows in frames, or of its tiles in pixels."""
    wrapper, found = model.model_options.get("model_function_wrapper"), []
    while isinstance(wrapper, InPieces):
        if wrapper.kind == kind:
            found.append(wrapper.settings[0])
        wrapper = wrapper.inner
    return found


def _in_pieces(
    model: comfy.model_patcher.ModelPatcher, kind: str, settings: tuple[int, ...], plan: Plan
) -> comfy.model_patcher.ModelPatcher:
    clone = model.clone()
    inner = model.model_options.get("model_function_wrapper")
    clone.set_model_unet_function_wrapper(InPieces(inner, kind, settings, plan))

    def reserve(executor: Callable[..., Any], model: Any, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
        """Let ComfyUI reserve memory for one piece and the samplers' copies of the latent, by a wider piece."""
        whole = torch.empty(tuple(noise_shape), device="meta")
        *piece, columns = whole[plan(0.0, *noise_shape[2:])[0].at].shape
        room = model.model.memory_required
        a_column = (room([*piece, 2 * columns]) - room([*piece, columns])) / columns
        beyond = (whole.numel() - math.prod((*piece, columns))) * whole.itemsize
        columns += math.ceil(HELD_LATENTS * beyond / a_column)
        return executor(model, [*piece, columns], *args, **kwargs)

    preparing = comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING
    clone.add_wrapper_with_key(preparing, f"flashvideo_{kind}", reserve)
    # The memory for a view's keys depends on the piece, so its wrapper must run after the pieces' wrapper.
    for view in clone.get_wrappers(preparing, ATTENTION_TILES):
        clone.remove_wrappers_with_key(preparing, ATTENTION_TILES)
        clone.add_wrapper_with_key(preparing, ATTENTION_TILES, view)
    return clone


class InPieces:
    """ComfyUI's model function over pieces of a latent, each through the wrapper that was there before, if any."""

    def __init__(self, inner: Wrapper | None, kind: str, settings: tuple[int, ...], plan: Plan) -> None:
        self.inner, self.kind, self.settings, self._plan = inner, kind, settings, plan

    def __call__(self, apply_model: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        """The clean latent that the network sees in args["input"], [B, C, T, H, W]."""
        latent = args["input"]
        # The timestep is sigma here. ComfyUI has the same of the whole batch.
        place = sigma_to_flow(args["timestep"][0], args["c"]["degradation_step"])
        pieces = self._plan(1 - float(place), *latent.shape[2:])
        if len(pieces) == 1:
            return self._evaluate(apply_model, args)

        # ComfyUI expects clean latents, not velocities. One is linear in the other, and the blending weights sum to
        # one, so that blending either gives the same result.
        def clean(piece: Piece) -> Tensor:
            comfy.model_management.throw_exception_if_processing_interrupted()
            conditions = {name: _cut(value, latent, piece) for name, value in args["c"].items()}
            return self._evaluate(apply_model, {**args, "input": latent[piece.at], "c": conditions})

        return blend(pieces, clean, latent)

    def _evaluate(self, apply_model: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        if self.inner is not None:
            return self.inner(apply_model, args)
        return apply_model(args["input"], args["timestep"], **args["c"])


def _cut(condition: Any, latent: Tensor, piece: Piece) -> Any:
    """A piece's part of a condition that has the latent's shape; any other condition as a whole."""
    fits = isinstance(condition, Tensor) and condition.ndim == 5 and condition.shape[2:] == latent.shape[2:]
    return condition[piece.at] if fits else condition
