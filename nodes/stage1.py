"""Nodes of stage I: from a prompt to a low-resolution draft."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy_api.latest import io

from ..flashvideo.config import MAX_SEED, PIXEL_MULTIPLE, STAGE1_SCALE, TEMPORAL_FACTOR, latent_shape
from ..flashvideo.guidance import STAGE1_EXPONENT
from .checks import batch_of, check_batch, check_guidance, check_latent, check_room, check_size, check_stage, check_text
from .common import CATEGORY, found_as, named
from .inputs import checked
from .native.sampling import stage1_sigmas
from .native.stages import run_stage1, seeded_noise, with_dynamic_cfg

MAX_SIDE = 4096
MAX_LENGTH = 1025


class EmptyFlashVideoLatent(io.ComfyNode):
    """An empty video latent for stage I."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="EmptyFlashVideoLatent",
            display_name="Empty FlashVideo Latent",
            category=CATEGORY,
            **found_as("empty video latent", "video size", "video length"),
            description="Sets the size and length of the draft that stage I makes.",
            inputs=[
                io.Int.Input(
                    "width",
                    default=480,
                    min=PIXEL_MULTIPLE,
                    max=MAX_SIDE,
                    step=PIXEL_MULTIPLE,
                    tooltip="Width of the draft in pixels, in steps of 16. The official draft is 480 wide; larger "
                    "takes longer and departs from what the model knows. Default: 480.",
                ),
                io.Int.Input(
                    "height",
                    default=256,
                    min=PIXEL_MULTIPLE,
                    max=MAX_SIDE,
                    step=PIXEL_MULTIPLE,
                    tooltip="Height of the draft in pixels, in steps of 16. The official draft is 256 high (270p). "
                    "Default: 256.",
                ),
                io.Int.Input(
                    "length",
                    default=49,
                    min=1,
                    max=MAX_LENGTH,
                    step=TEMPORAL_FACTOR,
                    tooltip="Number of frames: 1, 5, 9, ... 49. FlashVideo was made for 49, about 6 seconds at 8 "
                    "frames a second; fewer is faster. Default: 49.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="How many videos to make in one go. Memory grows with it. Default: 1.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The empty latent, for the Stage I Sampler.")],
        )

    @classmethod
    @checked
    def execute(cls, width: int, height: int, length: int, batch_size: int) -> io.NodeOutput:
        """Make the latent."""
        with named("Empty FlashVideo Latent"):
            check_size(width, height, length)
            shape = (batch_size, 16, *latent_shape((length, height, width)))
            check_room(f"{batch_size} videos of {width}x{height} and {length} frames", shape)
        return io.NodeOutput({"samples": torch.zeros(shape, device=comfy.model_management.intermediate_device())})


class FlashVideoStage1Sampler(io.ComfyNode):
    """The official stage-I sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="FlashVideoStage1Sampler",
            display_name="FlashVideo Stage I Sampler",
            category=CATEGORY,
            **found_as("text to video", "draft", "t2v", "sampler"),
            description="Makes a small, faithful draft of the video from the prompt, exactly as FlashVideo's own "
            "sampler does.",
            inputs=[
                io.Model.Input("model", tooltip="FlashVideo stage I, from Load FlashVideo Model."),
                io.Conditioning.Input("positive", tooltip="What to show, from FlashVideo Prompt."),
                io.Conditioning.Input(
                    "negative",
                    tooltip="The empty prompt, from FlashVideo Prompt's second output. The model was trained with "
                    "that one; another text here has no trained meaning.",
                ),
                io.Latent.Input("latent", tooltip="Size and length of the draft, from Empty FlashVideo Latent."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Which of the possible videos to make: the same seed and settings give the same draft. "
                    "Default: 0.",
                ),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=2,
                    max=1000,
                    tooltip="Number of steps. 50 is the official quality; 25 to 30 is good for trying out. "
                    "Default: 50.",
                ),
                io.Float.Input(
                    "cfg",
                    default=STAGE1_SCALE,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="How strongly the prompt is followed. 6 to 8 works well; higher is harsher, lower "
                    "drifts from the prompt. Default: 8.",
                ),
                io.Boolean.Input(
                    "dynamic_cfg",
                    default=True,
                    tooltip="Let the strength vary from step to step, as FlashVideo was tuned. Off keeps it "
                    "constant. Default: on.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The draft, for VAE Decode.")],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: io.Model.Type,
        positive: list,
        negative: list,
        latent: dict,
        seed: int,
        steps: int,
        cfg: float,
        dynamic_cfg: bool,
    ) -> io.NodeOutput:
        """Sample the draft."""
        with named("FlashVideo Stage I Sampler"):
            check_stage(model, 1)
            samples = check_latent(latent)
            numbers = check_batch(latent)
            check_text(model, positive=positive, negative=negative)
            if dynamic_cfg:
                check_guidance(model)
        draft = run_stage1(
            model,
            positive,
            negative,
            samples,
            seeded_noise(samples.shape, seed, numbers),
            steps=steps,
            scale=cfg,
            dynamic=dynamic_cfg,
            seed=seed,
        )
        return io.NodeOutput(batch_of(latent) | {"samples": draft})


class FlashVideoStage1Scheduler(io.ComfyNode):
    """Stage I's steps as SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="FlashVideoStage1Scheduler",
            display_name="FlashVideo Stage I Scheduler",
            category=CATEGORY,
            **found_as("sigmas", "basic scheduler"),
            description="The official steps of stage I, for SamplerCustomAdvanced and similar samplers. The nearest "
            "sampler is dpmpp_2m_sde.",
            inputs=[
                io.Model.Input("model", tooltip="FlashVideo stage I, from Load FlashVideo Model."),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=2,
                    max=1000,
                    tooltip="Number of steps. 50 is the official quality, 25 to 30 good for trying out. Default: 50.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the run to do. 1 starts from noise; 0.3 to 0.7 reworks a video that comes "
                    "in as the latent; 0 does nothing. Default: 1.",
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="Noise level of each step.")],
        )

    @classmethod
    @checked
    def execute(cls, model: io.Model.Type, steps: int, denoise: float) -> io.NodeOutput:
        """Compute the sigmas."""
        with named("FlashVideo Stage I Scheduler"):
            check_stage(model, 1)
        return io.NodeOutput(stage1_sigmas(steps, denoise))


