"""A VIDEO as a file that can be read more than once: its own file where it has one, else a lossless copy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from comfy_api.latest import InputImpl
from torch import Tensor

from ...flashvideo.atomic_files import write_whole
from ...flashvideo.errors import CommandError
from ...flashvideo.frames import clean, to_bytes
from ...flashvideo.video_files import VideoClip, VideoFormat, check_container

DIGEST_BYTES = 12
SAVED_AS_IT_IS = ".mp4"  # the kind of file that ComfyUI's Save Video makes, and so copies
_LARGEST_DENOMINATOR = 1001  # of a frame rate: nodes hand on 30000/1001 as 29.97002997...
_AAC_RATES = frozenset(av.Codec("aac", "w").audio_rates)
_SOUND_FRAME = 1024  # samples
_ANY_SIDE, _ANY_RATE = 16, Fraction(24)  # of pictures that don't matter


def source_file(video: Any, folder: Path) -> tuple[Path, bool]:
    """The file behind a VIDEO, and whether it is a copy: one in memory or of a part of a file goes into `folder`.

    The pictures of a copy are exact. Its name is a hash of its contents, so that it isn't written twice.
    """
    trim = getattr(video, "get_active_trim_window", None)  # newer than 0.3.75
    if isinstance(video, InputImpl.VideoFromFile) and not (trim and any(trim())):
        stream = video.get_stream_source()
        if isinstance(stream, str):
            return Path(stream), False
        data = stream.getbuffer()
        return _written(folder, _digest(data), ".video", lambda part: part.write_bytes(data)), True
    parts = video.get_components()
    pixels = to_bytes(clean(parts.images, "video")[0]).cpu()
    rate, sound = Fraction(parts.frame_rate).limit_denominator(_LARGEST_DENOMINATOR), _sound(parts.audio)
    facts = repr((pixels.shape, rate, sound and sound[1])).encode()
    digest = _digest(pixels.numpy(), facts, b"" if sound is None else sound[0].numpy())
    return _written(folder, digest, ".mp4", lambda part: _write(part, pixels, rate, sound)), True


def sound_suffix(path: Path) -> str:
    """The suffix of a file that can hold the sound of the one at `path` without encoding it again; .mp4 if possible.

    Raises CommandError if there is none.
    """
    # Whether sound fits doesn't depend on the pictures, so they are not read.
    clip = VideoClip(path, _ANY_SIDE, _ANY_SIDE, _ANY_RATE, 1 / _ANY_RATE, times=(0,), matrix=1)
    form = VideoFormat(clip, _ANY_SIDE, _ANY_SIDE)
    try:
        check_container(SAVED_AS_IT_IS, form)
    except CommandError:
        check_container(".mkv", form)
        return ".mkv"
    return SAVED_AS_IT_IS


def _digest(*parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part)
    return digest.hexdigest()


def _written(folder: Path, digest: str, suffix: str, write: Callable[[Path], object]) -> Path:
    path = folder / f"source-{digest}{suffix}"
    if not path.is_file():
        write_whole(path, write)
    return path


def _sound(audio: dict[str, Any] | None) -> tuple[Tensor, int] | None:
    """What can be written of an AUDIO: [channels, samples] in [-1, 1], the first two channels, and its rate.

    None where there is nothing. Raises ValueError for numbers that are not finite.
    """
    if audio is None or not audio["waveform"].numel():
        return None
    wave = audio["waveform"][0, :2].float().cpu()
    if not torch.isfinite(wave).all():
        raise ValueError("the video's sound holds numbers that are not finite (NaN); look at the node that made it")
    return wave, int(audio["sample_rate"])


def _write(path: Path, pixels: Tensor, rate: Fraction, sound: tuple[Tensor, int] | None) -> None:
    """An .mp4 of frames [T, H, W, 3] uint8, exactly, and of sound."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("png", rate=rate)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "rgb24"
        track = None
        if sound is not None:
            # AAC plays everywhere, but not at every rate.
            codec, layout = "aac" if sound[1] in _AAC_RATES else "flac", "mono" if len(sound[0]) == 1 else "stereo"
            track = container.add_stream(codec, rate=sound[1], layout=layout)
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        container.mux(stream.encode())
        if track is not None:
            _write_sound(container, track, *sound)


def _write_sound(container: av.container.OutputContainer, track: av.AudioStream, wave: Tensor, rate: int) -> None:
    for start in range(0, wave.shape[1], _SOUND_FRAME):
        piece = wave[:, start : start + _SOUND_FRAME].contiguous().numpy()
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=track.layout.name)
        frame.sample_rate, frame.pts = rate, start
        container.mux(track.encode(frame))
    container.mux(track.encode())
