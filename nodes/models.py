"""The loaders of both stages and of their LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_patcher
import torch
from comfy_api.latest import io

from ..flashvideo.nano import nano_state
from .checks import check_model
from .common import CATEGORY, found_as, named, own_id
from .inputs import checked
from .native.files import check_file, file_fingerprint, notice, options, resolve, shared
from .native.loaded_from import LoadedFrom, remember_file
from .native.lora import add_lora
from .native.model import load_model

FOLDER = "diffusion_models"
LORA_FOLDER = "loras"
# Saved workflows hold these names: they never change.
BUILT_IN = {
    "FlashVideo-Nano Stage I (built-in)": "stage1",
    "FlashVideo-Nano Stage II (built-in)": "stage2",
    "FlashVideo-Nano Stage II for real footage (built-in)": "footage_stage2",
}
WEIGHT_DTYPES = {
    "default": None,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fn_fast": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class FlashVideoModelLoader(io.ComfyNode):
    """Loads stage I or stage II."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="FlashVideoModelLoader",
            display_name="Load FlashVideo Model",
            category=CATEGORY,
            **found_as("flashvideo checkpoint", "load diffusion model", "video model loader", "stage1.pt", "stage2.pt"),
            description="Loads FlashVideo's stage I (drafts) or stage II (refines) from the official .pt file or a "
            "converted one; which of the two a file is shows in its contents. CogVideoX-5B loads as a stage I.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=options(FOLDER, tuple(BUILT_IN)),
                    default=next(iter(BUILT_IN)),
                    tooltip="The model file, from models/diffusion_models: put stage1.pt and stage2.pt (from "
                    "huggingface.co/FoundationVision/FlashVideo) there. FlashVideo-Nano is a built-in miniature "
                    "that runs on anything; its Stage II for real footage goes with the VAE of the same name. "
                    "Default: FlashVideo-Nano Stage I.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="How weights are kept in memory. fp8 takes half the memory at slightly lower quality; "
                    "fast also computes in fp8 on cards that can (RTX 40 and later). Default: as in the file.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model, for a FlashVideo sampler or KSampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None) -> bool | str:
        """Say what to put where if the file isn't there; in place of ComfyUI's own check of this input."""
        return check_file(FOLDER, model_name, tuple(BUILT_IN))

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, **_: Any) -> str:
        """A file of the same name that was replaced counts as another one."""
        return file_fingerprint(FOLDER, model_name, tuple(BUILT_IN))

    @classmethod
    @checked
    def execute(cls, model_name: str, weight_dtype: str) -> io.NodeOutput:
        """Load the model, or find it loaded."""
        with named("Load FlashVideo Model"):
            path = resolve(FOLDER, model_name, tuple(BUILT_IN))
            model = shared(
                path,
                lambda: _load(path, BUILT_IN.get(model_name), weight_dtype),
                model_name if path is None else None,
                weight_dtype,
            )
        return io.NodeOutput(model, ui=notice(path, own_id(cls)))


def _load(path: Path | None, built_in: str | None, weight_dtype: str) -> comfy.model_patcher.ModelPatcher:
    dtype = WEIGHT_DTYPES[weight_dtype]
    source = nano_state(built_in) if path is None else path
    model = load_model(source, dtype, fp8_matmul=weight_dtype.endswith("_fast"))
    remember_file(model.model, LoadedFrom(path or built_in, as_it_is=dtype is None))
    return model


class FlashVideoLoraLoader(io.ComfyNode):
    """Applies a LoRA to stage I or stage II, whatever tool named its layers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="FlashVideoLoraLoader",
            display_name="Load FlashVideo LoRA",
            category=CATEGORY,
            **found_as("flashvideo lora", "cogvideox lora", "load lora", "style"),
            description="Applies a LoRA to FlashVideo: a published one for CogVideoX-5B on stage I, as it was "
            "downloaded, or one of your own training on the stage that it was trained on.",
            inputs=[
                io.Model.Input("model", tooltip="Stage I or stage II, from Load FlashVideo Model or another LoRA."),
                io.Combo.Input(
                    "lora_name",
                    options=options(LORA_FOLDER, ()),
                    tooltip="The LoRA file, from models/loras. LoRAs for CogVideoX-5B suit stage I. One whose "
                    "layers don't fit is refused.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much of the LoRA is added. 0 adds nothing, a negative number takes its style away. "
                    "Useful: 0.5 to 1; more changes motion too. Default: 1.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the LoRA, for more LoRAs or a sampler.")
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None) -> bool | str:
        """Say what to put where if the file isn't there; in place of ComfyUI's own check of this input."""
        return check_file(LORA_FOLDER, lora_name, ())

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None, **_: Any) -> str:
        """A file of the same name that was replaced counts as another one."""
        return file_fingerprint(LORA_FOLDER, lora_name, ())

    @classmethod
    @checked
    def execute(cls, model: comfy.model_patcher.ModelPatcher, lora_name: str, strength: float) -> io.NodeOutput:
        """Patch the model; loaded weights stay shared."""
        with named("Load FlashVideo LoRA"):
            check_model(model)
            path = resolve(LORA_FOLDER, lora_name, ())
            return io.NodeOutput(add_lora(model, path, strength) if strength else model)


NODES = [FlashVideoModelLoader, FlashVideoLoraLoader]
