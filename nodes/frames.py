"""Nodes around the refiner that work on pictures: prepare the frames, finish them, compare before and after."""

from __future__ import annotations

import logging

import comfy.utils
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..flashvideo.color import Detail, auto_detail
from ..flashvideo.compare import LAYOUTS, compare
from ..flashvideo.config import COLOR_MATCHES, MAX_DETAIL_SIZE, RESAMPLERS, SIZE_MODES
from ..flashvideo.frames import MAX_SIDE, TargetSize, clean, finish, prepare
from ..flashvideo.masks import opacity
from ..flashvideo.refiner.alpha import make_transparent
from .checks import check_stage
from .common import CATEGORY, found_as, named, own_id
from .inputs import checked
from .native.notices import warn
from .native.slider import slider

AUTO_DETAIL_SIZE = 0  # detail_size: follow from the model
_DEFAULT_FPS = 24.0
_DEFAULT_SIZE = TargetSize()


class FlashVideoPrepareFrames(io.ComfyNode):
    """Enlarges a clip to its final size and pads it to what the refiner takes."""

    NAME = "FlashVideo Prepare Frames"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="FlashVideoPrepareFrames",
            display_name=cls.NAME,
            category=CATEGORY,
            **found_as("video upscale", "resize video", "upscale frames", "pad video"),
            description="Enlarges a clip to the size you want and pads it to what the Stage II Refiner takes. "
            "Finish Frames crops the padding off again.",
            inputs=[
                io.Image.Input("images", tooltip="The clip to refine: any length from 1 frame, any size."),
                io.Combo.Input(
                    "size",
                    options=list(SIZE_MODES),
                    default=_DEFAULT_SIZE.mode,
                    tooltip="How the final size is chosen. short side: the shorter side gets this many pixels, the "
                    "aspect ratio stays. scale: both sides times a factor. Both give even sides, which video files "
                    "need. exact: width x height, stretched if the aspect ratio differs. keep: the size stays. "
                    "Default: short side.",
                ),
                io.Int.Input(
                    "short_side",
                    default=_DEFAULT_SIZE.short_side,
                    min=16,
                    max=4320,
                    tooltip="Pixels of the shorter side when size is short side. More shows finer detail and needs "
                    "more time and memory. Useful: 540, 720, 1080, 1440. Default: 1080.",
                ),
                io.Float.Input(
                    "scale",
                    default=_DEFAULT_SIZE.scale,
                    min=0.1,
                    max=16.0,
                    step=0.05,
                    tooltip="Factor for both sides when size is scale. Useful: 2 to 4; above 4 the refiner has to "
                    "invent most of the detail. Default: 4.",
                ),
                io.Int.Input(
                    "width",
                    default=_DEFAULT_SIZE.width,
                    min=1,
                    max=MAX_SIDE,
                    tooltip="Width in pixels when size is exact. Even, if it is to become an mp4. Useful: 960 to "
                    "2560. Default: 1920.",
                ),
                io.Int.Input(
                    "height",
                    default=_DEFAULT_SIZE.height,
                    min=1,
                    max=MAX_SIDE,
                    tooltip="Height in pixels when size is exact. Even, if it is to become an mp4. Useful: 540 to "
                    "1440. Default: 1080.",
                ),
                io.Combo.Input(
                    "resample",
                    options=list(RESAMPLERS),
                    default=RESAMPLERS[0],
                    tooltip="How pixels are interpolated. bilinear: what the refiner was trained on. bicubic: crisper, "
                    "can ring at edges. nearest-exact: hard pixel edges. area: the same, but averages when it shrinks. "
                    "Default: bilinear.",
                ),
                io.Mask.Input(
                    "alpha",
                    optional=True,
                    tooltip="For transparent clips: white where nothing is seen, as Load Image and Split Image with "
                    "Alpha give it; one mask for all frames, or one for each. The clip is refined as it stands on "
                    "black. Images with 4 channels bring their own.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    tooltip="For VAE Encode: the upscaled frames, padded to multiples of 16 pixels and 4n+1 frames.",
                ),
                io.Image.Output(
                    display_name="reference",
                    tooltip="For Finish Frames and Compare: the upscaled frames without padding.",
                ),
                io.Mask.Output(
                    display_name="alpha",
                    tooltip="For Finish Frames: the clip's transparency at its own size, white where nothing is seen.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @checked
    def execute(
        cls,
        images: Tensor,
        size: str,
        short_side: int,
        scale: float,
        width: int,
        height: int,
        resample: str,
        alpha: Tensor | None = None,
    ) -> io.NodeOutput:
        """Prepare the frames and report their new size and length."""
        target = TargetSize(size, short_side, scale, width, height)
        progress = comfy.utils.ProgressBar(1).update_absolute
        with named(cls.NAME):
            seen = None if alpha is None else opacity(alpha)
            prepared = prepare(images, target, resample, alpha=seen, progress=progress)
        summary, *repairs = prepared.notes
        logging.info("%s: %s", cls.NAME, summary)
        if repairs:
            warn("\n".join(f"{cls.NAME}: {repair}" for repair in repairs), own_id(cls))
        hidden = _transparency(prepared.alpha, len(images), *images.shape[1:3])
        return io.NodeOutput(prepared.frames, prepared.reference, hidden, ui=ui.PreviewText("\n".join(prepared.notes)))


class FlashVideoFinishFrames(io.ComfyNode):
    """Crops a refined clip to the frames and size of its reference and matches the colours."""

    NAME = "FlashVideo Finish Frames"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="FlashVideoFinishFrames",
            display_name=cls.NAME,
            category=CATEGORY,
            **found_as("color match", "colour match", "crop video", "fix colors"),
            description="Crops the refined clip so that it has exactly the frames and the size of the reference, and "
            "brings its colours back to the reference's.",
            inputs=[
                io.Image.Input("images", tooltip="The refined clip, from VAE Decode."),
                io.Image.Input(
                    "reference",
                    tooltip="The reference from the Prepare Frames that this clip went through: gives length, size "
                    "and colours.",
                ),
                io.Combo.Input(
                    "color_match",
                    options=list(COLOR_MATCHES),
                    default="wavelet",
                    tooltip="Brings the refined clip's colours back to the reference's, without flicker. wavelet: "
                    "light and colour of everything wider than about 70 pixels come from the reference, detail from "
                    "the refiner; removes casts, blotches and steps in brightness. adain: one gain and offset for each "
                    "colour channel of the whole clip; choose it if wavelet leaves coloured fringes at edges. none: "
                    "colours as the refiner made them. Default: wavelet.",
                ),
                io.Int.Input(
                    "detail_size",
                    default=AUTO_DETAIL_SIZE,
                    min=AUTO_DETAIL_SIZE,
                    max=MAX_DETAIL_SIZE,
                    optional=True,
                    tooltip="For wavelet, in pixels: what is smaller comes from the refiner, what is larger from the "
                    "reference. 70 takes over colours only. About twice the enlargement (8 for 4 times) keeps "
                    "nearly all that the draft shows, and only adds finer detail: most faithful. Useful: 8 to 70; at "
                    "least 5. 0: suits the model; for FlashVideo-Nano 9, with its detail only as far as the reference "
                    "supports it, else 70. Default: 0.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The stage II that refined the clip, so that detail_size 0 fits it.",
                ),
                io.Mask.Input(
                    "alpha",
                    optional=True,
                    tooltip="For transparent clips: alpha of the Prepare Frames that this clip went through. It is "
                    "enlarged along the refined picture's edges, and the black behind the colours is taken out.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The refined clip, same frames and size as reference."),
                io.Mask.Output(
                    display_name="alpha",
                    tooltip="For Join Image with Alpha: the clip's transparency, white where nothing is seen; all "
                    "black without alpha.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @checked
    def execute(
        cls,
        images: Tensor,
        reference: Tensor,
        color_match: str,
        detail_size: int = AUTO_DETAIL_SIZE,
        model: io.Model.Type | None = None,
        alpha: Tensor | None = None,
    ) -> io.NodeOutput:
        """Crop the frames, match their colours and make them transparent."""
        progress = comfy.utils.ProgressBar(1).update_absolute
        with named(cls.NAME):
            if model is not None:
                check_stage(model, 2)
            detail = Detail(detail_size)
            if detail_size == AUTO_DETAIL_SIZE:
                detail = auto_detail(None if model is None else model.model.diffusion_model.config)
            seen = None if alpha is None else opacity(alpha)
            frames = finish(images, reference, color_match, detail, progress=progress)
            if seen is not None:
                frames, seen = make_transparent(frames, clean(reference)[0], seen, progress=progress)
        _warn_of_alpha(cls, images=images, reference=reference)
        return io.NodeOutput(frames, _transparency(seen, *frames.shape[:3]))


class FlashVideoCompare(io.ComfyNode):
    """Shows two clips in one picture, and in the page with a slider."""

    NAME = "FlashVideo Compare"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="FlashVideoCompare",
            display_name=cls.NAME,
            category=CATEGORY,
            **found_as("before after", "side by side", "compare videos", "split screen"),
            description="Shows a clip before and after refining: in the page with a slider between them, and in one "
            "picture, ready to save as a video.",
            is_output_node=True,
            inputs=[
                io.Image.Input(
                    "before",
                    tooltip="The clip before refining, any size: it is resized bilinearly to after's size.",
                ),
                io.Image.Input(
                    "after",
                    tooltip="The refined clip: sets the size. If one clip is shorter, its last frame is held.",
                ),
                io.Combo.Input(
                    "layout",
                    options=list(LAYOUTS),
                    default=LAYOUTS[0],
                    tooltip="side by side: before left, after right, twice as wide. split: one picture, left half "
                    "before, right half after. stacked: before on top, twice as high; good for wide clips. "
                    "Default: side by side.",
                ),
                io.Float.Input(
                    "fps",
                    default=_DEFAULT_FPS,
                    min=0.01,
                    max=1000.0,
                    step=1.0,
                    optional=True,
                    tooltip="Frames per second at which the slider in the page plays; the output doesn't depend on it. "
                    "Useful: fps of Get Video Components. Default: 24.",
                ),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="Both clips in one; even sides, as h264 wants.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @checked
    def execute(cls, before: Tensor, after: Tensor, layout: str, fps: float = _DEFAULT_FPS) -> io.NodeOutput:
        """Put the clips together, and give the page a preview of both."""
        progress = comfy.utils.ProgressBar(1).update_absolute
        with named(cls.NAME):
            images = compare(before, after, layout, progress=progress)
        _warn_of_alpha(cls, before=before, after=after)
        return io.NodeOutput(
            images, ui=slider(before, after, fps, name=cls.NAME, node_id=own_id(cls), progress=progress)
        )


def _transparency(alpha: Tensor | None, count: int, height: int, width: int) -> Tensor:
    """ComfyUI's MASK [count, H, W] of alpha [1 or count, H, W]: 1 where nothing is seen. None is opaque."""
    if alpha is None:
        return torch.zeros(1, 1, 1).expand(count, height, width)  # takes no memory
    return (1 - alpha).expand(count, height, width)


def _warn_of_alpha(node: type[io.ComfyNode], **clips: Tensor) -> None:
    """Warn that a clip's fourth channel isn't used."""
    for name, clip in clips.items():
        if clip.shape[-1] == 4:
            warn(f"{node.NAME}: {name} had an alpha channel; it was dropped, and the colours stay.", own_id(node))


NODES = [FlashVideoPrepareFrames, FlashVideoFinishFrames, FlashVideoCompare]
