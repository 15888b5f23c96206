"""Time and memory of one evaluation against frames and resolution: `python benchmarks/scaling.py`.

Stage II's network with fewer layers and a smaller width, random weights. Time outside attention
should grow in proportion to the tokens, attention's with their square (the exponents are fitted to the runs), and
every token more should take the same memory.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace

import torch
from common import DTYPES, MIB, SEED, add_options, is_single_thread, load_library, peak_memory, report, synchronize
from torch import Tensor

load_library()

from flashvideo.config import STAGE2, TEXT_TOKENS  # noqa: E402
from flashvideo.dit import FlashVideoDiT, attention_sdpa  # noqa: E402

# Latent frames, rows and columns of patches: a 17-fold range of tokens, by length and by area in turn.
SIZES = [(2, 16, 24), (4, 16, 24), (4, 16, 48), (8, 16, 48), (8, 32, 48), (11, 32, 48)]


def main() -> None:
    """Measure each size, fit, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="only so many of the sizes, the smallest first")
    options = parser.parse_args()
    network = make_network(options.width, options.layers, DTYPES[options.dtype], options.device)
    rows = [measure(network, size, options.rounds, options.device) for size in SIZES[: options.sizes]]
    exponents = [fit([row[1] for row in rows], [row[i] for row in rows]) for i in (2, 3)]
    for before, row in zip([None, *rows], rows, strict=False):
        row.append(None if before is None else (row[5] - before[5]) * MIB / (row[1] - before[1]))
    rows.append(["exponent", None, *exponents, None, None, None])
    columns = ["latent frames x rows x columns", "tokens", "attention, s", "all else, s", "all else, us / token"]
    columns += ["peak memory, MiB", "bytes for each token more"]
    facts = {"width": options.width, "layers": options.layers, "dtype": options.dtype, "rounds": options.rounds}
    report("Scaling of one evaluation", columns, rows, device=options.device, facts=facts, target=options.json)


def make_network(width: int, layers: int, dtype: torch.dtype, device: str) -> FlashVideoDiT:
    """Stage II's network, smaller, with random weights."""
    torch.manual_seed(SEED)
    config = replace(STAGE2, num_layers=layers, hidden_size=width, num_heads=width // 64, ff_dim=4 * width, text_dim=64)
    return FlashVideoDiT(config, device=device, dtype=dtype).eval()


@torch.inference_mode()
def measure(network: FlashVideoDiT, size: tuple[int, int, int], rounds: int, device: str) -> list:
    """A row of the table: the fastest of `rounds` runs, its attention calls timed apart from the rest."""
    clock = time.process_time if is_single_thread(device) else time.perf_counter
    attention_seconds = 0.0

    def timed_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, _start: int) -> Tensor:
        nonlocal attention_seconds
        synchronize(device)
        start = clock()
        attended = attention_sdpa(q, k, v, heads)
        synchronize(device)
        attention_seconds += clock() - start
        return attended

    frames, grid_rows, grid_columns = size
    weight = network.proj_out.weight
    latent = torch.randn(1, 16, frames, 2 * grid_rows, 2 * grid_columns).to(weight)
    context = torch.randn(1, TEXT_TOKENS, network.config.text_dim).to(weight)
    timestep = torch.tensor([500.0], device=device)

    def run() -> Tensor:
        return network(latent, timestep, context, degradation_step=675, attention=timed_attention)

    runs = []
    for _ in range(rounds + 1):
        attention_seconds = 0.0
        start = clock()
        run()
        synchronize(device)
        runs.append((clock() - start - attention_seconds, attention_seconds))
    rest, attention = min(run[0] for run in runs[1:]), min(run[1] for run in runs[1:])
    tokens = TEXT_TOKENS + frames * grid_rows * grid_columns
    memory = peak_memory(run, device)
    name = f"{frames} x {grid_rows} x {grid_columns}"
    return [name, tokens, attention, rest, rest / tokens * 1e6, memory / MIB]


def fit(sizes: list[float], values: list[float]) -> float:
    """The exponent p of values ~ sizes^p: the slope of the least-squares line through the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return products / sum((a - x_mean) ** 2 for a in x)


if __name__ == "__main__":
    main()
