"""What an encode or decode of the VAE holds in memory at its peak, and the spatial tiles that fit into a budget.

A video runs in chunks of time, so its length hardly counts. At the peak, half a residual block holds what it adds up,
its normed input and its result. To that come the frames that every convolution keeps for the next chunk, and the
windows of time in which a large convolution runs.

Tiles first need every norm's statistics of the whole picture (see `tiles`). How often work is repeated for that depends
on how many whole pictures may be stored. `plan_vae_tiles` searches for the least work, the cost of moving included.
`plan_within` makes every decision between the whole picture and tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..config import SPATIAL_FACTOR, TEMPORAL_FACTOR, latent_frames, video_shape
from .layers import KERNEL_SIZE, WINDOW_ELEMENTS
from .network import DECODE_CHUNK, ENCODE_CHUNK, Decoder, Encoder, Unit, VideoVAE

# Multiplications that take about as long as moving a number between an accelerator and main memory: 2 bytes at 8 GB/s
# beside 15e12 multiplications a second. An estimate: it decides between storing and computing again, not the result.
MOVE = 4096.0
LOOK_BACK = KERNEL_SIZE - 1  # frames that a convolution keeps
# Tensors of WINDOW_ELEMENTS that live at once where a convolution runs in windows: a window with the frames before it,
# what it is joined from, its result. A smaller convolution copies its input once.
WINDOWS = 3
LEAST_STORE = 0.25  # of the store, for pictures; what chunks leave for each other takes the rest
SMALLEST_TILE_LATENT = 4  # latent pixels a side: 32 pixels
# What the VAE may hold of a card's memory, whose weights and other programs need some as well; and what its tiles may
# store in main memory, where other models may wait. A run that resumes counts all memory there is, not what is free.
VAE_SHARE = 0.8
STORE_SHARE = 0.5


@dataclass(frozen=True)
class TilePlan:
    """How a half of the VAE runs in tiles: `groups` of units that run together, and `side`, a tile's longest side.

    `side` is in latent pixels. Between two groups the whole picture is stored. `by_chunk`: each chunk of time runs over
    all tiles before the next chunk, and what a tile keeps for the next chunk is stored as well; else each tile runs
    through the whole video before the next tile. `device_bytes`: what a tile holds at its peak. `stored_bytes`: what is
    stored at once. `work`: multiplications, without those that overlaps repeat.
    """

    groups: tuple[tuple[Unit, ...], ...]
    side: int
    by_chunk: bool
    device_bytes: float
    stored_bytes: float
    work: float


def decode_bytes(vae: VideoVAE, shape: Sequence[int], dtype: torch.dtype) -> float:
    """Bytes for decoding one latent of `shape` [B, 16, T, h, w] in one piece, the whole video included."""
    _, _, latents, rows, columns = shape
    video = vae.config.image_channels * math.prod(video_shape((latents, rows, columns)))
    return (_elements(vae.decoder.units(), latents, rows * columns, DECODE_CHUNK + 1) + video) * dtype.itemsize


def encode_bytes(vae: VideoVAE, shape: Sequence[int], dtype: torch.dtype) -> float:
    """Bytes for encoding one video of `shape` [B, 3, T, H, W] in one piece, the video included."""
    _, channels, frames, height, width = shape
    area = height * width / SPATIAL_FACTOR**2
    elements = _elements(vae.encoder.units(), latent_frames(frames), area, ENCODE_CHUNK // TEMPORAL_FACTOR + 1)
    return (elements + channels * frames * height * width) * dtype.itemsize


def held_bytes(network: Encoder | Decoder, size: tuple[int, int, int], dtype: torch.dtype) -> float:
    """Bytes that a half of the VAE holds for a latent size [T, h, w], without its input and its result."""
    latents, rows, columns = size
    return _elements(network.units(), latents, rows * columns, largest_chunk(network)) * dtype.itemsize


def largest_chunk(network: Encoder | Decoder) -> int:
    """Latent frames of the largest chunk, which is a video's first."""
    return (DECODE_CHUNK if isinstance(network, Decoder) else ENCODE_CHUNK // TEMPORAL_FACTOR) + 1


def plan_within(
    network: Encoder | Decoder,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    budget: float | None,
    store: float | None,
    *,
    needed: float,
    on_card: bool,
    side: int | None = None,
    by_chunk: bool | None = None,
) -> TilePlan | None:
    """The tiles for a latent size [T, h, w] of a half of the VAE; None where the whole picture runs at once.

    It does where it holds no more than `budget` bytes (None: no limit): it holds `needed`. `store`: bytes of main
    memory for what tiles store, by default `budget`; beyond it work is repeated instead. On a processor (`on_card`
    False) both are the same memory, and each gets half. `side` asks for tiles of at most so many latent pixels,
    `by_chunk` for one order of the work (see `TilePlan`).
    """
    budget = math.inf if budget is None else budget
    if needed <= budget and (side is None or side >= max(size[1:])):
        return None
    store = budget if store is None else store
    if not on_card:
        budget = store = min(budget, store) / 2
    return plan_vae_tiles(network, size, dtype, budget, store, side, MOVE if on_card else 0.0, by_chunk)


def plan_vae_tiles(
    network: Encoder | Decoder,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    budget: float,
    store_budget: float,
    side: int | None = None,
    move: float = 0.0,
    by_chunk: bool | None = None,
) -> TilePlan:
    """The largest tiles for a latent size [T, h, w] that hold no more than `budget` bytes, or the smallest there are.

    At most `store_budget` bytes are stored between groups of units, as far as work can be repeated instead. `side` and
    `by_chunk`: see `plan_within`. `move` is the cost of moving a number to the device or back, in multiplications: 0
    where nothing is moved, else `MOVE`.
    """
    latents, rows, columns = size
    units = network.units()
    chunk = largest_chunk(network)
    orders = (True, False) if by_chunk is None else (by_chunk,)
    store = store_budget / dtype.itemsize
    sizes = latents, rows * columns, chunk
    # Where chunks have to come one by one, what they leave must be stored: then a part stays for the pictures.
    least = 0.0 if by_chunk is None else store * LEAST_STORE
    grouped = [_Grouping(units, *sizes, order, move).best(store, least) for order in orders]
    # Where nothing fits, what stores least.
    by_chunk, (groups, stored, work) = min(
        zip(orders, grouped, strict=True), key=lambda found: (max(found[1][1], store), found[1][2], found[1][1])
    )
    side = min(side or max(rows, columns), max(rows, columns))
    while True:
        held = max(_tile_elements(group, latents, (rows, columns), side, chunk) for group in groups) * dtype.itemsize
        if held <= budget or side <= SMALLEST_TILE_LATENT:
            return TilePlan(groups, side, by_chunk, held, stored * dtype.itemsize, work)
        side = max(SMALLEST_TILE_LATENT, (side + 1) // 2)


def passes(group: Sequence[Unit]) -> list[int]:
    """How often each unit's convolution runs: a group's tiles run up to each of its norms, and once to the end."""
    runs = sum(unit.norms for unit in group) + 1
    found = []
    for unit in group:
        runs -= unit.norms
        found.append(runs)
    return found


def reaches(units: Sequence[Unit]) -> list[int]:
    """How far beyond a tile each unit's input must reach, in latent pixels, for a right result of the last."""
    total, found = 0, []
    for unit in reversed(units):
        total += unit.reach
        found.append(-(-total // SPATIAL_FACTOR))
    return found[::-1]


class _Grouping:
    """The search for the groups of units that take the least work; all sizes in numbers, not bytes."""

    def __init__(self, units: Sequence[Unit], latents: int, area: int, chunk: int, by_chunk: bool, move: float) -> None:
        self.units, self.by_chunk, self.move = units, by_chunk, move
        frames = min(latents, chunk) if by_chunk else latents
        self.positions = [((latents - 1) * unit.time + 1) * unit.scale**2 * area for unit in units]
        # Size of the stored picture before each unit; the group's own input and result are stored elsewhere.
        results = [unit.channels * ((frames - 1) * unit.out_time + 1) * unit.out_scale**2 * area for unit in units]
        self.stored = [0, *results[:-1], 0]
        self.rounds = latents / frames  # in which so much passes through the store
        kept = sum(unit.keeps * unit.scale**2 for unit in units) * LOOK_BACK * area
        self.kept = kept if by_chunk and latents > chunk else 0

    def best(self, store: float, least: float) -> tuple[tuple[tuple[Unit, ...], ...], float, float]:
        """Groups, the most that is stored at once, and the work.

        What chunks leave for the next counts in what may be stored, but `least` may be stored in any case.
        """
        count, room = len(self.units), max(store - self.kept, least)
        ends: list[tuple[float, float, tuple[int, ...]] | None] = [(0.0, 0.0, ())] + [None] * count
        for stop in range(1, count + 1):
            found = []
            for start, own in self._works(stop):
                live = self._live(start, stop)
                whole = start == 0 and stop == count  # needs no store: there is always this
                before = ends[start]
                if before is not None and live is not None and (live <= room or whole):
                    work, most, cuts = before
                    found.append((work + own, max(most, live), (*cuts, stop)))
            ends[stop] = min(found, default=None)
        work, most, cuts = ends[count]
        groups = tuple(tuple(self.units[start:stop]) for start, stop in pairwise((0, *cuts)))
        return groups, most + self.kept, work + 2 * self.kept * self.rounds * self.move

    def _live(self, start: int, stop: int) -> float | None:
        """What is stored while the units from `start` to `stop` run as a group; None if they can't be one."""
        units = self.units
        if stop < len(units) and units[stop].joins and (stop - start > 1 or start == 0):
            return None  # the next group adds up this one's input, which must be stored as it is
        beside = self.stored[start - 1] if units[start].joins else 0
        return self.stored[start] + beside + (0 if self._in_place(start, stop) else self.stored[stop])

    def _in_place(self, start: int, stop: int) -> bool:
        return self.by_chunk and stop - start == 1 and runs_in_place(self.units[start:stop])

    def _works(self, stop: int) -> Iterator[tuple[int, float]]:
        """Where a group that ends before unit `stop` may start, the last place first, and the work it takes."""
        moved = self.rounds * self.move
        work, runs = 0, 1  # `runs`: how often the unit's convolution runs, see `passes`
        for start in reversed(range(stop)):
            unit = self.units[start]
            work += unit.work * self.positions[start] * runs
            reads = runs * (self.stored[start] + (self.stored[start - 1] if unit.joins else 0))
            yield start, work + moved * (reads + self.stored[stop])
            runs += unit.norms


def runs_in_place(group: Sequence[Unit]) -> bool:
    """Whether a group's result may take the place of what it adds up, which nothing else reads."""
    return len(group) == 1 and group[0].joins == group[0].channels


def _tile_elements(units: Sequence[Unit], latents: int, picture: tuple[int, int], side: int, chunk: int) -> float:
    reach = 0 if side >= max(picture) else 2 * reaches(units)[0]
    rows, columns = (min(length, side + reach) for length in picture)
    return _elements(units, latents, rows * columns, chunk)


def _elements(units: Sequence[Unit], latents: int, area: float, chunk: int) -> float:
    """Numbers held for chunks of `chunk` latent frames of `latents`, over `area` latent pixels."""
    peak = kept = largest = 0.0
    for unit in units:
        frames = (min(latents, chunk) - 1) * unit.time + 1
        positions = unit.scale**2 * area
        peak = max(peak, frames * positions * unit.holds)
        largest = max(largest, (frames + LOOK_BACK) * positions * max(unit.inputs, unit.channels))
        if latents > chunk:
            kept += LOOK_BACK * positions * unit.keeps
    return peak + kept + min(WINDOWS * WINDOW_ELEMENTS, largest)
