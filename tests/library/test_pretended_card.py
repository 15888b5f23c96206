"""The library on a graphics card that isn't there: where things lie, how much of them, and when one waits for it.

Full-size networks and videos cost nothing here. What kernels compute, and how fast, only a real card can tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from live_bytes import LiveBytes, flash_attention
from pretended_card import CARD, PretendedCard, prepare_card
from small_models import TINY_REFINER
from torch import Tensor

from flashvideo.config import NANO_TEXT_ENCODER, NANO_VAE, STAGE1, STAGE2, VAE, DiTConfig, VAEConfig
from flashvideo.dit import FlashVideoDiT, rope
from flashvideo.dit.tile_attention import VIEWS, WindowAttention
from flashvideo.frames import TargetSize
from flashvideo.memory import dit_bytes
from flashvideo.refiner.run import ENCODE, Networks, RefineRun, RefineSettings, TensorClip
from flashvideo.refiner.work_folder import MemoryWork
from flashvideo.samplers import sample_stage1, sample_stage2
from flashvideo.t5 import T5Encoder, load_encoder
from flashvideo.vae import VideoVAE, decode_chunks, encode_chunks
from flashvideo.vae.memory import MOVE, STORE_SHARE, VAE_SHARE, decode_bytes, encode_bytes, held_bytes, plan_vae_tiles
from flashvideo.vae.stream import TiledVAEStream, VAEStream, plan_stream, stream_within
from flashvideo.vae.tiles import decode_in_tiles, encode_in_tiles

GIGABYTE = 2**30
DRAFT, HD, FULL_HD = (13, 34, 60), (13, 90, 160), (13, 136, 240)  # latents of 480x272, 1280x720, 1920x1088, 49 frames
SHALLOW_1, SHALLOW_2 = replace(STAGE1, num_layers=2), replace(STAGE2, num_layers=2)
# As wide, and so as large, in a fraction of the time.
SHALLOW_VAE, SHALLOW_NANO_VAE = (replace(vae, encoder_blocks=1, decoder_blocks=1) for vae in (VAE, NANO_VAE))


@pytest.fixture()
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedCard]:
    """The card, with CUDA's way to turn positions."""
    prepare_card(monkeypatch)
    monkeypatch.setattr(rope, "COMPLEX_DEVICES", ("cpu", CARD))
    with PretendedCard() as card, torch.no_grad():
        yield card


def text(config: DiTConfig) -> Tensor:
    return torch.randn(1, 226, config.text_dim, device=CARD, dtype=torch.bfloat16)


def test_main_memory_and_the_card_can_not_be_mixed(card: PretendedCard) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=CARD) + torch.ones(3)
    assert not card.reads
    assert float(torch.ones(3, device=CARD).sum()) == 0
    assert card.reads == 1


def test_samplers(card: PretendedCard) -> None:
    """Three steps in flight: nothing waits for the card."""

    def noise(*_: int) -> Tensor:
        return torch.randn(1, 16, *DRAFT, device=CARD)

    for config, sample in ((SHALLOW_1, sample_stage1), (SHALLOW_2, sample_stage2)):
        network = FlashVideoDiT(config, device=CARD, dtype=torch.bfloat16)
        options = {"step_noise": noise} if config.stage == 1 else {"solver": "heun"}
        latent = sample(network, noise(), text(config), text(config), steps=3, **options)
        assert (latent.device.type, latent.shape) == (CARD, (1, 16, *DRAFT))
    assert not card.reads


def test_the_text_encoder_is_placed_once(card: PretendedCard) -> None:
    weights = T5Encoder(NANO_TEXT_ENCODER).weights()
    with LiveBytes(device=CARD) as held:
        encoder = load_encoder(weights, CARD, torch.bfloat16)
    placed = sum(parameter.nbytes for parameter in encoder.parameters())
    assert placed <= held.peak <= 1.01 * placed
    assert {(weight.device.type, weight.dtype) for weight in encoder.parameters()} == {(CARD, torch.bfloat16)}


