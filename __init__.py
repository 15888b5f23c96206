"""ComfyUI-FlashVideo: FlashVideo's two stages as native ComfyUI nodes."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"
__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
