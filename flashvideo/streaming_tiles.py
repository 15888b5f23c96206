"""The VAE as a stream over spatial tiles: neither the length nor the size of a video decides what the device must hold.

Every chunk passes over all tiles before the next one comes, as in `vae_tiles`, and what a tile leaves for the next
chunk waits in main memory. Gives what `VAEStream` gives, to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .config import SPATIAL_FACTOR, TEMPORAL_FACTOR
from .streaming import VAEStream
from .vae import DECODE_CHUNK, ENCODE_CHUNK, Decoder, Encoder, Unit
from .vae_layers import ChunkContext, Statistics
from .vae_memory import TilePlan, plan_tiles
from .vae_tiles import Moments, Tile, TiledRun

STORE_SHARE = 4  # a quarter of the budget is for the whole picture between two groups of layers


class TiledVAEStream(VAEStream):
    """See `VAEStream`; the work is done on `device`, in tiles as `plan` says."""

    def __init__(self, network: Encoder | Decoder, sizes: Sequence[int], plan: TilePlan, device: torch.device) -> None:
        super().__init__(network, sizes)
        self._run = _OneChunk(plan, device, next(network.parameters()).dtype)

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


class _OneChunk(TiledRun):
    """One chunk over all tiles, with what the chunks before it have left."""

    first = last = False
    group = 0

    def __init__(self, plan: TilePlan, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(plan, device, dtype)
        self.past: dict[tuple[int, Tile], dict[nn.Module, Tensor]] = {}

    def _storage(self, unit: Unit, device: torch.device, sizes: Sequence[int]) -> list[Tensor]:
        if self.first:
            return super()._storage(unit, device, sizes)
        rows, columns = (length * unit.out_scale for length in (self.whole.bottom, self.whole.right))
        shape = (1, unit.channels, sizes[0] * unit.out_time, rows, columns)
        return [torch.empty(shape, device=device, dtype=self.dtype)]

    def _run_group(self, index: int, *work: object) -> None:
        self.group = index
        super()._run_group(index, *work)

    def _run_tile(
        self,
        group: Sequence[Unit],
        tile: Tile,
        known: Sequence[Sequence[Statistics]],
        chunks: Sequence[Tensor],
        targets: Sequence[Tensor],
        latents: Sequence[Tensor] | None,
    ) -> list[Moments]:
        """Run the chunk to its first unknown norm, and return the tile's moments; or write the result."""
        before = self.past.get((self.group, tile), {})
        context = ChunkContext(self.first, self.last, past={key: past.to(self.device) for key, past in before.items()})
        latent = None if latents is None else latents[0]
        moments = self._run_piece(group, tile, known[0], chunks[0], targets[0], latent, context)
        if moments is not None:
            return [moments]
        self.past[self.group, tile] = {key: past.cpu() for key, past in context.past.items()}
        return []


def stream_within(
    network: Encoder | Decoder, sizes: Sequence[int], grid: tuple[int, int], budget: float | None, device: torch.device
) -> VAEStream:
    """A stream over latents of `grid` (h, w) that holds about `budget` bytes on the device: tiled if it has to be."""
    if budget is None:
        return VAEStream(network, sizes)
    chunk = (DECODE_CHUNK if isinstance(network, Decoder) else ENCODE_CHUNK // TEMPORAL_FACTOR) + 1
    latents = min(len(sizes), 2) * chunk  # more than one chunk: what they leave for each other counts
    dtype = next(network.parameters()).dtype
    plan = plan_tiles(network, (latents, *grid), dtype, budget, budget / STORE_SHARE)
    if plan.side >= max(grid):
        return VAEStream(network, sizes)
    return TiledVAEStream(network, sizes, plan, device)
