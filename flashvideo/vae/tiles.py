"""The VAE in spatial tiles. The result equals the whole picture's to rounding: no seam, whatever the tile size.

Two things connect a pixel to the rest of the picture. Convolutions read a few pixels around it: tiles reach beyond
their own area by as much as the following layers read, and are cropped layer by layer. And each norm measures the whole
picture: here the tiles measure it together. A group of units runs over all tiles once for each of its norms, up to that
norm, whose statistics are summed over the tiles, and once more for the result, which is measured for the next group
while it is written. Where memory allows storing the picture after every convolution, only overlaps are computed twice;
the longer the groups, the more is repeated (see `memory`).

Statistics of a sample or of a smaller copy of the picture would save one pass, but a trained decoder is sensitive to
them: estimated from an eighth of the picture, clips are off by 0.8 to 2.7/255 on average, and measuring again with the
estimates in place doesn't converge.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import count, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import latent_frames, latent_shape, video_frames
from .layers import ChunkContext, Statistics, group_statistics
from .memory import SMALLEST_TILE_LATENT, TilePlan, reaches, runs_in_place
from .network import Posterior, Unit, VideoVAE, decode_chunks, encode_chunks

OnStep = Callable[[int, int], None]
MAIN_MEMORY = torch.device("cpu")


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

    def is_in(self, other: Tile) -> bool:
        """Whether this is a part of the other, or all of it."""
        return self == self.grown(0, other) and self.top < other.bottom and self.left < other.right

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
        together = self.count + other.count
        share = other.count / together
        apart = other.mean - self.mean
        variance = self.variance + (other.variance - self.variance) * share + apart**2 * (share * (1 - share))
        return Moments(together, self.mean + apart * share, variance)


class _Measured(Exception):
    """A tile has reached the first norm whose statistics aren't known."""

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
        raise _Measured(measure(self.tile.cut(x, self.area), layer.num_groups))


def measure(x: Tensor, groups: int) -> Moments:
    """Moments of each norm group of x [B, C, T, H, W]."""
    return Moments(x[0, 0].numel(), *group_statistics(x, groups))


class GroupJob(NamedTuple):
    """One group's work: what it reads and where its result goes, a tensor [1, C, t, H, W] for each chunk."""

    index: int
    chunks: Sequence[Tensor]
    beside: Sequence[Tensor] | None  # what the group before read, if this one adds it up
    latents: Sequence[Tensor] | None  # the decoder's, for its norms
    targets: Sequence[Tensor]


