"""Lossy compression of pictures and videos in memory, for its traces: blocks, ringing, lost texture.

PyAV is imported when a video codec is first used; JPEG needs only Pillow.
"""

from __future__ import annotations

import importlib
import io
import types

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from ..errors import TrainingError

FRAME_RATE = 24  # only for the encoder's rate control
MAX_CRF = 51  # x264's scale: 0 is lossless
MAX_QUANTISER = 31  # MPEG-4's scale: 1 is the finest
_THREADS = "1"  # data are made in several processes; and the result doesn't depend on the machine's cores
_STEADY_X264 = "mbtree=0"  # else no two results are the same for some widths: see video_files/encoding.py
_KEY_EVERY = 12  # frames between whole pictures of MPEG-4, FFmpeg's own default


def compress_jpeg(video: Tensor, quality: int) -> Tensor:
    """Each frame of [3, T, H, W] in [-1, 1] through JPEG at `quality`, 1 (worst) to 95, colours at half size."""
    if not 1 <= quality <= 95:
        raise ValueError(f"JPEG quality is 1 to 95; got {quality}")
    frames = []
    for frame in _to_bytes(video):
        with io.BytesIO() as file:
            Image.fromarray(frame).save(file, format="JPEG", quality=quality)
            frames.append(np.asarray(Image.open(file)))
    return _to_video(np.stack(frames), video)


def compress_h264(video: Tensor, crf: int) -> Tensor:
    """[3, T, H, W] in [-1, 1] through x264 at a constant rate factor: 18 is fine, 51 the worst.

    Raises TrainingError if PyAV or its x264 is missing.
    """
    if not 0 <= crf <= MAX_CRF:
        raise ValueError(f"crf is 0 to {MAX_CRF}; got {crf}")
    return _through_codec(video, "libx264", {"crf": str(crf), "preset": "veryfast", "x264-params": _STEADY_X264})


def compress_mpeg4(video: Tensor, quantiser: int) -> Tensor:
    """[3, T, H, W] in [-1, 1] through MPEG-4 (part 2) at a fixed quantiser: 2 is fine, 31 the worst.

    Raises TrainingError if PyAV is missing.
    """
    if not 1 <= quantiser <= MAX_QUANTISER:
        raise ValueError(f"the quantiser is 1 to {MAX_QUANTISER}; got {quantiser}")
    # FFmpeg's own option for it, "qscale", is set on every frame, which PyAV can't.
    fixed = {"qmin": str(quantiser), "qmax": str(quantiser), "g": str(_KEY_EVERY)}
    return _through_codec(video, "mpeg4", fixed)


def _through_codec(video: Tensor, codec: str, options: dict[str, str]) -> Tensor:
    height, width = video.shape[-2:]
    # Colours at half size need even sides.
    padded = F.pad(video, (0, width % 2, 0, height % 2), mode="replicate")
    with io.BytesIO() as file:
        _encode(_to_bytes(padded), file, codec, options)
        file.seek(0)
        frames = _decode(file)
    if len(frames) != video.shape[1]:
        raise TrainingError(f"The video codec {codec} gave {len(frames)} of {video.shape[1]} frames back.")
    return _to_video(np.stack(frames)[:, :height, :width], video)


def _encode(frames: np.ndarray, file: io.BytesIO, codec: str, options: dict[str, str]) -> None:
    av = _pyav()
    with av.open(file, "w", format="matroska") as container:
        try:
            stream = container.add_stream(codec, rate=FRAME_RATE, options={"threads": _THREADS, **options})
        except av.FFmpegError as problem:
            raise TrainingError(
                f"This PyAV has no video encoder {codec}. Another build of it has: `pip install av`; or set the "
                "probability of video compression to 0."
            ) from problem
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _decode(file: io.BytesIO) -> list[np.ndarray]:
    with _pyav().open(file) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def _pyav() -> types.ModuleType:
    try:
        return importlib.import_module("av")
    except ModuleNotFoundError as problem:
        raise TrainingError(
            "Degrading videos by compression needs PyAV: `pip install av`; or set the probability of video "
            "compression to 0."
        ) from problem


def _to_bytes(video: Tensor) -> np.ndarray:
    """[3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3]."""
    levels = ((video.float().clamp(-1, 1) + 1) * 127.5).round()
    return rearrange(levels.byte(), "c t h w -> t h w c").contiguous().cpu().numpy()


def _to_video(frames: np.ndarray, like: Tensor) -> Tensor:
    """Uint8 [T, H, W, 3] -> [3, T, H, W] in [-1, 1], on the device and of the type of `like`."""
    video = rearrange(torch.from_numpy(np.ascontiguousarray(frames)), "t h w c -> c t h w")
    return (video.to(like.device) / 127.5 - 1).to(like)
