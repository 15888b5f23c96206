"""What the slider in ComfyUI's page gets from a node: a small file in ComfyUI's temporary folder.

web/js/compare.js reads it. The file stands one level deeper than ComfyUI's own previews, so that the page doesn't list
it among the results.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import folder_paths
from comfy.model_management import InterruptProcessingException
from torch import Tensor

from ...flashvideo.compare.preview import plan_preview, write_preview
from ...flashvideo.progress import Progress
from .notices import warn

KEY = "flashvideo_compare"  # of a node's results, as web/js/compare.js has it


def slider(
    before: Tensor, after: Tensor, fps: float, *, name: str, node_id: str | None, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """What the page shows of two clips, as a node's `ui`; without an entry, and with a warning, if there is no way.

    `name` is the node's. A run that the user cancels ends; nothing else of this stops it.
    """
    try:
        return {KEY: [_write(before, after, fps, progress)]}
    except InterruptProcessingException:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        warn(f"{name}: there is no slider, as its preview can't be made ({reason}). The result is whole.", node_id)
        return {KEY: []}


def _write(before: Tensor, after: Tensor, fps: float, progress: Progress) -> dict[str, Any]:
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    preview = plan_preview(before, after, fps)
    target = folder / f"{KEY}_{secrets.token_hex(8)}{preview.suffix}"
    write_preview(target, before, after, preview, progress=progress)
    return {
        "file": {"filename": target.name, "subfolder": "", "type": "temp"},
        "height": preview.height,
        "width": preview.width,
        "offset": preview.offset,
        "frames": preview.frames,
        "total": preview.total,
        "fps": float(preview.fps),
    }
