"""The node that trades exactness of the refiner's attention for speed, at the user's choice only."""

from __future__ import annotations

import comfy.model_patcher
from comfy_api.latest import io

from ..flashvideo.dit.tile_attention import VIEWS
from .checks import check_stage
from .common import CATEGORY, found_as, named
from .inputs import checked
from .native.attention import has_sage, with_attention_windows, with_sage

# Saved workflows hold these names: they never change.
EXACT, EIGHT_BIT = "exact", "8-bit (SageAttention)"
VIEW_OPTIONS = {f"{view} view": tiles for view, tiles in VIEWS.items()}


class FlashVideoFastAttention(io.ComfyNode):
    """Approximate attention for stage II."""

    NAME = "FlashVideo Fast Attention"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="FlashVideoFastAttention",
            display_name=cls.NAME,
            category=CATEGORY,
            **found_as("faster refiner", "speed up", "sparse attention", "sage attention"),
            description="Makes the refiner faster and a little different: an approximation. Without this node the "
            "refiner computes exactly.",
            inputs=[
                io.Model.Input("model", tooltip="FlashVideo stage II, from Load FlashVideo Model."),
                io.Combo.Input(
                    "attention",
                    options=[EXACT, *VIEW_OPTIONS, EIGHT_BIT],
                    default=next(iter(VIEW_OPTIONS)),
                    tooltip="How much of the picture each place looks at while its detail is made. The wide, medium "
                    "and narrow view are 56, 36 and 18 % of it: less is faster and departs further from exact "
                    "(measured on FlashVideo-Nano: PSNR 36.2, 35.2 and 34.4 dB). 8-bit looks at everything in coarser "
                    "numbers; it needs an NVIDIA card and the package SageAttention. exact changes nothing. "
                    "Default: wide view.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The same model with that attention.")],
        )

    @classmethod
    @checked
    def execute(cls, model: io.Model.Type, attention: str) -> io.NodeOutput:
        """Patch a clone of the model."""
        with named(cls.NAME):
            check_stage(model, 2)
            if attention in VIEW_OPTIONS:
                return io.NodeOutput(with_attention_windows(model, VIEW_OPTIONS[attention]))
            if attention == EIGHT_BIT:
                _check_sage(model)
                return io.NodeOutput(with_sage(model))
            return io.NodeOutput(model.clone())


def _check_sage(model: comfy.model_patcher.ModelPatcher) -> None:
    """8-bit attention must be able to run; ComfyUI would use the exact one in silence."""
    other = f"Choose {', '.join(VIEW_OPTIONS)} or {EXACT}, which run everywhere"
    if not has_sage():
        raise ValueError(
            f"{EIGHT_BIT} needs the package sageattention, which isn't installed in ComfyUI's Python "
            f"(pip install sageattention, then restart ComfyUI). {other}"
        )
    if model.load_device.type != "cuda":
        raise ValueError(f"{EIGHT_BIT} needs an NVIDIA card; this model runs on {model.load_device}. {other}")


NODES = [FlashVideoFastAttention]
