"""The pack's nodes, gathered for ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import attention, example_clip, frames, long_video, models, planner, regions, stage1, stage2, text, vae


class FlashVideoExtension(ComfyExtension):
    """What ComfyUI loads from this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All node classes, in the order of a graph."""
        return [
            *models.NODES,
            *text.NODES,
            *vae.NODES,
            *stage1.NODES,
            *example_clip.NODES,
            *frames.NODES,
            *regions.NODES,
            *stage2.NODES,
            *attention.NODES,
            *long_video.NODES,
            *planner.NODES,
        ]


async def comfy_entrypoint() -> FlashVideoExtension:
    """ComfyUI's entry point."""
    return FlashVideoExtension()
