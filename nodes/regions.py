"""The node that cuts out a part of a clip, so that it can be refined alone and put back."""

from __future__ import annotations

import logging

from comfy_api.latest import io, ui
from torch import Tensor

from ..flashvideo.frames import clean
from ..flashvideo.refiner.regions import MAX_BORDER, find_region
from .common import CATEGORY, found_as, named
from .inputs import checked

_BORDER, _CONTEXT, _MAX_CONTEXT = 16, 32, 1024  # pixels


class FlashVideoCropRegion(io.ComfyNode):
    """Cuts out the masked part of a clip, with a soft mask and the place that put it back."""

    NAME = "FlashVideo Crop Region"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="FlashVideoCropRegion",
            display_name=cls.NAME,
            category=CATEGORY,
            **found_as("mask", "inpaint crop", "face detailer", "refine a part", "crop by mask"),
            description="Cuts out the masked part of a clip, to be refined alone: less time and memory. Image "
            "Composite Masked puts the result back with a soft border, and keeps every other pixel.",
            inputs=[
                io.Image.Input("images", tooltip="The clip, at the size that it is to have in the end."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where to refine: one mask for all frames, or one for each. Another size is "
                    "stretched to the clip's. Not connected, or switched off: the middle half of the picture.",
                ),
                io.Int.Input(
                    "border",
                    default=_BORDER,
                    min=0,
                    max=MAX_BORDER,
                    tooltip="Pixels over which the result fades into the rest, outside of the mask. Useful: 8 for "
                    "small regions, 16 to 64 at 1080p. 0: a hard edge. Default: 16.",
                ),
                io.Int.Input(
                    "context",
                    default=_CONTEXT,
                    min=0,
                    max=_MAX_CONTEXT,
                    tooltip="Pixels around the border that the refiner also sees, and that are thrown away. More "
                    "fits better into the rest and takes longer. Useful: 16 to 128. Default: 32.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The region's box, for Prepare Frames."),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="The soft mask in the box, for Set Latent Noise Mask and Image Composite Masked.",
                ),
                io.Int.Output(display_name="x", tooltip="Left edge of the box, for Image Composite Masked."),
                io.Int.Output(display_name="y", tooltip="Top edge of the box, for Image Composite Masked."),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls, images: Tensor, mask: Tensor | None = None, border: int = _BORDER, context: int = _CONTEXT
    ) -> io.NodeOutput:
        """Cut the region out and report its place."""
        with named(cls.NAME):
            images, notes = clean(images)
            region = find_region(images, mask, border, context)
        height, width = images.shape[1:3]
        text = f"{region.width}x{region.height} of {width}x{height}, at x {region.left}, y {region.top}."
        if mask is None:
            text += " There is no mask: this is the middle of the picture."
        text = " ".join((text, *notes))
        logging.info("%s: %s", cls.NAME, text)
        return io.NodeOutput(region.crop(images), region.mask, region.left, region.top, ui=ui.PreviewText(text))


NODES = [FlashVideoCropRegion]
