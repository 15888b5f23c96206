"""The VAE over spatial tiles that give what the whole picture gives, to rounding: no seam, whatever the tile size.

Two things tie a place of the picture to the rest of it. Convolutions look a few pixels around: tiles reach as far
beyond their own place as the layers ahead look, and are cut down layer by layer. And each norm measures the whole
picture: here the tiles measure it together. A group of units passes over all tiles once for each of its norms, up to
that norm, whose statistics are summed up over the tiles, and once more for the result. Groups are as short as memory
for storing whole pictures between them allows: of one residual block each, the work is 1.5 times that of the untiled
network; the longer the groups, the more is repeated.

Statistics from a sample or a smaller copy of the picture would need one pass less, but a trained decoder is
sensitive to them: estimated from an eighth of the picture they put clips off by 0.8 to 2.7/255 on average, and
measuring again with the estimates in place doesn't converge.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import SPATIAL_FACTOR, TEMPORAL_FACTOR
from .vae import Posterior, Unit, VideoVAE, decode_chunks, encode_chunks
from .vae_layers import ChunkContext, Statistics, group_statistics
from .vae_memory import SMALLEST_TILE, TilePlan, reaches

OnStep = Callable[[int, int], None]


class Tile(NamedTuple):
    """A rectangle of the picture in latent pixels."""

    top: int
    bottom: int
    left: int
    right: int

    def grown(self, reach: int, whole: Tile) -> Tile:
        """This rectangle and `reach` more on every side, as far as the picture goes."""
        return Tile(
            max(whole.top, self.top - reach),
            min(whole.bottom, self.bottom + reach),
            max(whole.left, self.left - reach),
            min(whole.right, self.right + reach),
        )

    def cut(self, x: Tensor, around: Tile) -> Tensor:
        """This part of x [..., H, W], which shows `around` at any whole number of positions to a latent pixel."""
        scale = x.shape[-1] // (around.right - around.left)
        rows = slice((self.top - around.top) * scale, (self.bottom - around.top) * scale)
        columns = slice((self.left - around.left) * scale, (self.right - around.left) * scale)
        return x[..., rows, columns]

    def split(self, side: int) -> list[Tile]:
        """Nearly equal parts that are at most `side` long."""
        rows, columns = _parts(self.top, self.bottom, side), _parts(self.left, self.right, side)
        return [Tile(*row, *column) for row in rows for column in columns]


class Moments(NamedTuple):
    """Statistics of `count` positions."""

    count: int
    mean: Tensor
    variance: Tensor

    def joined(self, other: Moments) -> Moments:
        """Those of both together."""
        count = self.count + other.count
        share = other.count / count
        apart = other.mean - self.mean
        variance = self.variance + (other.variance - self.variance) * share + apart**2 * (share * (1 - share))
        return Moments(count, self.mean + apart * share, variance)


class _Measured(Exception):
    """A tile has come to the first norm whose statistics aren't known."""

    def __init__(self, moments: Moments) -> None:
        super().__init__()
        self.moments = moments


class _Norms:
    """Answers the norms of one chunk of a tile in their order; stops the run at the first unknown one."""

    def __init__(self, known: Sequence[Statistics], tile: Tile) -> None:
        self.known, self.tile, self.area = iter(known), tile, tile

    def __call__(self, layer: nn.Module, x: Tensor) -> Statistics:
        statistics = next(self.known, None)
        if statistics is not None:
            return statistics
        own = self.tile.cut(x, self.area)
        raise _Measured(Moments(own[0, 0].numel(), *group_statistics(own, layer.num_groups)))


