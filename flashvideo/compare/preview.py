"""A small file of two clips for a page that compares them: before on top, after below, frame by frame.

Both lie in one picture, as on the page of `page`, so that no browser can show them at different moments. Between them
is a gap of H.264's blocks that repeats the edges on both its sides, so that neither clip leaks into the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import torch
from PIL import Image
from torch import Tensor

from ..atomic_files import write_whole
from ..frames import clean, extend_edges, resize
from ..progress import Progress, no_progress
from ..video_files.pixels import BT601, BT709, EXACT, LIMITED

LONG_SIDE, LONG_SIDE_OF_LONG_CLIPS = 1920, 1280  # pixels at most
LONG_CLIP = 60  # frames; clips of more are long
MAX_FRAMES = 240  # the first ones
_BLOCK = 16  # rows; also of the gap
_MAX_DENOMINATOR = 1001  # of a rate, as 30000/1001
# Key frames stand close, so that a page can seek; none of the frames has to wait for a later one.
_OPTIONS = {
    **{"crf": "14", "preset": "veryfast", "bf": "0", "g": "12", "x264-params": "mbtree=0"},
    **{"maxrate": "80M", "bufsize": "80M"},  # bits a second, of noise
}


@dataclass(frozen=True)
class Preview:
    """How two clips are shown: `height` x `width` pixels each, the first `frames` of `total`.

    In the file the clip after begins at row `offset`; rows and a column beyond the edges repeat the last one.
    """

    height: int
    width: int
    frames: int
    total: int
    fps: Fraction

    @property
    def offset(self) -> int:
        """Rows from the first clip's top to the second's."""
        return self._rows + _BLOCK

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the file's pictures: whole blocks, and an even number."""
        return self.offset + self._rows, self.width + self.width % 2

    @property
    def _rows(self) -> int:
        return -(-self.height // _BLOCK) * _BLOCK

    @property
    def suffix(self) -> str:
        """The ending of the file: one frame is a picture without loss."""
        return ".mp4" if self.frames > 1 else ".png"


def plan_preview(before: Tensor, after: Tensor, fps: float) -> Preview:
    """How to show `before` [T1, h, w, C] and `after` [T2, H, W, C], which sets the size, at `fps` frames a second."""
    total = max(len(before), len(after))
    frames = min(total, MAX_FRAMES)
    longest = LONG_SIDE if frames <= LONG_CLIP else LONG_SIDE_OF_LONG_CLIPS
    height, width = after.shape[1:3]
    scale = longest / max(height, width)
    if scale < 1:
        height, width = (max(2, 2 * round(side * scale / 2)) for side in (height, width))
    return Preview(height, width, frames, total, Fraction(fps).limit_denominator(_MAX_DENOMINATOR))


def write_preview(
    target: Path, before: Tensor, after: Tensor, preview: Preview, *, progress: Progress = no_progress
) -> None:
    """Write the file of `preview`, whole or not at all; `target` has its suffix.

    The shorter clip holds its last frame. Takes the memory of a few frames. Raises ValueError as `frames.clean` does,
    OSError, and av.FFmpegError if this PyAV can't write H.264.
    """
    pictures = _pictures(before, after, preview, progress)
    if preview.frames == 1:
        picture = next(pictures).numpy()
        write_whole(target, lambda part: Image.fromarray(picture).save(part, format="png", compress_level=1))
    else:
        write_whole(target, lambda part: _write_video(part, pictures, preview))


def _pictures(before: Tensor, after: Tensor, preview: Preview, progress: Progress) -> Iterator[Tensor]:
    """Both clips' frames in one picture [rows, columns, 3] uint8, one after the other, in the same memory."""
    height, width = preview.height, preview.width
    picture = torch.empty(*preview.shape, 3, dtype=torch.uint8)
    first, second = picture[: preview.offset - _BLOCK // 2], picture[preview.offset :]
    canvas = torch.empty(1, len(first), preview.shape[1], 3)
    for index in range(preview.frames):
        for clip, half in ((before, first), (after, second)):
            frame, _ = clean(clip[min(index, len(clip) - 1)][None].cpu())
            resize(frame, height, width, out=canvas[:, :height, :width])
            extend_edges(canvas, 1, height, width)
            half.copy_(canvas[0, : len(half)].mul_(255).round_())
        picture[len(first) : preview.offset] = second[0]
        progress(index + 1, preview.frames)
        yield picture


def _write_video(part: Path, pictures: Iterator[Tensor], preview: Preview) -> None:
    with av.open(str(part), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=preview.fps, options=_OPTIONS)
        context = stream.codec_context
        (context.height, context.width), context.pix_fmt = preview.shape, "yuv420p"
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            frame = frame.reformat(format="yuv420p", src_colorspace=BT601, dst_colorspace=BT709, interpolation=EXACT)
            frame.pts, frame.time_base = index, 1 / preview.fps
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
