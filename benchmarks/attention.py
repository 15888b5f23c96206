"""Approximate attention beside the exact one, quality and speed: `python benchmarks/attention.py`.

Quality: FlashVideo-Nano refines procedural clips that training never saw, once exactly and once with each
approximation; PSNR of the refined latents (peak: the exact latent's range) and of the decoded frames (peak: white),
over all clips. Speed: one layer with random weights on a larger grid of patches, exact and approximate in turn.
"in time" can't be chosen in the graph: it shows what splitting time instead of the picture would cost. "spatial tiles"
are those of `flashvideo.refiner.tiles`, for which the whole network runs once a tile.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from common import DTYPES, SEED, add_options, alternate, load_library, medians, report
from torch import Tensor

load_library()

from scaling import make_network  # noqa: E402

from flashvideo.checkpoints import load_dit, load_vae  # noqa: E402
from flashvideo.config import (  # noqa: E402  # noqa: E402
    NANO_STAGE2,
    NANO_STRENGTH,
    SPATIAL_FACTOR,
    STAGE2_LATENT_SCALE,
    STAGE2_SCALE,
    TEXT_TOKENS,
    TILE,
    latent_frames,
)
from flashvideo.degradation import degrade_latent  # noqa: E402
from flashvideo.dit import Attention, FlashVideoDiT  # noqa: E402
from flashvideo.dit.tile_attention import VIEWS, Grid, WindowAttention  # noqa: E402
from flashvideo.frames import to_frames  # noqa: E402
from flashvideo.nano import NANO_FOLDER, nano_state  # noqa: E402
from flashvideo.refiner.tiles import plan_tiles  # noqa: E402
from flashvideo.refiner.windows import blend  # noqa: E402
from flashvideo.samplers import sample_stage2  # noqa: E402
from flashvideo.t5 import T5Tokens, contexts, load_encoder, with_motion  # noqa: E402
from flashvideo.training.scenes.captions import caption  # noqa: E402
from flashvideo.training.scenes.rendering import render  # noqa: E402
from flashvideo.training.scenes.stream import random_scene  # noqa: E402

CLIP = (17, 256, 448)  # frames, height and width that Nano makes of its drafts
ENLARGED = 4  # how much larger than a draft that is
PATCH = 2  # latent pixels a side of the official model's patches
FULL_HD: Grid = (13, 67, 120)  # its stage II's at 1072x1920, 49 frames
IN_TIME: Grid = (5, 1, 1)
SMALL_TILE = 256  # pixels of spatial tiles up to LARGE rows of patches, above TILE
LARGE = 48
WHITE = 1.0

Network = Callable[..., Tensor]  # a FlashVideoDiT, or something that is called like one


@dataclass(frozen=True)
class Method:
    """An approximation: windows, another attention function over everything, or tiles of the picture."""

    tiles: Grid | None = None
    dense: Attention | None = None
    spatial: bool = False

    def network(self, dit: FlashVideoDiT, grid: Grid) -> Network:
        """The network with this approximation, for a grid of patches."""
        if self.spatial:
            return partial(in_tiles, dit, tile_of(grid))
        if self.tiles is None:
            return dit if self.dense is None else partial(dit, attention=self.dense)
        windows = WindowAttention(TEXT_TOKENS, grid, self.tiles)
        return partial(dit, attention=windows, order=windows.order)

    def kept(self, grid: Grid, patch: int) -> float:
        """Share of exact attention's operations, with patches of so many latent pixels in height and width."""
        if self.spatial:
            frames, rows, columns = grid
            pieces = plan_tiles(patch * rows, patch * columns, tile_of(grid))
            seen = [TEXT_TOKENS + frames * piece.weight.numel() // patch**2 for piece in pieces]
            return sum(tokens**2 for tokens in seen) / (TEXT_TOKENS + math.prod(grid)) ** 2
        return 1.0 if self.tiles is None else WindowAttention(TEXT_TOKENS, grid, self.tiles).computed_share

    def shape(self, grid: Grid) -> str:
        """How the grid is cut, in words."""
        return f"{tile_of(grid)} pixels" if self.spatial else " x ".join(map(str, self.tiles or (1, 1, 1)))


def tile_of(grid: Grid) -> int:
    """The side of spatial tiles in pixels."""
    return TILE if grid[1] > LARGE else SMALL_TILE


def in_tiles(dit: FlashVideoDiT, tile: int, latent: Tensor, *conditions: Tensor, **options: int) -> Tensor:
    """What the network says of a latent [1, C, T, H, W], seen in tiles."""
    pieces = plan_tiles(*latent.shape[3:], tile)
    return blend(pieces, lambda piece: dit(latent[piece.at], *conditions, **options), latent)


def main() -> None:
    """Measure quality and speed, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--clip", type=int, nargs=3, default=CLIP, help="frames, height, width of the clips")
    parser.add_argument("--grid", type=int, nargs=3, default=[13, 24, 40], help="frames, rows, columns to be timed")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")
    options = parser.parse_args()
    name = options.dtype or ("float32" if torch.device(options.device).type == "cpu" else "bfloat16")
    methods = {"exact": Method(), **{view: Method(tiles) for view, tiles in VIEWS.items()}}
    methods |= {"in time": Method(IN_TIME), "spatial tiles": Method(spatial=True)}
    if torch.device(options.device).type == "cuda" and importlib.util.find_spec("sageattention"):
        methods["8-bit"] = Method(dense=attention_sage)
    quality = measure_quality(methods, options.clips, options.clip, DTYPES[name], options.device)
    quality["exact"] = (None, None, None)
    grid = tuple(options.grid)
    seconds = measure_speed(methods, grid, options.width, options.rounds, DTYPES[name], options.device)
    small = grid_of(*options.clip)
    rows = [
        [label, method.shape(small), method.kept(small, NANO_STAGE2.patch_size), *quality[label],
         method.kept(grid, PATCH), seconds[label], seconds["exact"] / seconds[label], method.kept(FULL_HD, PATCH)]
        for label, method in methods.items()
    ]  # fmt: skip
    columns = ["attention", "tiles", "kept", "latent PSNR, dB", "video PSNR, dB", "worst clip, dB"]
    columns += ["kept, large", "layer, s", "times as fast", "kept, 1072x1920x49"]
    facts = {
        "quality": f"Nano, {options.clips} clips of {' x '.join(map(str, options.clip))} (frames, height, width), "
        f"strength {NANO_STRENGTH}, 4 steps, cfg {STAGE2_SCALE:g}; kept, 1072x1920x49, of spatial tiles: {TILE} pixels",
        "large": f"{' x '.join(map(str, grid))} patches, {math.prod(grid) + TEXT_TOKENS} tokens, width {options.width}",
        "dtype": name,
        "rounds": options.rounds,
    }
    title = "Approximate attention beside the exact one"
    report(title, columns, rows, device=options.device, facts=facts, target=options.json)


def attention_sage(q: Tensor, k: Tensor, v: Tensor, _heads: int, _start: int) -> Tensor:
    """SageAttention in 8 bits, for 16-bit tensors on a GPU."""
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="HND").transpose(1, 2).flatten(2)


def grid_of(frames: int, height: int, width: int) -> Grid:
    """Nano's patches of a video."""
    side = SPATIAL_FACTOR * NANO_STAGE2.patch_size
    return latent_frames(frames), height // side, width // side


@torch.inference_mode()
def measure_quality(
    methods: Mapping[str, Method], clips: int, size: Sequence[int], dtype: torch.dtype, device: str
) -> dict[str, tuple[float, float, float]]:
    """PSNR of latents, of frames, and of the worst clip's frames, in dB, for each method but the exact one.

    `size` is the clips' frames, height and width.
    """
    dit = load_dit(nano_state("stage2"), device=device, dtype=dtype).eval()
    vae = load_vae(nano_state("vae"), device=device, dtype=dtype).eval()
    encoder = load_encoder(NANO_FOLDER / "text_encoder.safetensors", torch.device("cpu"), torch.float32)
    errors: dict[str, list[tuple[float, float]]] = {label: [] for label in methods}
    for seed in range(clips):
        scene, generator = random_scene(seed, "test"), torch.Generator().manual_seed(SEED + seed)
        words = with_motion(caption(scene, seed), "medium")
        context = contexts(encoder, T5Tokens(""), [words]).to(device, dtype)
        draft = F.avg_pool2d(render(scene, *size).transpose(0, 1), ENLARGED)
        enlarged = F.interpolate(draft, scale_factor=ENLARGED, mode="bilinear").transpose(0, 1)[None]
        latent = vae.encode(enlarged.to(device, dtype)).mean.float() * STAGE2_LATENT_SCALE
        noise = torch.randn(latent.shape, generator=generator).to(device)
        start = degrade_latent(latent, noise, NANO_STRENGTH)
        results = {}
        for label, method in methods.items():
            network = method.network(dit, grid_of(*size))
            refined = sample_stage2(network, start, context, torch.zeros_like(context), degradation_step=NANO_STRENGTH)
            latents = refined / STAGE2_LATENT_SCALE
            results[label] = latents, to_frames(vae.decode(latents.to(dtype)).float().cpu())
        exact, frames = results["exact"]
        for label, (latents, video) in results.items():
            relative = (latents - exact).square().mean() / (exact.max() - exact.min()) ** 2
            errors[label].append((float(relative), float((video - frames).square().mean()) / WHITE**2))
        sys.stderr.write(f"clip {seed}: { {label: round(decibels(errors[label][-1][1]), 2) for label in methods} }\n")
    table = {label: torch.tensor(values, dtype=torch.float64) for label, values in errors.items()}
    return {
        label: (*(decibels(float(mean)) for mean in values.mean(0)), decibels(float(values[:, 1].max())))
        for label, values in table.items()
    }


def decibels(error: float) -> float:
    """PSNR of a mean squared error relative to the squared peak."""
    return math.inf if error == 0 else -10 * math.log10(error)


@torch.inference_mode()
def measure_speed(
    methods: Mapping[str, Method], grid: Grid, width: int, rounds: int, dtype: torch.dtype, device: str
) -> dict[str, float]:
    """Seconds of one evaluation of a network of one layer, medians of alternated rounds."""
    network = make_network(width, 1, dtype, device)
    frames, rows, columns = grid
    latent = torch.randn(1, 16, frames, 2 * rows, 2 * columns).to(device, dtype)
    context = torch.randn(1, TEXT_TOKENS, network.config.text_dim).to(device, dtype)
    timestep = torch.tensor([500.0], device=device)
    runs = {
        label: partial(method.network(network, grid), latent, timestep, context, degradation_step=NANO_STRENGTH)
        for label, method in methods.items()
    }
    return medians(alternate(runs, rounds, device))


if __name__ == "__main__":
    main()