class TiledRun:
    """One half of the VAE over the tiles of a video's chunks.

    `device` and `dtype` are those of the work; what is stored between groups lies where the results lie. `on_step`
    gets (done, total) after every chunk of every tile, and may raise to stop. Where `is_out_of_memory` says so of an
    exception, tiles are halved from there on; whatever other tiles have done stays.
    """

    def __init__(
        self,
        plan: TilePlan,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        on_step: OnStep | None = None,
        is_out_of_memory: Callable[[Exception], bool] = lambda _error: False,
        videos: int = 1,
    ) -> None:
        self.plan, self.side, self.videos = plan, plan.side, videos
        self.device, self.dtype = device, dtype
        self.on_step, self.is_out_of_memory = on_step, is_out_of_memory
        self.whole = Tile(0, 0, 0, 0)
        self.done = self.total = 0

    def __call__(
        self, chunks: Sequence[Tensor], results: Sequence[Tensor], latents: Sequence[Tensor] | None, sizes: list[int]
    ) -> None:
        """Run the chunks [1, C, t, H, W] of one video into `results`, tensors of the right shapes.

        `latents` are the decoder's chunks again, which its norms look at; `sizes` are the chunks' latent frames.
        """
        smaller = min((chunks[0], results[0]), key=lambda x: x.shape[-1])
        self.whole = Tile(0, smaller.shape[-2], 0, smaller.shape[-1])
        for index, group in enumerate(self.plan.groups):
            last = index == len(self.plan.groups) - 1
            targets = results if last else self._storage(group[-1], results[0].device, sizes)
            self._run_group(index, chunks, targets, latents)
            chunks = targets

    def _storage(self, unit: Unit, device: torch.device, sizes: Sequence[int]) -> list[Tensor]:
        rows, columns = (length * unit.out_scale for length in (self.whole.bottom, self.whole.right))
        frames = [size * unit.out_time for size in sizes]
        frames[0] -= unit.out_time - 1  # a video's first latent frame stands for one frame
        shapes = [(1, unit.channels, count, rows, columns) for count in frames]
        return [torch.empty(shape, device=device, dtype=self.dtype) for shape in shapes]

    def _run_group(
        self, index: int, chunks: Sequence[Tensor], targets: Sequence[Tensor], latents: Sequence[Tensor] | None
    ) -> None:
        """Pass over the tiles once for each norm, and once more for the result."""
        group = self.plan.groups[index]
        known: list[list[Statistics]] = [[] for _ in chunks]
        for sweep in range(self._sweeps(group)):
            self.total = self.done + self._steps_left(index, sweep, len(chunks))
            sums: list[Moments] | None = None
            waiting = deque(self.whole.split(self.side))
            while waiting:
                tile = waiting.popleft()
                measured = self._try_tile(group, tile, known, chunks, targets, latents)
                if measured is None:
                    waiting = deque(part for larger in (tile, *waiting) for part in larger.split(self.side))
                elif measured:
                    sums = measured if sums is None else [a.joined(b) for a, b in zip(sums, measured, strict=True)]
            for statistics, total in zip(known, sums or (), strict=False):
                statistics.append(Statistics(total.mean, total.variance))

    def _sweeps(self, group: Sequence[Unit]) -> int:
        return 1 if self.side >= max(self.whole) else sum(unit.norms for unit in group) + 1

    def _steps_left(self, index: int, sweep: int, chunks: int) -> int:
        sweeps = sum(self._sweeps(group) for group in self.plan.groups)
        before = sum(self._sweeps(group) for group in self.plan.groups[:index]) + sweep
        left = sweeps - before
        if index == sweep == 0:
            left = sweeps * self.videos
            self.videos -= 1
        return left * chunks * len(self.whole.split(self.side))

    def _try_tile(self, group: Sequence[Unit], tile: Tile, *work: object) -> list[Moments] | None:
        """What `_run_tile` returns; None if memory ran out, and then `side` is smaller than the tile."""
        done = self.done
        try:
            return self._run_tile(group, tile, *work)
        except Exception as error:
            longest = max(tile.bottom - tile.top, tile.right - tile.left)
            if not self.is_out_of_memory(error) or longest <= SMALLEST_TILE:
                raise
            self.side = max(SMALLEST_TILE, (longest + 1) // 2)
            self.done = done
        return None

    def _run_tile(
        self,
        group: Sequence[Unit],
        tile: Tile,
        known: Sequence[Sequence[Statistics]],
        chunks: Sequence[Tensor],
        targets: Sequence[Tensor],
        latents: Sequence[Tensor] | None,
    ) -> list[Moments]:
        """Run a tile's chunks to their first unknown norm, and return its moments; or write the result."""
        context = ChunkContext()
        measured = []
        for number, chunk in enumerate(chunks):
            context.last = number == len(chunks) - 1
            latent = None if latents is None else latents[number]
            moments = self._run_piece(group, tile, known[number], chunk, targets[number], latent, context)
            if moments is not None:
                measured.append(moments)
            context.first = False
            self.done += 1
            if self.on_step is not None:
                self.on_step(self.done, max(self.done, self.total))
        return measured

    def _run_piece(
        self,
        group: Sequence[Unit],
        tile: Tile,
        known: Sequence[Statistics],
        chunk: Tensor,
        target: Tensor,
        latent: Tensor | None,
        context: ChunkContext,
    ) -> Moments | None:
        """Run a chunk of a tile to its first unknown norm, and return its moments; or write the result."""
        norms = _Norms(known, tile)
        context.statistics = None if tile == self.whole else norms  # the only tile measures for itself
        try:
            tile.cut(target, self.whole).copy_(self._run_chunk(group, norms, chunk, latent, context))
        except _Measured as found:
            return found.moments
        return None

    def _run_chunk(
        self, group: Sequence[Unit], norms: _Norms, chunk: Tensor, latent: Tensor | None, context: ChunkContext
    ) -> Tensor:
        x, around = chunk, self.whole
        for unit, reach in zip(group, reaches(group), strict=True):
            area = norms.area = norms.tile.grown(reach, self.whole)
            x = area.cut(x, around)
            if around == self.whole:
                x = x.to(self.device, self.dtype)
            z = None if latent is None else area.cut(latent, self.whole).to(self.device, self.dtype)
            x = unit.run(x, z, context)
            around = area
        return norms.tile.cut(x, around)


def decode_in_tiles(
    vae: VideoVAE, latent: Tensor, plan: TilePlan, video: Tensor, device: torch.device | str, **options: Any
) -> Tensor:
    """Decode a latent [B, 16, n + 1, h, w] into `video` [B, 3, 4n + 1, 8h, 8w]; see `TiledRun` for the options.

    Equal to `VideoVAE.decode` to rounding, and chunked in time like it. `video` may lie on another device.
    """
    sizes = decode_chunks(latent.shape[2])
    run = TiledRun(plan, device, vae.dtype, videos=len(latent), **options)
    frames = [size * TEMPORAL_FACTOR for size in sizes]
    frames[0] -= TEMPORAL_FACTOR - 1
    for one, result in zip(latent.split(1), video.split(1), strict=True):
        chunks = one.split(sizes, dim=2)
        run(chunks, result.split(frames, dim=2), chunks, sizes)
    return video


def encode_in_tiles(
    vae: VideoVAE, video: Tensor, plan: TilePlan, device: torch.device | str, **options: Any
) -> Posterior:
    """Encode a video [B, 3, 4n + 1, H, W], which may lie on another device; see `TiledRun` for the options.

    Equal to `VideoVAE.encode` to rounding, and chunked in time like it. The result lies where the video lies.
    """
    frames = encode_chunks(video.shape[2])
    sizes = [-(-count // TEMPORAL_FACTOR) for count in frames]
    run = TiledRun(plan, device, vae.dtype, videos=len(video), **options)
    rows, columns = (length // SPATIAL_FACTOR for length in video.shape[3:])
    shape = (len(video), 2 * vae.config.latent_channels, sum(sizes), rows, columns)
    moments = torch.empty(shape, device=video.device, dtype=vae.dtype)
    for one, result in zip(video.split(1), moments.split(1), strict=True):
        run(one.split(frames, dim=2), result.split(sizes, dim=2), None, sizes)
    return Posterior(*moments.chunk(2, dim=1))


def _parts(start: int, stop: int, side: int) -> list[tuple[int, int]]:
    count = -(-(stop - start) // side)
    edges = [start + (stop - start) * index // count for index in range(count + 1)]
    return list(pairwise(edges))
