"""Both stages and the VAE at their official sizes on one GPU: `python benchmarks/full_size.py` (under 8 minutes).

Weights are random, the work is the official one. For each attention backend and precision a network of a few layers
is timed and its time scaled to all layers; then the whole network runs once with the fastest. "of matmul" is the
rate reached over the rate of a large square matrix product on the same card in the same precision. `--small` runs
the same on a CPU with small networks, to show that it works.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from common import DTYPES, GIB, SEED, add_options, alternate, load_library, medians, peak_memory, report
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

load_library()

from flashvideo.config import STAGE1, STAGE2, TEXT_TOKENS, VAE, DiTConfig, VAEConfig  # noqa: E402
from flashvideo.dit import FlashVideoDiT  # noqa: E402
from flashvideo.training.loop.precision import cpu_has_bf16  # noqa: E402
from flashvideo.vae import VideoVAE  # noqa: E402

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
SAMPLE_LAYERS = 3  # timed for each backend and precision
TIME_BUDGET = 420.0  # seconds after which no further row is started
COLUMNS = ["work", "precision", "attention", "layers timed", "seconds", "peak memory, GiB", "TFLOP", "TFLOP/s"]
COLUMNS += ["of matmul"]


@dataclass(frozen=True)
class Video:
    """A video's size in pixels and frames."""

    height: int
    width: int
    frames: int

    @property
    def latent(self) -> tuple[int, int, int, int, int]:
        """Shape of its latent [B, C, T, H, W]."""
        return (1, 16, (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8)

    def __str__(self) -> str:
        """As in "1072x1920x49"."""
        return f"{self.height}x{self.width}x{self.frames}"


@dataclass(frozen=True)
class Plan:
    """What is run."""

    stages: tuple[tuple[str, DiTConfig, Video], ...]
    vae: VAEConfig
    vae_videos: tuple[Video, ...]
    precisions: tuple[str, ...]
    matmul: int  # rows and columns of the matrix product that gives the card's rate


OFFICIAL = Plan(
    (
        ("stage I, one evaluation", STAGE1, Video(256, 480, 49)),
        ("stage II, one evaluation", STAGE2, Video(1072, 1920, 49)),
        ("stage II, one evaluation", STAGE2, Video(1440, 2560, 49)),
    ),
    VAE,
    (Video(256, 480, 49), Video(1072, 1920, 49)),
    ("bfloat16", "float16"),
    8192,
)
SMALL_STAGE2 = replace(STAGE2, num_layers=4, hidden_size=128, num_heads=2, ff_dim=512, text_dim=64)
SMALL = Plan(
    (
        ("stage I, one evaluation", replace(SMALL_STAGE2, degradation_embedding=False, frame_count_embedding=False),
         Video(64, 96, 9)),
        ("stage II, one evaluation", SMALL_STAGE2, Video(128, 192, 9)),
    ),
    VAEConfig(16, (1, 2, 2, 4), encoder_blocks=1, decoder_blocks=2, norm_groups=16),
    (Video(64, 96, 9),),
    ("float32", "bfloat16"),
    512,
)  # fmt: skip


class Bench:
    """Runs a plan on one device within the time budget, and collects the table's rows."""

    def __init__(self, device: str) -> None:
        """Start the clock."""
        self.device, self.rows, self.rates = device, [], {}
        self.on_gpu = torch.device(device).type == "cuda"
        self.end = time.perf_counter() + TIME_BUDGET

    def rate(self, precision: str, size: int) -> float:
        """Measured rate of a square matrix product, FLOP/s."""
        if precision not in self.rates:
            a, b = (torch.randn(size, size, device=self.device).to(DTYPES[precision]) for _ in "ab")
            seconds = self.seconds(lambda: a @ b, rounds=20)
            self.rates[precision] = 2 * size**3 / seconds
        return self.rates[precision]

    def seconds(self, run: Callable[[], object], rounds: int = 2) -> float:
        """Median time of `rounds` runs after one that warms up."""
        return medians(alternate({"run": run}, rounds, self.device))["run"]

    def add(self, work: str, precision: str, attention: str, layers: str, flops: float,
            make: Callable[[], Callable[[], object]], scale: float = 1.0, size: int = 512) -> float:  # fmt: skip
        """Time what `make` makes, 1 / `scale` of the work, and add a row; returns the seconds, infinite if it can't."""
        seconds = memory = None
        if time.perf_counter() > self.end:
            layers = "skipped: time budget"
        else:
            try:
                run = make()
                memory = peak_memory(run, self.device) / GIB
                seconds = self.seconds(run) * scale
            except torch.OutOfMemoryError:
                layers = "out of memory"
            except RuntimeError as error:  # this backend has no kernel for this card or shape
                if "kernel" not in str(error):
                    raise
                layers = "not on this card"
        speed = flops / seconds if seconds else None
        share = speed / self.rate(precision, size) if speed else None
        self.rows.append([work, precision, attention, layers, seconds, memory, flops / 1e12,
                          speed and speed / 1e12, share])  # fmt: skip
        sys.stderr.write(f"{work}, {precision}, {attention}: {layers}, {seconds} s\n")
        return seconds or float("inf")


def dit_flops(config: DiTConfig, video: Video) -> float:
    """Matrix products and attention of one evaluation with batch 1."""
    _, _, frames, height, width = video.latent
    tokens = TEXT_TOKENS + frames * (height // 2) * (width // 2)
    products = 2 * tokens * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.ff_dim)
    return config.num_layers * (products + 4 * tokens**2 * config.hidden_size)


def evaluation(config: DiTConfig, video: Video, precision: str, device: str) -> Callable[[], Tensor]:
    """One call of a network with random weights."""
    torch.manual_seed(SEED)
    dtype = DTYPES[precision]
    network = FlashVideoDiT(config, device=device, dtype=dtype).eval()
    latent = torch.randn(video.latent, device=device).to(dtype)
    context = torch.randn(1, TEXT_TOKENS, config.text_dim, device=device).to(dtype)
    timestep = torch.tensor([500.0], device=device)
    step = 675 if config.degradation_embedding else None
    return lambda: network(latent, timestep, context, degradation_step=step)


def run_stage(bench: Bench, plan: Plan, work: str, config: DiTConfig, video: Video) -> None:
    """Time a stage with each backend and precision on a few layers, then the whole of it with the fastest."""
    backends = BACKENDS if bench.on_gpu else {"default": None}
    work, flops = f"{work}, {video}", dit_flops(config, video)
    layers = min(SAMPLE_LAYERS, config.num_layers)
    best = (float("inf"), plan.precisions[0], next(iter(backends)))
    for precision in plan.precisions:
        run = evaluation(replace(config, num_layers=layers), video, precision, bench.device)
        for name, backend in backends.items():
            with attention_backend(backend):
                seconds = bench.add(work, precision, name, f"{layers} of {config.num_layers}", flops,
                                    lambda run=run: run, config.num_layers / layers, plan.matmul)  # fmt: skip
            best = min(best, (seconds, precision, name))
    del run
    _, precision, name = best
    with attention_backend(backends[name]):  # all layers may not fit: they are made where that is reported
        make = partial(evaluation, config, video, precision, bench.device)
        bench.add(work, precision, name, "all", flops, make, size=plan.matmul)


def attention_backend(backend: SDPBackend | None) -> sdpa_kernel:
    """The context in which PyTorch's attention is `backend`; None leaves the choice to PyTorch."""
    return sdpa_kernel(list(BACKENDS.values()) + [SDPBackend.MATH] if backend is None else backend)


def run_vae(bench: Bench, plan: Plan, video: Video) -> None:
    """Time encode and decode of one video in each precision."""
    for precision in plan.precisions:
        torch.manual_seed(SEED)
        dtype = DTYPES[precision]
        vae = VideoVAE(plan.vae, device=bench.device, dtype=dtype).eval()
        pixels = torch.rand(1, 3, video.frames, video.height, video.width, device=bench.device).to(dtype) * 2 - 1
        latent = torch.randn(video.latent, device=bench.device).to(dtype)
        for work, run in (("encode", partial(vae.encode, pixels)), ("decode", partial(vae.decode, latent))):
            flops = counted_flops(run)
            bench.add(f"VAE {work}, {video}", precision, "", "all", flops, lambda run=run: run, size=plan.matmul)


def counted_flops(run: Callable[[], object]) -> float:
    """Floating-point operations of convolutions and products in `run`, counted while it runs; 0 if memory is short."""
    try:
        with FlopCounterMode(display=False) as counter:
            run()
    except torch.OutOfMemoryError:
        return 0.0
    return counter.get_total_flops()


@torch.inference_mode()
def main() -> None:
    """Run the plan, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--small", action="store_true", help="small networks and videos, also without a GPU")
    options = parser.parse_args()
    if not options.small and torch.device(options.device).type != "cuda":
        raise SystemExit("The official sizes need a CUDA or ROCm GPU; --small runs on a CPU.")
    bench, plan = Bench(options.device), SMALL if options.small else OFFICIAL
    if torch.device(options.device).type == "cpu" and not cpu_has_bf16():
        plan = replace(plan, precisions=("float32",))  # bfloat16 would take minutes
    try:
        for work, config, video in plan.stages:
            run_stage(bench, plan, work, config, video)
        for video in plan.vae_videos:
            run_vae(bench, plan, video)
    finally:  # what was measured is reported, whatever ended it
        facts = {f"matmul {name}": f"{rate / 1e12:.3g} TFLOP/s" for name, rate in bench.rates.items()}
        title = "Small sizes" if options.small else "Official sizes, batch 1, random weights"
        report(title, COLUMNS, bench.rows, device=options.device, facts=facts, target=options.json)


if __name__ == "__main__":
    main()
