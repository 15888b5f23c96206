"""HDR: curves between stored brightness and what the networks were trained on, and facts about the master's display.

The networks know ordinary video. HLG is made to be seen on an ordinary screen, and goes in as it is. PQ stores up to
10,000 nits, and OpenEXR light without a limit: taken as ordinary video they are grey and flat, or cut off. So they go
in through a curve that ends where they do, and come out through its inverse.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import av
import torch
from torch import Tensor

from .orientation import side_data

PQ, HLG = "PQ", "HLG"
CURVES = {16: PQ, 18: HLG}  # by FFmpeg's numbers of the transfer curves
# SMPTE ST 2084 (PQ).
_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
_WHITE = 203.0  # nits of white paper (ITU-R BT.2408)
_PEAK = 10_000.0 / _WHITE  # PQ's, where white paper is 1
_GAMMA = 2.4  # of an ordinary screen
_WHITE_LEVEL = 0.75  # as in HLG: a quarter of the range is for highlights
_SLOPE = _WHITE_LEVEL / _GAMMA
_LEAST_PEAK = 4.0  # below, a logarithm would be straighter than a line
_MASTERING, _LIGHT = "MASTERING_DISPLAY_METADATA", "CONTENT_LIGHT_LEVEL"
_DYNAMIC = "DYNAMIC_HDR_PLUS", "DYNAMIC_HDR_VIVID", "DOVI_METADATA", "DOVI_RPU_BUFFER"
_RATIOS = struct.Struct("=" + "ii" * 10 + "ii")  # FFmpeg's AVMasteringDisplayMetadata: 10 fractions, 2 switches
_LEVELS = struct.Struct("=II")
SCREEN_UNITS = 50_000, 10_000  # of chromaticities and nits, as H.264 and HEVC store them


@cache
def _knee(peak: float) -> float:
    """How fast the logarithm bends: the solution of k log(1 + (peak - 1) slope / k) = 1 - white level."""
    low, high = 1e-4, 10.0
    for _ in range(80):
        middle = (low + high) / 2
        reached = middle * math.log1p((peak - 1) * _SLOPE / middle)
        low, high = (low, middle) if reached > 1 - _WHITE_LEVEL else (middle, high)
    return low


def light_to_sdr(light: Tensor, peak: float) -> Tensor:
    """Light, where white paper is 1, as an ordinary screen shows it, in [0, 1]; rises up to `peak`.

    An ordinary screen's gamma; if `peak` is above 1, only up to white, at three quarters of the range, and from there
    on a logarithm with the same slope there, which reaches 1 at the peak (or at 4, if that is more).
    """
    light = light.double().clamp_min(0)
    if peak <= 1:
        return light.clamp_max(1) ** (1 / _GAMMA)
    knee = _knee(max(peak, _LEAST_PEAK))
    dark = _WHITE_LEVEL * light.clamp_max(1) ** (1 / _GAMMA)
    bright = _WHITE_LEVEL + knee * torch.log1p((light - 1).clamp_min(0) * _SLOPE / knee)
    return torch.where(light < 1, dark, bright).clamp_max(1)


def sdr_to_light(shown: Tensor, peak: float) -> Tensor:
    """The inverse of `light_to_sdr`."""
    level = shown.double().clamp(0, 1)
    if peak <= 1:
        return level**_GAMMA
    knee = _knee(max(peak, _LEAST_PEAK))
    dark = (level.clamp_max(_WHITE_LEVEL) / _WHITE_LEVEL) ** _GAMMA
    bright = 1 + torch.expm1((level - _WHITE_LEVEL).clamp_min(0) / knee) * knee / _SLOPE
    return torch.where(level < _WHITE_LEVEL, dark, bright)


def pq_to_sdr(stored: Tensor) -> Tensor:
    """PQ's numbers in [0, 1] as an ordinary screen shows them, [0, 1]; see `sdr_to_pq`."""
    root = stored.double().clamp(0, 1) ** (1 / _M2)
    light = ((root - _C1).clamp_min(0) / (_C2 - _C3 * root)) ** (1 / _M1)
    return light_to_sdr(light * _PEAK, _PEAK).to(stored.dtype)


def sdr_to_pq(shown: Tensor) -> Tensor:
    """The inverse of `pq_to_sdr`."""
    power = (sdr_to_light(shown, _PEAK) / _PEAK).clamp(0, 1) ** _M1
    return (((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2).clamp(0, 1).to(shown.dtype)


@dataclass(frozen=True)
class Mastering:
    """What a file says of the screen that it was made on, and of its brightest frames.

    `screen`: chromaticities (x, y) of red, green, blue and white, then the largest and the smallest brightness in
    nits; `brightest`: nits of the brightest pixel, and of the frame with the brightest mean.
    """

    screen: tuple[Fraction, ...] | None = None
    brightest: tuple[int, int] | None = None

    def screen_text(self, chroma: int = 1, nits: int = 1) -> str:
        """As encoders take it: in whole units of 1 / `chroma` and 1 / `nits`, or as decimal numbers."""
        scaled = [each * chroma for each in self.screen[:8]] + [each * nits for each in self.screen[8:]]
        red, green, blue, white, light = zip(scaled[::2], scaled[1::2], strict=True)
        number = "{:.0f}" if chroma > 1 else "{:.5f}"
        return "".join(
            f"{name}({number.format(float(x))},{number.format(float(y))})"
            for name, (x, y) in (("G", green), ("B", blue), ("R", red), ("WP", white), ("L", light))
        )


def mastering_of(frame: av.VideoFrame, codec: str) -> Mastering:
    """What the side data of a frame of a codec say. See FFmpeg's libavutil/mastering_display_metadata.h."""
    screen = brightest = None
    if (data := side_data(frame, _MASTERING, codec)) is not None and len(data) >= _RATIOS.size:
        *numbers, has_primaries, has_luminance = _RATIOS.unpack(data[: _RATIOS.size])
        pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        if has_primaries and has_luminance and all(below for _, below in pairs):
            *chromaticities, least, most = (Fraction(*pair) for pair in pairs)
            screen = (*chromaticities, most, least)
    if (data := side_data(frame, _LIGHT, codec)) is not None and len(data) >= _LEVELS.size:
        brightest = _LEVELS.unpack(data[: _LEVELS.size])
    return Mastering(screen, brightest if brightest and any(brightest) else None)


def has_dynamic_metadata(frame: av.VideoFrame, codec: str) -> bool:
    """Whether a frame comes with HDR facts of its own, as in HDR10+ and Dolby Vision."""
    return any(side_data(frame, name, codec) is not None for name in _DYNAMIC)
