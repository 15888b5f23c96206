"""VAE encode and decode against diffusers' AutoencoderKLCogVideoX at equal weights: `python benchmarks/vae.py`.

Both as a whole and in spatial tiles of the same size; outputs are compared first. Tiles are judged by their distance
to the same library's whole picture. Needs diffusers (`pip install diffusers`), which nothing else here does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from common import DTYPES, MIB, SEED, add_options, alternate, load_library, medians, peak_memory, report
from torch import Tensor

load_library()

try:
    import diffusers
except ModuleNotFoundError:
    raise SystemExit("This compares with diffusers: pip install diffusers.") from None

from flashvideo.config import VAE, VAEConfig  # noqa: E402 - after load_library
from flashvideo.vae import VideoVAE  # noqa: E402
from flashvideo.vae.memory import plan_vae_tiles  # noqa: E402
from flashvideo.vae.tiles import decode_in_tiles, encode_in_tiles  # noqa: E402

DIFFUSERS_CHUNK = 8  # frames that diffusers encodes at a time
EQUAL = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 1e-2}  # of values up to about 5
STORE = 2**34  # bytes that may lie between groups of units
OURS, THEIRS = "flashvideo", "diffusers"


def make_pair(width: int, device: str, dtype: torch.dtype) -> tuple[VideoVAE, diffusers.AutoencoderKLCogVideoX]:
    """Our VAE and diffusers' with the same random weights; `width` is the number of channels at full resolution."""
    config: VAEConfig = replace(VAE, base_channels=width)
    torch.manual_seed(SEED)
    ours = VideoVAE(config, device=device, dtype=dtype).requires_grad_(False)
    theirs = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=tuple(width * multiplier for multiplier in config.channel_multipliers),
        layers_per_block=config.encoder_blocks,
        norm_num_groups=config.norm_groups,
    )
    theirs = theirs.to(device, dtype).requires_grad_(False).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def runs(
    ours: VideoVAE, theirs: diffusers.AutoencoderKLCogVideoX, video: Tensor, latent: Tensor, tile: int
) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """What is compared: case -> peer -> a call that returns the result."""

    def theirs_with(tiles: bool, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            theirs.enable_slicing()
            theirs.enable_tiling(tile, tile) if tiles else theirs.disable_tiling()
            return call()

        return run

    def encode_theirs() -> Tensor:
        return theirs.encode(video).latent_dist.mean

    def decode_theirs() -> Tensor:
        return theirs.decode(latent).sample

    def encode_tiled() -> Tensor:
        plan = plan_vae_tiles(ours.encoder, tuple(latent.shape[2:]), ours.dtype, float("inf"), STORE, tile // 8)
        # Posterior of chunks of 16 frames, as FlashVideo has them; diffusers' are half as long.
        return encode_in_tiles(ours, video, plan, video.device).mean

    def decode_tiled() -> Tensor:
        plan = plan_vae_tiles(ours.decoder, tuple(latent.shape[2:]), ours.dtype, float("inf"), STORE, tile // 8)
        return decode_in_tiles(ours, latent, plan, torch.empty_like(video), video.device)

    return {
        "encode": {
            OURS: lambda: ours.encode(video, chunk=DIFFUSERS_CHUNK).mean,
            THEIRS: theirs_with(False, encode_theirs),
        },
        "decode": {OURS: lambda: ours.decode(latent), THEIRS: theirs_with(False, decode_theirs)},
        "encode in tiles": {OURS: encode_tiled, THEIRS: theirs_with(True, encode_theirs)},
        "decode in tiles": {OURS: decode_tiled, THEIRS: theirs_with(True, decode_theirs)},
    }


def seam_error(case: str, peer: str, ours: VideoVAE, video: Tensor, whole: Tensor, tiled: Tensor) -> float:
    """Mean distance of the tiles' result to the whole picture's; not a number where they have another size.

    diffusers' tiles, whose overlaps are rounded, can give a wider or narrower picture than the video's.
    """
    if case.startswith("encode") and peer == OURS:
        whole = ours.encode(video).mean
    if tiled.shape != whole.shape:
        return float("nan")
    return float((tiled.float() - whole.float()).abs().mean())


def main() -> None:
    """Compare, time, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--width", type=int, default=32, help="channels at full resolution (the official VAE: 128)")
    parser.add_argument("--size", type=int, nargs=2, default=(96, 160), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--tile", type=int, default=96, help="longest side of a tile in pixels")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device, dtype = options.device, DTYPES[options.dtype]
    with torch.inference_mode():
        ours, theirs = make_pair(options.width, device, dtype)
        shape = (1, 3, options.frames, *options.size)
        video = torch.rand(shape, device=device).mul_(2).sub_(1).to(dtype)
        latent = ours.encode(video).mean
        rows: list[list[Any]] = []
        wholes: dict[str, dict[str, Tensor]] = {}
        for case, peers in runs(ours, theirs, video, latent, options.tile).items():
            results = {name: run() for name, run in peers.items()}
            way = case.split()[0]
            wholes.setdefault(way, results)
            tiled, apart = case != way, 0.0
            if not tiled:
                apart = float((results[OURS].float() - results[THEIRS].float()).abs().max())
                if apart > EQUAL[dtype]:
                    raise SystemExit(f"{case}: the outputs differ by {apart:.2g}; the times would mean nothing.")
            seconds = medians(alternate(peers, options.rounds, device))
            memory = {name: peak_memory(run, device) for name, run in peers.items()}
            for name in peers:
                off = seam_error(case, name, ours, video, wholes[way][name], results[name]) if tiled else apart
                rows.append(
                    [
                        case,
                        name,
                        seconds[name],
                        seconds[THEIRS] / seconds[name],
                        memory[name] / MIB,
                        memory[name] / memory[THEIRS],
                        off,
                    ]
                )
    report(
        "VAE",
        ["case", "library", "seconds", "speed vs diffusers", "peak MiB", "peak vs diffusers", "error"],
        rows,
        device=device,
        facts={
            "diffusers": diffusers.__version__,
            "dtype": options.dtype,
            "video": "x".join(map(str, shape)),
            "channels": options.width,
            "tile": options.tile,
            "rounds": options.rounds,
            "error": "largest between the libraries; in tiles, mean to the same library's whole picture",
        },
        target=options.json,
    )


if __name__ == "__main__":
    main()
