"""Small video files, and what is in one."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

SOUND_RATE = 44100
EXACT = 0x2 | 0x2000 | 0x40000  # swscale: bilinear, colour for every pixel, rounding


def make_video(
    path: Path,
    count: int,
    rate: Fraction = Fraction(24),
    size: tuple[int, int] = (32, 48),
    *,
    sound: str = "",
    times: list[int] | None = None,
    matrix: int = 5,
    full_range: bool = False,
    pixels: str = "",
    **options: str,
) -> Path:
    """Write a video of moving colour ramps; `times` in frames, where they aren't regular; `options` of x264."""
    height, width = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "1", **options})
        stream.height, stream.width = height, width
        stream.pix_fmt = pixels or ("yuv420p" if height % 2 == width % 2 == 0 else "yuv444p")
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 1 + full_range
        track = container.add_stream(sound, rate=SOUND_RATE) if sound else None
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(ramps(index, height, width), format="rgb24")
            frame = frame.reformat(
                format=stream.pix_fmt, src_colorspace=5, dst_colorspace=matrix,
                src_color_range=1, dst_color_range=1 + full_range, interpolation=EXACT,
            )  # fmt: skip
            frame.pts, frame.time_base = index if times is None else times[index], 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if track is not None:
            add_sound(container, track, float(count / rate))
    return path


def ramps(index: int, height: int, width: int) -> np.ndarray:
    """Frame number `index`, [height, width, 3] uint8: colours that differ from corner to corner."""
    red = np.broadcast_to(np.linspace(30, 220, width), (height, width))
    green = np.broadcast_to(np.linspace(20, 200, height)[:, None], (height, width))
    return np.stack([red, green, np.full((height, width), 40 + 5 * index % 150)], axis=-1).astype(np.uint8)


def add_sound(container: av.container.OutputContainer, track: av.AudioStream, seconds: float) -> None:
    """Write a tone."""
    wave = (np.sin(np.arange(int(seconds * SOUND_RATE)) / 20) * 20000).astype(np.int16)
    resampler = av.AudioResampler(format=track.format.name, layout=track.layout.name, rate=SOUND_RATE)
    for start in range(0, len(wave), 1024):
        frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="s16", layout="mono")
        frame.sample_rate, frame.pts = SOUND_RATE, start
        for piece in resampler.resample(frame):
            container.mux(track.encode(piece))
    container.mux(track.encode())


@dataclass
class Contents:
    """What a video file holds."""

    rate: Fraction
    times: list[Fraction]
    frames: list[np.ndarray]
    sound: list[tuple[bytes, Fraction, Fraction]]  # packets, when and how long


def read(path: Path) -> Contents:
    """Read a whole file."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoded = list(container.decode(stream))
        times = [frame.pts * stream.time_base for frame in decoded]
        frames = [frame.reformat(format="rgb24", dst_colorspace=5).to_ndarray() for frame in decoded]
        rate = stream.average_rate
    with av.open(str(path)) as container:
        packets = container.demux(audio=0) if container.streams.audio else ()
        sound = [(bytes(p), p.pts * p.time_base, p.duration * p.time_base) for p in packets if p.size]
    return Contents(rate, times, frames, sound)


def turn_clockwise(path: Path) -> None:
    """Tell players to turn an MP4's pictures by a quarter, as telephones do."""
    # The display matrix in the track's header, 16.16 fixed point: from none to a quarter turn clockwise.
    one = bytes([0, 1, 0, 0])
    none = one + bytes(12) + one + bytes(12) + bytes([0x40, 0, 0, 0])
    turn = bytes(4) + one + bytes(4) + bytes([255, 255, 0, 0]) + bytes(16) + bytes([0x40, 0, 0, 0])
    data = path.read_bytes()
    at = data.index(none, data.index(b"tkhd"))
    path.write_bytes(data[:at] + turn + data[at + len(turn) :])


def animation(path: Path, count: int, size: tuple[int, int] = (40, 60)) -> Path:
    """Write a lossless WebP whose frame number is its grey value divided by 10."""
    frames = [Image.new("RGB", size[::-1], (10 * index,) * 3) for index in range(count)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, lossless=True)
    return path
