"""Versions of a video on one page, to judge them and to send them to somebody: a single file of HTML.

The versions lie one above the other in one video, so that no browser can show them at different moments; the page
draws two of them with a slider between.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from ..errors import CommandError
from ..frames import resize
from ..video_files import VideoClip

MAX_VERSIONS = 6
_CRF = "16"
_MAX_ROWS = 8192  # of all versions together: what browsers decode
_LUMA = (0.2126, 0.7152, 0.0722)
_PAGE = Path(__file__).with_suffix(".html")
_FOLDED = "FlashVideo"  # nodes whose settings are shown


@dataclass(frozen=True)
class Version:
    """One of the videos: `name` and `facts`, pairs of words, are shown."""

    name: str
    clip: VideoClip
    facts: tuple[tuple[str, str], ...] = ()


def comparison_page(
    versions: Sequence[Version], on_frame: Callable[[int, int], None] = lambda done, total: None
) -> str:
    """The page of 2 to 6 versions, frame by frame, in the size of the largest; `on_frame(done, total)` after each.

    Shorter versions hold their last frame. Raises CommandError for too many pixels.
    """
    height, width = max(((each.clip.height, each.clip.width) for each in versions), key=lambda size: size[0] * size[1])
    height, width = height + height % 2, width + width % 2
    if height * len(versions) > _MAX_ROWS:
        raise CommandError(
            f"{len(versions)} versions of {width}x{height} are more than browsers show: {_MAX_ROWS} rows in all."
        )
    count = max(each.clip.count for each in versions)
    rate = versions[0].clip.rate
    curves: list[list[list[float]]] = [[] for _ in versions]  # by version and frame: see `_measures`
    file, before = io.BytesIO(), None
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": _CRF, "x264-params": "mbtree=0"})
        stream.width, stream.height, stream.pix_fmt = width, height * len(versions), "yuv420p"
        streams = [_held(each.clip.frames(), count) for each in versions]
        for index, frames in enumerate(zip(*streams, strict=True)):
            sized = [resize(_fractions(frame)[None], height, width)[0] for frame in frames]
            lumas = [frame @ torch.tensor(_LUMA) for frame in sized]
            for number, luma in enumerate(lumas):
                curves[number].append(_measures(luma, lumas[0], before and before[number]))
            before = lumas
            picture = (torch.cat(sized) * 255).round().byte().numpy()
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = index, 1 / Fraction(rate)
            container.mux(stream.encode(frame))
            on_frame(index + 1, count)
        container.mux(stream.encode())
    return _page(versions, (height, width), count, rate, curves, file.getvalue())


def settings_of(metadata: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """The settings of this pack's nodes, as ComfyUI stores them in what it saves; none without."""
    try:
        nodes = json.loads(metadata.get("prompt", "{}")).values()
        return tuple(
            (f"{node['class_type'].removeprefix(_FOLDED)}: {name}", str(value))
            for node in nodes
            if node["class_type"].startswith(_FOLDED)
            for name, value in node["inputs"].items()
            if not isinstance(value, list)  # a wire
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return ()


def _held(frames: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    """So many frames; the last one holds."""
    last = None
    for _ in range(count):
        last = next(frames, last)
        yield last


def _fractions(frame: Tensor) -> Tensor:
    return frame.float() / 255 if frame.dtype == torch.uint8 else frame


def _measures(luma: Tensor, first: Tensor, before: Tensor | None) -> list[float]:
    """Of a frame: sharpness (mean step between neighbours), change since the frame before (both of 255), and PSNR in
    dB to the first version (100 where they are equal).
    """
    steps = (luma.diff(dim=0).abs().mean() + luma.diff(dim=1).abs().mean()) * 255
    change = 0.0 if before is None else float((luma - before).abs().mean() * 255)
    error = float((luma - first).square().mean())
    psnr = 100.0 if error < 1e-10 else min(100.0, -10 * float(np.log10(error)))
    return [round(float(steps), 3), round(change, 3), round(psnr, 2)]


def _page(
    versions: Sequence[Version],
    size: tuple[int, int],
    count: int,
    rate: Fraction,
    curves: list[list[list[float]]],
    video: bytes,
) -> str:
    names = [each.name for each in versions]
    data = {"names": names, "height": size[0], "width": size[1], "frames": count, "rate": float(rate), "curves": curves}
    filled = {
        "TITLE": html.escape(" | ".join(names)),
        "DATA": json.dumps(data).replace("<", "\\u003c"),
        "TABLE": "".join(_rows(versions)),
        "VIDEO": base64.b64encode(video).decode(),
    }
    page = _PAGE.read_text(encoding="utf-8")
    for name, text in filled.items():
        page = page.replace(f"@{name}@", text)
    return page


def _rows(versions: Sequence[Version]) -> Iterator[str]:
    """The rows of the table of facts: one for each fact that any version has."""
    yield f"<tr><th></th>{''.join(f'<th>{html.escape(each.name)}</th>' for each in versions)}</tr>"
    for name in dict.fromkeys(name for each in versions for name, _ in each.facts):
        cells = (html.escape(dict(each.facts).get(name, "")) for each in versions)
        yield f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
