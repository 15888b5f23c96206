"""A clip that comes with the pack, so that graphs which refine a clip run before a clip is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import InputImpl, io

from .common import CATEGORY, found_as
from .inputs import checked

# Beside the code: ComfyUI's input folder is the user's, and nothing is put there.
EXAMPLE = Path(__file__).with_name("example_clip.mp4")


class FlashVideoExampleClip(io.ComfyNode):
    """The clip that is connected, else the pack's own."""

    NAME = "FlashVideo Clip or Example"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="FlashVideoExampleClip",
            display_name=cls.NAME,
            category=CATEGORY,
            **found_as("example video", "test clip", "sample video", "load video"),
            description="Passes your clip on. Without one it gives a small example clip that comes with the pack, so "
            "that a graph runs at once.",
            inputs=[
                io.Video.Input(
                    "video",
                    optional=True,
                    tooltip="Your clip, from Load Video or any generator. Not connected, or switched off: the example, "
                    "17 frames of 112 x 64 pixels.",
                ),
            ],
            outputs=[io.Video.Output(display_name="video", tooltip="Your clip, unchanged, or the example.")],
        )

    @classmethod
    @checked
    def execute(cls, video: Any = None) -> io.NodeOutput:
        """Your clip, or the example."""
        return io.NodeOutput(InputImpl.VideoFromFile(str(EXAMPLE)) if video is None else video)


NODES = [FlashVideoExampleClip]
