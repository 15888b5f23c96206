"""One half of the VAE as a stream: chunks go in one by one, and its state can be stored between any two of them.

The result equals that of `VideoVAE.encode` or `decode`, without holding the whole video. The state is what one chunk
leaves for the next; a run resumes from it to the same bits.

In spatial tiles, the device's memory depends neither on the length nor on the size of a video: every chunk runs over
all tiles before the next chunk, as in `vae.tiles`, and what a tile keeps for the next chunk is stored in main memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..config import latent_frames, latent_shape, video_frames, video_shape
from ..devices import is_out_of_memory
from ..parallel import Ranks
from .layers import ChunkContext
from .memory import TilePlan, held_bytes, largest_chunk, plan_within
from .network import Decoder, Encoder, Posterior
from .ranks import RankedTiledRun, side_for_ranks
from .tiles import Tile, TiledRun


class VAEStream:
    """The encoder or the decoder over chunks of the given sizes: those of `encode_chunks` or `decode_chunks`.

    The encoder takes videos [1, 3, t, H, W] in [-1, 1] and gives moments (see `latent_of`), the decoder takes latents
    [1, 16, t, h, w] in raw scale and gives videos in about [-1, 1].
    """

    def __init__(self, network: Encoder | Decoder, sizes: Sequence[int]) -> None:
        self.network, self.sizes = network, sizes
        self.done = 0  # chunks
        self._context = ChunkContext()

    def __call__(self, chunk: Tensor) -> Tensor:
        """The network's output for the next chunk [1, C, t, H, W]. Raises ValueError for one of another length."""
        if self.done == len(self.sizes) or chunk.shape[2] != self.sizes[self.done]:
            wanted = self.sizes[self.done : self.done + 1] or "none"
            raise ValueError(f"chunk {self.done} of {len(self.sizes)} must have {wanted} frames; got {chunk.shape[2]}")
        self._context.last = self.done == len(self.sizes) - 1
        result = self._evaluate(chunk)
        self._context.first = False
        self.done += 1
        return result

    def _evaluate(self, chunk: Tensor) -> Tensor:
        return self.network(chunk, self._context)

    def state(self) -> dict[str, Tensor]:
        """What the chunks so far leave for the next, by the names of the layers; the tensors are not copied."""
        names = {module: name for name, module in self.network.named_modules()}
        return {names[module]: tensor for module, tensor in self._context.past.items()}

    def restore(self, done: int, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        """Resume after `done` chunks from what `state` returned then."""
        self.done = done
        self._context.first = done == 0
        self._context.past = {self.network.get_submodule(name): tensor.to(device) for name, tensor in tensors.items()}


def latent_of(moments: Tensor) -> Tensor:
    """The likeliest latent [B, 16, t, h, w], raw scale, of an encoder's output [B, 32, t, h, w]."""
    return Posterior(*moments.chunk(2, dim=1)).mode()


class TiledVAEStream(VAEStream):
    """A `VAEStream` that works on `device` in the tiles of `plan`. The result is the same, to rounding.

    All that is as large as the picture is stored in main memory. Tiles are halved where the device has less memory than
    the plan expects, but not with `ranks`: then each has tiles of its own, and all get the whole result.
    """

    def __init__(
        self,
        network: Encoder | Decoder,
        sizes: Sequence[int],
        plan: TilePlan,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(network, sizes)
        dtype = next(network.parameters()).dtype
        if ranks is None:
            self._run = TiledRun(plan, device, dtype, is_out_of_memory=is_out_of_memory)
        else:
            self._run = RankedTiledRun(plan, device, dtype, ranks)

    def _evaluate(self, chunk: Tensor) -> Tensor:
        decodes = isinstance(self.network, Decoder)
        size = chunk.shape[2:]
        latents = size[0] if decodes else latent_frames(size[0])
        if decodes:
            result_size = (video_frames(latents, first=self._context.first), *video_shape(size)[1:])
        else:
            result_size = latent_shape(size)
        channels = self.network.conv_out.conv.out_channels
        result = torch.empty((1, channels, *result_size), device=chunk.device, dtype=self._run.dtype)
        self._run.first, self._run.last = self._context.first, self._context.last
        self._run([chunk], [result], [chunk] if decodes else None, [latents])
        return result

    def state(self) -> dict[str, Tensor]:
        """What the chunks so far leave for the next, by tile and layer; of several ranks, each has its own tiles'."""
        names = {module: name for name, module in self.network.named_modules()}
        return {
            " ".join([*map(str, (group, *tile, self._run.reach[module])), names[module]]): tensor
            for (group, tile), past in self._run.past.items()
            for module, tensor in past.items()
        }

    def restore(self, done: int, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        """Resume after `done` chunks from what `state` returned then; it stays in main memory."""
        super().restore(done, {})
        run = self._run
        run.past = {}
        # Where tiles were halved, groups that haven't run since have the larger ones' past.
        tiles = {Tile(*map(int, name.split(" ")[1:5])) for name in tensors}
        run.tiles = sorted(tile for tile in tiles if not any(part != tile and part.is_in(tile) for part in tiles))
        for name, tensor in tensors.items():
            *numbers, layer = name.split(" ")
            group, *place, reach = map(int, numbers)
            module, tile = self.network.get_submodule(layer), Tile(*place)
            run.reach[module] = reach
            if any(part.is_in(tile) for part in run.own_tiles()):
                run.past.setdefault((group, tile), {})[module] = tensor


def stream_within(
    network: Encoder | Decoder,
    sizes: Sequence[int],
    grid: tuple[int, int],
    budget: float | None,
    device: torch.device,
    store: float | None = None,
    ranks: Ranks | None = None,
) -> VAEStream:
    """A stream over latents of `grid` (h, w) that holds about `budget` bytes on the device: tiled if it has to be.

    See `plan_stream` for `store`. With `ranks` it is tiled so that each has a part.
    """
    plan = plan_stream(network, len(sizes), grid, budget, device, store, ranks)
    return VAEStream(network, sizes) if plan is None else TiledVAEStream(network, sizes, plan, device, ranks)


def plan_stream(
    network: Encoder | Decoder,
    chunks: int,
    grid: tuple[int, int],
    budget: float | None,
    device: torch.device,
    store: float | None = None,
    ranks: Ranks | None = None,
) -> TilePlan | None:
    """The tiles of such a stream; None if it holds no more than `budget` with the whole picture in one piece.

    `store`: see `plan_within`. What chunks leave for each other has to be stored, however much it is.
    """
    size = (min(chunks, 2) * largest_chunk(network), *grid)  # with a second chunk, what the first leaves counts
    dtype, on_card = next(network.parameters()).dtype, torch.device(device).type != "cpu"
    needed = held_bytes(network, size, dtype)
    place = {"needed": needed, "on_card": on_card, "by_chunk": True}
    plan = plan_within(network, size, dtype, budget, store, **place)
    if ranks is None or ranks.size == 1:
        return plan
    side = side_for_ranks(grid, max(grid) if plan is None else plan.side, ranks.size)
    return plan_within(network, size, dtype, budget, store, side=side, **place)