class TiledRun:
    """One half of the VAE over the tiles of a video's chunks.

    The work is done on `device` in `dtype`; what is stored between groups is in main memory. `on_step(done, total)` is
    called after every chunk of every tile, and may raise to stop. Where `is_out_of_memory` is true of an exception,
    tiles are halved from there on; what other tiles have finished stays.

    If chunks come in several calls, `first` and `last` mark the video's first and last, and `past` holds what tiles
    keep for the next call.
    """

    def __init__(
        self,
        plan: TilePlan,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        on_step: OnStep | None = None,
        is_out_of_memory: Callable[[Exception], bool] = lambda _error: False,
        calls: int = 1,
    ) -> None:
        self.plan, self.side, self.calls = plan, plan.side, calls
        self.device, self.dtype = device, dtype
        self.on_step, self.is_out_of_memory = on_step, is_out_of_memory
        self.first = self.last = True
        self.past: dict[tuple[int, Tile], dict[nn.Module, Tensor]] = {}  # by group and tile
        self.whole = Tile(0, 0, 0, 0)
        self.tiles: list[Tile] = []  # halved ones are parts of those before: what these have left can be cut for them
        self.done = self.total = 0
        self.reach: dict[nn.Module, int] = {}  # how far beyond its tile a layer's past goes

    def __call__(
        self, chunks: Sequence[Tensor], results: Sequence[Tensor], latents: Sequence[Tensor] | None, sizes: list[int]
    ) -> None:
        """Run the chunks [1, C, t, H, W] of one video into `results`, tensors of the right shapes.

        `latents` are the decoder's chunks again, which its norms look at; `sizes` are the chunks' latent frames.
        """
        smaller = min((chunks[0], results[0]), key=lambda x: x.shape[-1])
        self.whole = Tile(0, smaller.shape[-2], 0, smaller.shape[-1])
        if self.first:
            self.past = {}
        if self.first or not self.tiles:
            self.tiles = self.whole.split(self.side)
        groups, beside, statistics = self.plan.groups, None, None
        for index, (group, follower) in enumerate(zip(groups, [*groups[1:], None], strict=True)):
            if follower is None:
                targets = results
            elif self.plan.by_chunk and runs_in_place(group):
                targets = beside
            else:
                targets = self._storage(group[-1], sizes)
            statistics = self._run_group(GroupJob(index, chunks, beside, latents, targets), statistics)
            beside = chunks if follower is not None and follower[0].joins else None
            chunks = targets
        self.calls -= 1

    def _storage(self, unit: Unit, sizes: Sequence[int]) -> list[Tensor]:
        rows, columns = (length * unit.out_scale for length in (self.whole.bottom, self.whole.right))
        frames = [size * unit.out_time for size in sizes]
        if self.first:
            frames[0] -= unit.out_time - 1  # a video's first latent frame stands for one frame
        shapes = [(1, unit.channels, count, rows, columns) for count in frames]
        return [torch.empty(shape, device=MAIN_MEMORY, dtype=self.dtype) for shape in shapes]

    def _run_group(self, job: GroupJob, statistics: list[Statistics] | None) -> list[Statistics] | None:
        """Pass over the tiles once for each unknown norm, and once more for the result.

        `statistics` are those of the chunks that come in, if they have been measured. Returns those of the result if
        the next group asks for them.
        """
        known = [[] for _ in job.chunks] if statistics is None else [[each] for each in statistics]
        for sweep in count():
            self.total = self.done + self._steps_left(job, sweep, statistics is not None)
            sums: list[Moments] | None = None
            waiting, written, is_written = deque(self.own_tiles()), set(), False
            while waiting:
                tile = waiting.popleft()
                outcome = self._try_tile(job, tile, known)
                if outcome is None:
                    waiting = deque(part for larger in (tile, *waiting) for part in larger.split(self.side))
                    self.tiles = [part for larger in self.tiles for part in larger.split(self.side)]
                    continue
                written.add(tile)
                is_written, measured = outcome
                if measured:
                    sums = measured if sums is None else [a.joined(b) for a, b in zip(sums, measured, strict=True)]
            sums = None if sums is None else self._of_all_tiles(sums)
            found = None if sums is None else [Statistics(total.mean, total.variance) for total in sums]
            if is_written:
                self._after_writing(job)
                # What larger tiles left before they were halved has been used up.
                kept = () if self.last else written
                for key in [(group, old) for group, old in self.past if group == job.index and old not in kept]:
                    del self.past[key]
                return found
            for each, new in zip(known, found or (), strict=True):
                each.append(new)

    def own_tiles(self) -> list[Tile]:
        """The tiles that are worked on here; of several processes each has its own."""
        return self.tiles

    def _of_all_tiles(self, sums: list[Moments]) -> list[Moments]:
        """The moments of all tiles from those of the own ones."""
        return sums

    def _after_writing(self, job: GroupJob) -> None:
        """Runs when the own tiles of a group's result are written."""

    def _steps_left(self, job: GroupJob, sweep: int, is_measured: bool) -> int:
        ahead = [self._sweeps(index, index > 0) for index in range(len(self.plan.groups))]
        left = sum(ahead[job.index + 1 :]) + self._sweeps(job.index, is_measured) - sweep
        return (left + sum(ahead) * (self.calls - 1)) * len(job.chunks) * len(self.own_tiles())

    def _sweeps(self, index: int, is_measured: bool) -> int:
        group = self.plan.groups[index]
        if self.side >= max(self.whole):
            return 1
        return sum(unit.norms for unit in group) + 1 - (group[0].norms if is_measured else 0)

    def _try_tile(
        self, job: GroupJob, tile: Tile, known: Sequence[Sequence[Statistics]]
    ) -> tuple[bool, list[Moments]] | None:
        """What `_run_tile` returns; None if memory ran out, and then `side` is smaller than the tile."""
        done = self.done
        try:
            return self._run_tile(job, tile, known)
        except Exception as error:
            longest = max(tile.bottom - tile.top, tile.right - tile.left)
            if not self.is_out_of_memory(error) or longest <= SMALLEST_TILE_LATENT:
                raise
            self.side = max(SMALLEST_TILE_LATENT, (longest + 1) // 2)
            self.done = done
        return None

    def _run_tile(self, job: GroupJob, tile: Tile, known: Sequence[Sequence[Statistics]]) -> tuple[bool, list[Moments]]:
        """Run a tile's chunks to their first unknown norm, or write their result.

        Returns whether it was written, and the moments that were measured. All chunks stop at the same norm. A result
        is measured if the next group begins with a norm.
        """
        context = ChunkContext(self.first, past=self._past(job.index, tile))
        is_written, measured = False, []
        for number in range(len(job.chunks)):
            context.last = self.last and number == len(job.chunks) - 1
            result, moments = self._run_piece(job, tile, number, known[number], context)
            is_written = result is not None
            if moments is not None:
                measured.append(moments)
            if is_written:
                target = tile.cut(job.targets[number], self.whole)
                left = {layer: past.to(MAIN_MEMORY) for layer, past in context.past.items() if not self.last}
                # Memory has run out by now if it does: what is overwritten may be what a second try would read.
                target.copy_(result)
                if not self.last:
                    self.past[job.index, tile] = left
            context.first = False
            self.done += 1
            if self.on_step is not None:
                self.on_step(self.done, max(self.done, self.total))
        return is_written, measured

    def _past(self, index: int, tile: Tile) -> dict[nn.Module, Tensor]:
        """What the tile keeps from its chunk before; cut from a larger tile's if the tile was a part of it then."""
        if self.first or not any(unit.keeps for unit in self.plan.groups[index]):
            return {}
        kept, around = self.past.get((index, tile)), tile
        if kept is None:
            around, kept = next(
                (larger, kept) for (group, larger), kept in self.past.items() if group == index and tile.is_in(larger)
            )
        cut = {}
        for layer, past in kept.items():
            if around != tile:
                reach = self.reach[layer]
                past = tile.grown(reach, self.whole).cut(past, around.grown(reach, self.whole))
            cut[layer] = past.to(self.device)
        return cut

    def _run_piece(
        self, job: GroupJob, tile: Tile, number: int, known: Sequence[Statistics], context: ChunkContext
    ) -> tuple[Tensor | None, Moments | None]:
        """Run a chunk of a tile to its first unknown norm, or to the end; returns the result and what was measured."""
        norms = _Norms(known, tile)
        context.statistics = None if tile == self.whole else norms  # the only tile measures for itself
        try:
            result = self._run_chunk(job, number, norms, context)
        except _Measured as found:
            return None, found.moments
        followers = self.plan.groups[job.index + 1 :]
        asked = followers and followers[0][0].groups
        return result, measure(result, asked) if asked and tile != self.whole else None

    def _run_chunk(self, job: GroupJob, number: int, norms: _Norms, context: ChunkContext) -> Tensor:
        group = self.plan.groups[job.index]
        x, around = job.chunks[number], self.whole
        beside = None if job.beside is None else job.beside[number]
        for unit, follower, reach in zip(group, [*group[1:], None], reaches(group), strict=True):
            area = norms.area = norms.tile.grown(reach, self.whole)
            held = [self._cut(x, around, area)]
            added = None if beside is None else self._cut(beside, around, area)
            latent = None if job.latents is None else self._cut(job.latents[number], self.whole, area)
            beside = held[0] if follower is not None and follower.joins else None
            del x
            x = unit.run(held, added, latent, context)
            for layer in context.past:
                self.reach.setdefault(layer, reach)
            around = area
        return norms.tile.cut(x, around)

    def _cut(self, x: Tensor, around: Tile, area: Tile) -> Tensor:
        """Part of x, which shows `around`, on the device."""
        return area.cut(x, around).to(self.device, self.dtype)

    def through_time(
        self, chunks: Sequence[Tensor], results: Sequence[Tensor], latents: Sequence[Tensor] | None, sizes: list[int]
    ) -> None:
        """Run a whole video as the plan says: at once, or one chunk after the other."""
        if not self.plan.by_chunk:
            self(chunks, results, latents, sizes)
            return
        for number, size in enumerate(sizes):
            self.first, self.last = number == 0, number == len(sizes) - 1
            latent = None if latents is None else [latents[number]]
            self([chunks[number]], [results[number]], latent, [size])


def decode_in_tiles(
    vae: VideoVAE, latent: Tensor, plan: TilePlan, video: Tensor, device: torch.device | str, **options: Any
) -> Tensor:
    """Decode a latent [B, 16, n + 1, h, w] into `video` [B, 3, 4n + 1, 8h, 8w]; see `TiledRun` for the options.

    Equal to `VideoVAE.decode` to rounding, and chunked in time like it. `video` may lie on another device.
    """
    sizes = decode_chunks(latent.shape[2])
    run = TiledRun(plan, device, vae.dtype, calls=_calls(plan, len(latent), len(sizes)), **options)
    frames = [video_frames(size, first=index == 0) for index, size in enumerate(sizes)]
    for one, result in zip(latent.split(1), video.split(1), strict=True):
        chunks = one.split(sizes, dim=2)
        run.through_time(chunks, result.split(frames, dim=2), chunks, sizes)
    return video


def encode_in_tiles(
    vae: VideoVAE, video: Tensor, plan: TilePlan, device: torch.device | str, **options: Any
) -> Posterior:
    """Encode a video [B, 3, 4n + 1, H, W], which may lie on another device; see `TiledRun` for the options.

    Equal to `VideoVAE.encode` to rounding, and chunked in time like it. The result lies where the video lies.
    """
    frames = encode_chunks(video.shape[2])
    sizes = [latent_frames(count) for count in frames]
    run = TiledRun(plan, device, vae.dtype, calls=_calls(plan, len(video), len(sizes)), **options)
    shape = (len(video), 2 * vae.config.latent_channels, *latent_shape(video.shape[2:]))
    moments = torch.empty(shape, device=video.device, dtype=vae.dtype)
    for one, result in zip(video.split(1), moments.split(1), strict=True):
        run.through_time(one.split(frames, dim=2), result.split(sizes, dim=2), None, sizes)
    return Posterior(*moments.chunk(2, dim=1))


def _calls(plan: TilePlan, videos: int, chunks: int) -> int:
    return videos * (chunks if plan.by_chunk else 1)


def _parts(start: int, stop: int, side: int) -> list[tuple[int, int]]:
    count = -(-(stop - start) // side)
    edges = [start + (stop - start) * index // count for index in range(count + 1)]
    return list(pairwise(edges))
