"""A training step of the VAE, forward and backward, plain, by autocast and fused: `python benchmarks/vae_training.py`.

On one thread of a CPU with AVX512 and bfloat16 instructions, where `fused = true` of a VAE's config has an effect.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import ROOT, SEED, alternate, load_library, medians, report

load_library()

from flashvideo.checkpoints import load_vae  # noqa: E402 - after load_library
from flashvideo.training.tasks.fused_vae import FusedVAE, fused_or_plain  # noqa: E402
from flashvideo.vae import VideoVAE  # noqa: E402

FILE = ROOT / "models" / "nano" / "footage_vae.safetensors"


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, default=FILE, help="weights to train")
    parser.add_argument("--clip", type=int, nargs=3, default=(17, 96, 96), metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the result there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    vae = load_vae(options.vae, dtype=torch.float32).requires_grad_(True)
    fused = fused_or_plain(vae)
    if fused is vae:  # the log says why
        return 1
    clip = torch.rand(1, 3, *options.clip) * 2 - 1

    def step(network: VideoVAE | FusedVAE, *, autocast: bool = False) -> Callable[[], None]:
        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = (network.decode(network.encode(clip).mode()) - clip).abs().mean()
            loss.backward()
            vae.zero_grad()

        return run

    peers = {"float32": step(vae), "bfloat16 by autocast": step(vae, autocast=True), "fused": step(fused)}
    seconds = medians(alternate(peers, options.rounds))
    rows = [(name, value, value / seconds["float32"]) for name, value in seconds.items()]
    title = "A training step of the VAE, one clip of {}x{}x{}".format(*options.clip)
    report(title, ("arithmetic", "seconds", "of float32"), rows, device="cpu", target=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
