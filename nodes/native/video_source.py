"""A VIDEO as a file that can be read more than once: its own file where it has one, else a lossless copy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from comfy_api.latest import InputImpl
from torch import Tensor

from ...flashvideo.errors import CommandError

DIGEST_BYTES = 12
MP4_SOUND = {"aac", "mp3", "ac3", "eac3", "opus", "flac", "alac"}  # what plays in an .mp4
_SOUND_FRAME = 1024  # samples


def source_file(video: Any, folder: Path) -> tuple[Path, bool]:
    """The file behind a VIDEO, and whether it is a copy: one in memory or of a part of a file goes into `folder`.

    The pictures of a copy are exact. Its name tells its contents, so that it isn't written twice.
    """
    trim = getattr(video, "get_active_trim_window", None)  # newer than 0.3.75
    if isinstance(video, InputImpl.VideoFromFile) and not (trim and any(trim())):
        stream = video.get_stream_source()
        if isinstance(stream, str):
            return Path(stream), False
        data = stream.getbuffer()
        return _written(folder, _digest(data), ".video", lambda part: part.write_bytes(data)), True
    parts = video.get_components()
    pixels = (parts.images[..., :3] * 255).round().byte()
    wave = None if parts.audio is None else parts.audio["waveform"][0]
    digest = _digest(pixels.numpy(), b"" if wave is None else wave.numpy(), repr(parts.frame_rate).encode())
    return _written(folder, digest, ".mov", lambda part: _write(part, pixels, parts.frame_rate, parts.audio)), True


def sound_suffix(path: Path) -> str:
    """The ending of a file that takes the sound of the one at `path` as it is. Raises CommandError."""
    try:
        with av.open(str(path)) as container:
            names = {stream.codec_context.name for stream in container.streams.audio}
    except (av.FFmpegError, OSError) as error:
        raise CommandError(f"{path} can't be read as a video: {error.strerror or error}.") from error
    return ".mp4" if names <= MP4_SOUND else ".mkv"


def _digest(*parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part)
    return digest.hexdigest()


def _written(folder: Path, digest: str, suffix: str, write: Callable[[Path], object]) -> Path:
    path = folder / f"source-{digest}{suffix}"
    if not path.is_file():
        part = path.with_name(f"part-{path.name}")
        write(part)
        part.replace(path)
    return path


def _write(path: Path, pixels: Tensor, rate: Any, audio: dict[str, Any] | None) -> None:
    """A .mov of frames [T, H, W, 3] uint8, exactly, and of sound."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=rate)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "rgb24"
        track = None
        if audio is not None:
            layout = "mono" if audio["waveform"].shape[1] == 1 else "stereo"
            track = container.add_stream("aac", rate=int(audio["sample_rate"]), layout=layout)
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        container.mux(stream.encode())
        if track is not None:
            _write_sound(container, track, audio["waveform"][0], int(audio["sample_rate"]))


def _write_sound(container: av.container.OutputContainer, track: av.AudioStream, wave: Tensor, rate: int) -> None:
    """Sound [channels, samples] in [-1, 1]; of more than two channels the first two."""
    wave = wave[:2].float().cpu()
    for start in range(0, wave.shape[1], _SOUND_FRAME):
        piece = wave[:, start : start + _SOUND_FRAME].contiguous().numpy()
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=track.layout.name)
        frame.sample_rate, frame.pts = rate, start
        container.mux(track.encode(frame))
    container.mux(track.encode())