@pytest.mark.parametrize("tiles", VIEWS.values())
def test_views(tiles: tuple[int, int, int], card: PretendedCard) -> None:
    frames, height, width = FULL_HD
    attention = WindowAttention(226, (frames, height // 2, width // 2), tiles, flash_attention)
    network = FlashVideoDiT(SHALLOW_2, device=CARD, dtype=torch.bfloat16)
    latent, time = torch.randn(1, 16, *FULL_HD, device=CARD, dtype=torch.bfloat16), torch.zeros(1, device=CARD)
    order = attention.order.to(CARD)
    velocity = network(latent, time, text(STAGE2), degradation_step=675, attention=attention, order=order)
    assert (velocity.device, velocity.shape) == (latent.device, latent.shape)
    assert not card.reads


@pytest.mark.parametrize("shape", [DRAFT, HD, FULL_HD])
@pytest.mark.parametrize("config", [STAGE1, STAGE2])
def test_memory_of_the_networks(config: DiTConfig, shape: tuple[int, int, int], card: PretendedCard) -> None:
    network = FlashVideoDiT(replace(config, num_layers=2), device=CARD, dtype=torch.bfloat16)
    latent, time = torch.randn(1, 16, *shape, device=CARD, dtype=torch.bfloat16), torch.zeros(1, device=CARD)
    step = 675 if config.stage == 2 else None
    context = text(config)
    with LiveBytes(latent, time, context, *network.parameters(), device=CARD) as memory:
        network(latent, time, context, degradation_step=step, attention=flash_attention)
    assert memory.added == pytest.approx(dit_bytes(config, shape, torch.bfloat16), rel=0.02)
    assert not card.reads


@pytest.mark.slow
@pytest.mark.parametrize("shape", [DRAFT, FULL_HD])
def test_memory_of_the_vae(shape: tuple[int, int, int], card: PretendedCard) -> None:
    frames, height, width = 4 * shape[0] - 3, 8 * shape[1], 8 * shape[2]
    vae = VideoVAE(VAE, device=CARD, dtype=torch.float16)
    for run, size, formula in (
        (vae.decode, (1, 16, *shape), decode_bytes),
        (lambda video: vae.encode(video).mode(), (1, 3, frames, height, width), encode_bytes),
    ):
        with LiveBytes(*vae.parameters(), device=CARD) as memory:
            run(torch.randn(size, device=CARD, dtype=torch.float16))
        assert memory.added == pytest.approx(formula(vae, size, torch.float16), rel=0.1)
    assert not card.reads


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "half", "shape", "gigabytes", "main_gigabytes", "kind"),
    [
        (VAE, "encoder", HD, 24, 64, VAEStream),
        (SHALLOW_VAE, "encoder", HD, 12, 32, TiledVAEStream),
        (SHALLOW_VAE, "decoder", HD, 16, 64, TiledVAEStream),
        (SHALLOW_VAE, "decoder", FULL_HD, 24, 32, TiledVAEStream),
    ],
)
def test_a_stream_of_the_vae_stays_within_the_card(
    config: VAEConfig, half: str, shape: tuple[int, int, int], gigabytes: int, main_gigabytes: int, kind: type,
    card: PretendedCard,
) -> None:  # fmt: skip
    """What tiles leave for each other is larger than most cards: it waits in main memory, also when it is restored."""
    _, *grid = shape
    network = getattr(VideoVAE(config, device=CARD, dtype=torch.float16), half)
    sizes, channels, scale = (encode_chunks(17), 3, 8) if half == "encoder" else (decode_chunks(5), 16, 1)
    limits = (
        *(tuple(grid), VAE_SHARE * gigabytes * GIGABYTE, torch.device(CARD)),
        STORE_SHARE * main_gigabytes * GIGABYTE,
    )
    stream, plan = stream_within(network, sizes, *limits), plan_stream(network, len(sizes), *limits)
    assert isinstance(stream, kind)
    with LiveBytes(*network.parameters(), device=CARD) as held, LiveBytes(device="cpu") as stored:
        for size in sizes:
            stream.restore(stream.done, stream.state(), torch.device(CARD))
            chunk = torch.randn(1, channels, size, *(scale * side for side in grid), device=CARD, dtype=torch.float16)
            assert stream(chunk).device.type == CARD
    assert held.added <= VAE_SHARE * gigabytes * GIGABYTE
    if plan is not None:
        assert 0.5 * plan.device_bytes <= held.added <= 1.1 * plan.device_bytes
        assert 0.8 * plan.stored_bytes <= stored.peak <= 1.1 * plan.stored_bytes
    assert not card.reads


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_tiles_of_a_clip_stay_within_the_card(half: str, card: PretendedCard) -> None:
    """A clip that ComfyUI has brought to the card already; what is stored between layers lies in main memory."""
    vae, shape = VideoVAE(SHALLOW_VAE, device=CARD, dtype=torch.float16), (3, *HD[1:])
    frames, height, width = 4 * shape[0] - 3, 8 * shape[1], 8 * shape[2]
    plan = plan_vae_tiles(getattr(vae, half), shape, torch.float16, 8 * GIGABYTE, 4 * GIGABYTE, None, MOVE)
    assert len(plan.groups) > 1
    video = torch.zeros(1, 3, frames, height, width, device=CARD if half == "encoder" else "cpu", dtype=torch.float16)
    latent = torch.zeros(1, 16, *shape, device=CARD, dtype=torch.float16)
    with (
        LiveBytes(video, latent, *vae.parameters(), device=CARD) as held,
        LiveBytes(video, device="cpu") as stored,
    ):
        if half == "encoder":
            encode_in_tiles(vae, video, plan, CARD)
        else:
            decode_in_tiles(vae, latent, plan, video, CARD)
    assert 0.5 * plan.device_bytes <= held.added <= 1.1 * plan.device_bytes
    assert 0.8 * plan.stored_bytes <= stored.added <= 1.1 * plan.stored_bytes
    assert not card.reads


