"""The node that refines a video of any length from file to file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import InputImpl, io

from ..flashvideo.config import TEMPORAL_FACTOR, WINDOW
from ..flashvideo.degradation import strength_in_words, suited_strength
from ..flashvideo.errors import CommandError
from ..flashvideo.frames import TargetSize
from ..flashvideo.nano import pair_notice
from ..flashvideo.refiner import RefineSettings
from .checks import check_stage, check_text
from .common import CATEGORY, found_as, named, own_id
from .frames import AUTO_DETAIL_SIZE, FlashVideoFinishFrames, FlashVideoPrepareFrames
from .inputs import checked
from .native.cluster import carried, checked_cluster, refine_on_cluster
from .native.long_video import CODECS, H264, Result, refine_long_video
from .native.notices import note, warn
from .native.vae import FlashVideoVAE
from .stage2 import (
    CUSTOM,
    MAX_WINDOW,
    FlashVideoLatentDegradation,
    FlashVideoStage2Refiner,
    chosen_preset,
    chosen_strength,
    preset_input,
)

UNFINISHED = "flashvideo-unfinished"  # in the output folder: ComfyUI empties its temp folder when it starts


class FlashVideoRefineLongVideo(io.ComfyNode):
    """Prepare, encode, degrade, refine, decode and finish in one, piece by piece."""

    NAME = "FlashVideo Refine Long Video"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs; what they share with the nodes that it stands for comes from these."""
        return io.Schema(
            node_id="FlashVideoRefineLongVideo",
            display_name=cls.NAME,
            category=CATEGORY,
            **found_as("video upscale", "long video", "upscaler", "refine video", "resume", "film"),
            description="Refines a video of any length in one node: it is read, refined and written piece by piece, so "
            "that memory doesn't grow with its length. Frame rate and sound stay. An interrupted run resumes "
            "when the same graph is queued again.",
            inputs=[
                io.Model.Input("model", tooltip="FlashVideo stage II, from Load FlashVideo Model."),
                io.Vae.Input("vae", tooltip="FlashVideo's VAE, from Load FlashVideo VAE."),
                *_inputs_of(FlashVideoStage2Refiner, "positive", "negative"),
                io.Video.Input(
                    "video",
                    tooltip="The video to refine, from Load Video: any length, size and frame rate, with its sound.",
                ),
                *_inputs_of(FlashVideoPrepareFrames, "size", "short_side", "scale", "width", "height", "resample"),
                *_inputs_of(FlashVideoLatentDegradation, "strength"),
                *_inputs_of(FlashVideoStage2Refiner, "steps", "cfg", "shift"),
                *_inputs_of(FlashVideoLatentDegradation, "seed"),
                io.Int.Input(
                    "window",
                    default=WINDOW,
                    min=1,
                    max=MAX_WINDOW,
                    step=TEMPORAL_FACTOR,
                    tooltip="Frames that are refined together. The windows are blended at every step. Fewer need less "
                    "memory and agree less; 25 to 49 is useful. Default: 49.",
                ),
                *_inputs_of(FlashVideoStage2Refiner, "overlap", optional=False),
                *_inputs_of(FlashVideoFinishFrames, "color_match", "detail_size"),
                preset_input("in place of strength, steps, cfg and shift"),
                io.String.Input(
                    "cluster",
                    default="",
                    optional=True,
                    tooltip="Lets the workers of a Ray cluster refine the video: the address of its head, such as "
                    "10.0.0.1:6379; auto, for the cluster that this machine belongs to; or local, for all cards of "
                    "this machine. All machines need the pack, the models, the video and ComfyUI's output and temp "
                    "folders under the same path. Needs pip install 'comfyui-flashvideo[ray]'. Empty: here. Default: "
                    "empty.",
                ),
                io.Combo.Input(
                    "codec",
                    options=list(CODECS),
                    default=H264,
                    optional=True,
                    tooltip="How the refined video is written. h264: 8 bits a colour, plays everywhere. hevc and av1: "
                    "10 bits, so that skies show no steps and HDR stays; hevc is for editing programs, and not every "
                    "browser shows a preview of it. Leave Save Video's format and codec at auto: they keep it as it "
                    "is. Default: h264.",
                ),
            ],
            outputs=[
                io.Video.Output(
                    display_name="video", tooltip="The refined video, for Save Video; same frames, rate and sound."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: io.Model.Type,
        vae: io.Vae.Type,
        positive: list,
        negative: list,
        video: Any,
        size: str,
        short_side: int,
        scale: float,
        width: int,
        height: int,
        **choices: Any,
    ) -> io.NodeOutput:
        """Refine the video; `choices` are the other fields of `RefineSettings`."""
        with named(cls.NAME):
            check_stage(model, 2)
            check_text(model, positive=positive, negative=negative)
            if not isinstance(vae, FlashVideoVAE):
                raise ValueError("vae must come from Load FlashVideo VAE; this one can't work piece by piece")
            notice = pair_notice(model.model.latent_family, vae.latent_family)
            if notice is not None:
                warn(f"{cls.NAME}: {notice}", own_id(cls))
            target = TargetSize(size, short_side, scale, width, height)
            cluster, preset, codec = (
                choices.pop("cluster", ""),
                choices.pop("preset", CUSTOM),
                choices.pop("codec", H264),
            )
            choices["strength"] = chosen_strength(choices["strength"])
            if (known := chosen_preset(preset)) is not None:
                choices |= known.choices
                note(cls.NAME, f"preset {preset}: {known}", own_id(cls))
            config = model.model.diffusion_model.config
            suited = suited_strength(choices["strength"], config)
            if suited != choices["strength"]:  # a number from here on: an unfinished run is found by it
                note(cls.NAME, strength_in_words(suited, config, target), own_id(cls))
                choices["strength"] = suited
            choices["detail_size"] = choices.get("detail_size", AUTO_DETAIL_SIZE) or None
            settings = RefineSettings(target, **choices)
            ways = {
                "result": Result(
                    unfinished=Path(folder_paths.get_output_directory()) / UNFINISHED,
                    finished=Path(folder_paths.get_temp_directory()),
                    codec=codec,
                ),
                "warn": lambda text: warn(f"{cls.NAME}: {text}", own_id(cls)),
                "note": lambda text: note(cls.NAME, text, own_id(cls)),
            }
            try:
                if cluster.strip():
                    address = checked_cluster(cluster)
                    carry = carried(model, vae, positive, negative)
                    path = refine_on_cluster(address, carry, video, settings, **ways)
                else:
                    path = refine_long_video(model, vae, positive, negative, video, settings, **ways)
            except CommandError as error:
                raise ValueError(str(error)) from None
        return io.NodeOutput(InputImpl.VideoFromFile(str(path)))


def _inputs_of(node: type[io.ComfyNode], *names: str, optional: bool | None = None) -> list[Any]:
    """Inputs of another node, so that they are the same here; `optional` changes whether they may be left out."""
    ports = [port for port in node.define_schema().inputs if port.id in names]
    for port in ports:
        port.optional = port.optional if optional is None else optional
    return ports


NODES = [FlashVideoRefineLongVideo]
