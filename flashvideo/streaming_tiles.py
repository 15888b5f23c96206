"""The VAE as a stream over spatial tiles: neither the length nor the size of a video decides what the device must hold.

Every chunk passes over all tiles before the next one comes, as in `vae_tiles`, and what a tile leaves for the next
chunk waits in main memory. Gives what `VAEStream` gives, to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .config import SPATIAL_FACTOR, TEMPORAL_FACTOR
from .streaming import VAEStream
from .vae import DECODE_CHUNK, ENCODE_CHUNK, Decoder, Encoder
from .vae_memory import MOVE, TilePlan, plan_tiles
from .vae_tiles import Tile, TiledRun

STORE_SHARE = 4  # a quarter of the budget is for the whole picture between two groups of layers


class TiledVAEStream(VAEStream):
    """See `VAEStream`; the work is done on `device`, in tiles as `plan` says."""

    def __init__(self, network: Encoder | Decoder, sizes: Sequence[int], plan: TilePlan, device: torch.device) -> None:
        super().__init__(network, sizes)
        self._run = TiledRun(plan, device, next(network.parameters()).dtype)

    def _evaluate(self, chunk: Tensor) -> Tensor:
        decodes = isinstance(self.network, Decoder)
        latents = chunk.shape[2] if decodes else -(-chunk.shape[2] // TEMPORAL_FACTOR)
        frames = latents * TEMPORAL_FACTOR - (TEMPORAL_FACTOR - 1 if self._context.first else 0)
        channels = self.network.conv_out.conv.out_channels
        rows, columns = chunk.shape[3:]
        if decodes:
            shape = (1, channels, frames, rows * SPATIAL_FACTOR, columns * SPATIAL_FACTOR)
        else:
            shape = (1, channels, latents, rows // SPATIAL_FACTOR, columns // SPATIAL_FACTOR)
        result = torch.empty(shape, device=chunk.device, dtype=self._run.dtype)
        self._run.first, self._run.last = self._context.first, self._context.last
        self._run([chunk], [result], [chunk] if decodes else None, [latents])
        return result

    def state(self) -> dict[str, Tensor]:
        """What the chunks so far leave for the next, by tile and layer."""
        names = {module: name for name, module in self.network.named_modules()}
        return {
            " ".join([*map(str, (group, *tile)), names[module]]): tensor
            for (group, tile), past in self._run.past.items()
            for module, tensor in past.items()
        }

    def restore(self, done: int, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        """Go on after `done` chunks with what `state` gave then; it stays in main memory."""
        super().restore(done, {})
        self._run.past = {}
        for name, tensor in tensors.items():
            *numbers, layer = name.split(" ")
            group, *tile = map(int, numbers)
            self._run.past.setdefault((group, Tile(*tile)), {})[self.network.get_submodule(layer)] = tensor


def stream_within(
    network: Encoder | Decoder, sizes: Sequence[int], grid: tuple[int, int], budget: float | None, device: torch.device
) -> VAEStream:
    """A stream over latents of `grid` (h, w) that holds about `budget` bytes on the device: tiled if it has to be."""
    if budget is None:
        return VAEStream(network, sizes)
    chunk = (DECODE_CHUNK if isinstance(network, Decoder) else ENCODE_CHUNK // TEMPORAL_FACTOR) + 1
    latents = min(len(sizes), 2) * chunk  # more than one chunk: what they leave for each other counts
    dtype = next(network.parameters()).dtype
    move = 0.0 if torch.device(device).type == "cpu" else MOVE
    plan = plan_tiles(network, (latents, *grid), dtype, budget, budget / STORE_SHARE, move=move, by_chunk=True)
    if plan.side >= max(grid):
        return VAEStream(network, sizes)
    return TiledVAEStream(network, sizes, plan, device)
