"""TAECVX, a tiny autoencoder for the official VAE's latents: decodes approximately, in a fraction of the time.

The architecture is that of TAEHV (github.com/madebyollin/taehv): 2D convolutions over one frame each, which see of the
past only the frame before, at some layers. So a video can be decoded latent by latent. Parameter names are those of its
files. Only the decoder is here: what stage II refines should come from the official encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import SPATIAL_FACTOR, TEMPORAL_FACTOR

LATENT_CHANNELS = 16
WIDTHS = (256, 128, 64, 64)  # channels of the decoder's three levels, and of its last layer
TIME_STEPS = (1, 2, 2)  # frames that each level makes of one
UNITS = 5  # see tiny_bytes
LIMIT = 3.0  # latents are squashed to -3..3 first

State = dict[nn.Module, Tensor]  # the last frame that each layer with a memory has seen


class Squash(nn.Module):
    """Limits latents softly."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape, within -LIMIT..LIMIT."""
        return torch.tanh(x / LIMIT) * LIMIT


class MemoryBlock(nn.Module):
    """Three convolutions over a frame and the one before, beside a skip connection."""

    def __init__(self, width: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            operations.Conv2d(2 * width, width, 3, padding=1, **factory),
            nn.ReLU(),
            operations.Conv2d(width, width, 3, padding=1, **factory),
            nn.ReLU(),
            operations.Conv2d(width, width, 3, padding=1, **factory),
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Frames [T, C, H, W] and the frames before each -> [T, C, H, W]."""
        return F.relu(self.conv(torch.cat((x, before), dim=1)) + x)


class Grow(nn.Module):
    """One frame to `steps` frames."""

    def __init__(self, width: int, steps: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.steps = steps
        self.conv = operations.Conv2d(width, width * steps, 1, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """[T, C, H, W] -> [T * steps, C, H, W]."""
        return rearrange(self.conv(x), "t (steps c) h w -> (t steps) c h w", steps=self.steps)


class TinyDecoder(nn.Module):
    """Latents of the official VAE to video, approximately.

    For a cheaper preview levels can leave out their doubling of the size (`doublings` of 3 are done) or of the frames
    (`time_steps`). `operations` names the module that layers come from.
    """

    def __init__(
        self,
        doublings: int = 3,
        time_steps: tuple[int, int, int] = TIME_STEPS,
        *,
        operations: Any = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        operations = operations or nn
        layers: list[nn.Module] = [
            Squash(),
            operations.Conv2d(LATENT_CHANNELS, WIDTHS[0], 3, padding=1, **factory),
            nn.ReLU(),
        ]
        for level, (width, narrower, steps) in enumerate(zip(WIDTHS[:-1], WIDTHS[1:], time_steps, strict=True)):
            layers += [MemoryBlock(width, operations, **factory) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2 if level < doublings else 1)]
            layers += [Grow(width, steps, operations, **factory)]
            layers.append(operations.Conv2d(width, narrower, 3, padding=1, bias=False, **factory))
        layers += [nn.ReLU(), operations.Conv2d(WIDTHS[-1], 3, 3, padding=1, **factory)]
        self.decoder = nn.Sequential(*layers)

    def frames(self, latent: Tensor) -> Iterator[Tensor]:
        """Decode [16, T, h, w], in the VAE's own scale, latent by latent: [n, 3, 8h, 8w] in 0..1 each.

        The first latent gives one frame and every other four, as the official VAE has them.
        """
        state: State = {}
        for index, step in enumerate(latent.unbind(1)):
            made = self._advance(step[None], state).clamp(0, 1)
            yield made if index else made[-1:]

    def _advance(self, x: Tensor, state: State) -> Tensor:
        """The frames of the next latent [1, 16, h, w]."""
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                first = state.get(layer)
                before = torch.cat((torch.zeros_like(x[:1]) if first is None else first, x[:-1]))
                state[layer] = x[-1:]
                x = layer(x, before)
            else:
                x = layer(x)
        return x


def decode_tiny(
    decoder: TinyDecoder, latent: Tensor, into: Tensor, on_step: Callable[[int, int], None] | None = None
) -> Tensor:
    """Decode [B, 16, T, h, w] into `into` [B, 3, 4 (T - 1) + 1, 8h, 8w], values 0 to 1; returns it."""
    total, done = len(latent) * latent.shape[2], 0
    for video, clip in zip(into, latent, strict=True):
        place = 0
        for frames in decoder.frames(clip):
            video[:, place : place + len(frames)] = frames.transpose(0, 1)
            place += len(frames)
            done += 1
            if on_step is not None:
                on_step(done, total)
    return into


def tiny_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that decoding a latent of `shape` [B, 16, T, h, w] needs beside its result; T and B don't count.

    A unit is the frames of one latent at full size in the last level's width. 2.8 live at once; the rest is for what
    convolutions take while they run, which may copy their input of 2 units.
    """
    height, width = (SPATIAL_FACTOR * side for side in shape[-2:])
    return UNITS * TEMPORAL_FACTOR * WIDTHS[-1] * height * width * dtype.itemsize