class FlashVideoDynamicCFG(io.ComfyNode):
    """FlashVideo's guidance for ComfyUI's own samplers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="FlashVideoDynamicCFG",
            display_name="FlashVideo Dynamic CFG",
            category=CATEGORY,
            **found_as("cfg schedule", "guidance"),
            description="Gives ComfyUI's own samplers FlashVideo's varying prompt strength for stage I. The "
            "sampler's cfg is then ignored. The Stage I Sampler has it built in.",
            inputs=[
                io.Model.Input("model", tooltip="FlashVideo stage I, from Load FlashVideo Model."),
                io.Float.Input(
                    "scale",
                    default=STAGE1_SCALE,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="How strongly the prompt is followed: the strength swings between 1 and 1 + scale. "
                    "6 to 8 works well. Default: 8.",
                ),
                io.Int.Input(
                    "exponent",
                    default=STAGE1_EXPONENT,
                    min=1,
                    max=20,
                    tooltip="How sharply the strength varies between steps. 5 is what FlashVideo uses. Default: 5.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The same model with dynamic guidance.")],
        )

    @classmethod
    @checked
    def execute(cls, model: io.Model.Type, scale: float, exponent: int) -> io.NodeOutput:
        """Patch a clone of the model."""
        with named("FlashVideo Dynamic CFG"):
            check_stage(model, 1)
            check_guidance(model)
        return io.NodeOutput(with_dynamic_cfg(model, scale, exponent))


NODES = [EmptyFlashVideoLatent, FlashVideoStage1Sampler, FlashVideoStage1Scheduler, FlashVideoDynamicCFG]
