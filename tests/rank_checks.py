"""What tests compute on several ranks and in one process, with the same code: `ranks` is None there."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from draws import normal
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from flashvideo.config import DiTConfig, VAEConfig
from flashvideo.dit import FlashVideoDiT, token_chunks
from flashvideo.dit.tile_attention import WindowAttention
from flashvideo.frames import TargetSize
from flashvideo.parallel import Ranks
from flashvideo.parallel.sharding import shard_weights
from flashvideo.refiner import Networks, RefineSettings, refine_frames
from flashvideo.samplers import guided_velocity, sample_stage1
from flashvideo.vae import VideoVAE, decode_chunks, encode_chunks
from flashvideo.vae.stream import VAEStream, stream_within

REFINER = DiTConfig(2, 48, 3, 16, 8, 96, degradation_embedding=True, frame_count_embedding=True)  # 3 heads
DRAFTER = DiTConfig(2, 48, 3, 16, 8, 96)
VAE = VAEConfig(4, (1, 1, 1, 2), encoder_blocks=1, decoder_blocks=1, norm_groups=2)
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which the counter doesn't know
GRID = (3, 7, 5)  # 105 video tokens: no number of ranks divides them, with or without the text


def network(config: DiTConfig) -> FlashVideoDiT:
    """A network with the same random weights everywhere."""
    torch.manual_seed(3)
    return FlashVideoDiT(config).eval()


def latent(grid: tuple[int, int, int] = GRID, batch: int = 1) -> Tensor:
    """A random latent of as many patches."""
    return normal(batch, 16, grid[0], 2 * grid[1], 2 * grid[2])


@torch.no_grad()
def evaluations(ranks: Ranks | None) -> dict[str, Any]:
    """Evaluations of both networks, each with something that could go wrong on ranks."""
    refiner, found = network(REFINER), {}
    time, step = torch.tensor([700.0]), {"degradation_step": 300, "ranks": ranks}
    found["plain"] = refiner(latent(), time, normal(1, 6, 8), **step)
    found["long text"] = refiner(latent(), time, normal(1, 100, 8), **step)
    found["batch"] = refiner(latent(batch=2), time.expand(2), normal(2, 6, 8), **step)
    found["one patch"] = refiner(latent((1, 1, 1)), time, normal(1, 6, 8), **step)
    found["four patches"] = refiner(latent((1, 2, 2)), time, normal(1, 1, 8), **step)
    sharded = network(REFINER)
    if ranks is not None:
        shard_weights(sharded, sharded.blocks, torch.device("cpu"))
    found["sharded"] = sharded(latent(), time, normal(1, 6, 8), **step)
    if ranks is not None:
        here = sum(weight.to_local().numel() for weight in sharded.blocks.parameters())
        assert here <= 1.1 * sum(weight.numel() for weight in sharded.blocks.parameters()) / ranks.size
    windows = WindowAttention(6, GRID, (1, 5, 5))
    run = {**step, "attention": windows, "order": windows.order}
    found["windows"] = refiner(latent(), time, normal(1, 6, 8), **run)
    usual, token_chunks.CHUNK_BYTES_CPU = token_chunks.CHUNK_BYTES_CPU, 1
    usual_multiple, token_chunks.CHUNK_MULTIPLE = token_chunks.CHUNK_MULTIPLE, 16
    found["chunks"] = refiner(latent(), time, normal(1, 6, 8), **run)
    token_chunks.CHUNK_BYTES_CPU, token_chunks.CHUNK_MULTIPLE = usual, usual_multiple
    for name, cfg in (("guided", 6.0), ("unguided", 1.0)):
        velocity = guided_velocity(refiner, normal(1, 6, 8), torch.zeros(1, 6, 8), cfg, 300, ranks)
        found[name] = velocity(latent(), torch.tensor(0.3))
    text, generator = normal(1, 6, 8, seed=1), torch.Generator().manual_seed(1)
    found["draft"] = sample_stage1(
        network(DRAFTER), latent(), text, torch.zeros_like(text),
        steps=3, step_noise=lambda _: torch.randn(latent().shape, generator=generator), ranks=ranks,
    )  # fmt: skip
    return found


@torch.no_grad()
def pictures(ranks: Ranks | None) -> dict[str, Tensor]:
    """Videos through both halves of the VAE, chunk by chunk: whole in one process, in tiles on ranks."""
    torch.manual_seed(4)
    vae, found = VideoVAE(VAE).eval(), {}
    # Latents of 6 x 13 and 9 x 8; in the second picture little memory for the store makes long groups of layers.
    video, latent = normal(1, 3, 21, 48, 104, seed=2).clamp(-1, 1), normal(1, 16, 4, 9, 8, seed=3)
    found["encoded"] = _stream(vae.encoder, encode_chunks(21), (6, 13), None, ranks, video)
    found["decoded"] = _stream(vae.decoder, decode_chunks(4), (9, 8), None, ranks, latent)
    found["decoded, little stored"] = _stream(vae.decoder, decode_chunks(4), (9, 8), 2e5, ranks, latent)
    found["decoded, one tile"] = _stream(vae.decoder, decode_chunks(4), (2, 3), None, ranks, latent[..., :2, :3])
    return found


def _stream(
    network: nn.Module, sizes: list[int], grid: tuple[int, int], store: float | None, ranks: Ranks | None, x: Tensor
) -> Tensor:
    """The whole result; after the first chunk another stream continues from what every rank has stored."""

    def stream() -> VAEStream:
        return stream_within(network, sizes, grid, None, torch.device("cpu"), store if ranks else None, ranks)

    first, *rest = x.split(sizes, dim=2)
    begun, resumed = stream(), stream()
    results = [begun(first)]
    state = begun.state()
    if ranks is not None:
        state = {name: tensor for part in ranks.collect(state) for name, tensor in part.items()}
    resumed.restore(1, state)
    return torch.cat((*results, *map(resumed, rest)), dim=2)


def refined(ranks: Ranks | None) -> dict[str, Tensor]:
    """Stage II from frames to frames: several windows, tiles, the prompt's guidance, colours."""
    torch.manual_seed(5)
    # Half precision would turn a difference in the last bit into one of its own steps.
    dit, vae = network(REFINER), VideoVAE(VAE).eval()
    networks = Networks(dit, vae, normal(1, 6, 8), ranks=ranks, stored=torch.float32)
    frames = normal(14, 40, 136, 3, seed=6).sigmoid()
    settings = RefineSettings(TargetSize("keep"), strength=300, steps=2, cfg=4.0, window=9, overlap=4, tile=128)
    return {"refined": refine_frames(networks, frames, settings)}


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


@torch.no_grad()
def counted(ranks: Ranks | None) -> dict[str, Any]:
    """What an evaluation and a guided one compute and receive."""
    refiner, text, found = network(REFINER), normal(1, 6, 8), {}
    velocity = guided_velocity(refiner, text, torch.zeros_like(text), 6.0, 300, ranks)
    for name, run in (
        ("once", lambda: refiner(latent(), torch.tensor([700.0]), text, degradation_step=300, ranks=ranks)),
        ("guided", lambda: velocity(latent(), torch.tensor(0.3))),
    ):
        before = Counter() if ranks is None else ranks.traffic.received.copy()
        with FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: _attention_flops}) as counter:
            run()
        received = Counter() if ranks is None else ranks.traffic.received - before
        found[name] = {"flops": counter.get_total_flops(), **received}
    return found


def both(ranks: Ranks | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """All of this in one group of processes: results, and what was counted."""
    return {**evaluations(ranks), **pictures(ranks), **refined(ranks)}, counted(ranks)