@pytest.mark.slow
@pytest.mark.parametrize(("share", "color_match", "tile"), [(2.0, "none", 0), (2.0, "adain", 0), (0.9, "wavelet", 128)])
def test_a_whole_run(share: float, color_match: str, tile: int, card: PretendedCard) -> None:
    """From a clip in main memory to one, where the networks wait, too.

    `share` is what the VAE may hold of what the whole picture takes.
    """
    dit, vae = FlashVideoDiT(TINY_REFINER), VideoVAE(SHALLOW_NANO_VAE)
    room = share * held_bytes(vae.decoder, (4, 10, 20), torch.float32)
    context, device = torch.randn(1, 6, TINY_REFINER.text_dim), torch.device(CARD)
    networks = Networks(dit, vae, context, device, room, vae_store=GIGABYTE)
    clip = TensorClip(torch.zeros(13, 40, 80, 3, dtype=torch.uint8))
    settings = RefineSettings(
        TargetSize("scale", scale=2), steps=2, window=9, overlap=4, tile=tile, color_match=color_match
    )
    parts: list[Tensor] = []
    pixels = settings.size.resolve(clip.height, clip.width)
    run = RefineRun(networks, clip, pixels, settings, MemoryWork(ENCODE), segment_chunks=1)
    run.run(lambda _, chunks: parts.extend(chunks))
    assert [part.device.type for part in parts] == ["cpu"] * len(decode_chunks(4))
    assert sum(map(len, parts)) == 13
    assert (run.main_bytes() > 0) == (share < 1)
    assert {weight.device.type for weight in (*dit.parameters(), *vae.parameters())} == {"cpu"}
