"""The nodes on a graphics card that isn't there: ComfyUI loads, offloads and samples as on a real one.

Nothing is computed, but tensors of the card and of main memory don't mix: what would stop on a card stops here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_management as management
import pytest
import torch
from live_bytes import LiveBytes, flash_attention
from pretended_card import CARD, PretendedCard, prepare_card
from safetensors.torch import save_file
from torch import Tensor

GIGABYTE = 2**30
CLIP = (9, 64, 96, 3)
LATENT = (1, 16, 3, 8, 12)
SAMPLERS = ["euler", "heun", "dpmpp_2m", "res_multistep", "euler_ancestral", "er_sde", "euler_cfg_pp"]


@pytest.fixture()
def card(submodule: Callable, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedCard]:
    """A card of 24 GB, as ComfyUI sees it. Every question about numbers gets a yes."""
    prepare_card(monkeypatch)
    device, rest = torch.device(CARD, 0), torch.device("cpu")

    def free(device: torch.device | None = None, torch_free_too: bool = False) -> Any:
        return (22 * GIGABYTE, 22 * GIGABYTE) if torch_free_too else 22 * GIGABYTE

    for name in ("get_torch_device", "vae_device", "text_encoder_device"):
        monkeypatch.setattr(management, name, lambda: device)
    for name in ("unet_offload_device", "vae_offload_device", "text_encoder_offload_device", "intermediate_device"):
        monkeypatch.setattr(management, name, lambda: rest)
    for name in ("should_use_bf16", "should_use_fp16"):
        monkeypatch.setattr(management, name, lambda *_, **__: True)
    monkeypatch.setattr(management, "get_free_memory", free)
    monkeypatch.setattr(management, "get_total_memory", free)
    monkeypatch.setattr(management, "soft_empty_cache", lambda *_: None)
    monkeypatch.setattr(management, "current_loaded_models", [])
    monkeypatch.setattr(management, "cpu_state", management.CPUState.GPU)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(management, "lowvram_available", True)
    # PyTorch has no random numbers there.
    noise = lambda x, seed=None: lambda *_: torch.randn_like(x)  # noqa: E731
    monkeypatch.setattr(comfy.k_diffusion.sampling, "default_noise_sampler", noise)
    monkeypatch.setattr(submodule("flashvideo.dit.rope"), "COMPLEX_DEVICES", ("cpu", CARD))
    # A degraded latent is known by its numbers, where sigmas begin is one, and so are spreads.
    degraded, stage2 = submodule("nodes.native.degradation"), submodule("nodes.stage2")

    def strength_of(latent: dict[str, Any]) -> int | None:
        if degraded.MARK not in latent:
            return None
        latent["samples"].strength = 675
        return 675

    monkeypatch.setattr(degraded, "_remember", lambda *_: None)
    monkeypatch.setattr(degraded, "known_strength", lambda samples, *_: getattr(samples, "strength", None))
    monkeypatch.setattr(stage2, "degradation_of", strength_of)
    monkeypatch.setattr(stage2, "preset_of", lambda _latent: None)
    for module in (degraded, stage2):
        monkeypatch.setattr(module, "looks_like_noise", lambda *_: False)
    monkeypatch.setattr(degraded, "check_degraded_start", lambda *_, **__: None)
    for module in (degraded, submodule("nodes.native.schedule_guard")):
        monkeypatch.setattr(module, "check_spread", lambda *_, **__: None)
    return PretendedCard(answer=True, takes_numbers=True)


@pytest.fixture(scope="module")
def vae_file(submodule: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE as wide as FlashVideo-Nano's, with fewer layers."""
    config = replace(submodule("flashvideo.config").NANO_VAE, decoder_blocks=1)
    path = tmp_path_factory.mktemp("vae") / "shallow.safetensors"
    save_file(submodule("flashvideo.vae").VideoVAE(config).state_dict(), path)
    return path


def shallow(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first two layers: each costs a second here, and they are all alike."""
    return {name: state[name] for name in state if not re.match(r"blocks\.([2-9]|\d\d)\.", name)}


@pytest.fixture()
def graph(card: PretendedCard, comfy_nodes: dict, submodule: Callable, vae_file: Path) -> Iterator[SimpleNamespace]:
    """FlashVideo-Nano with few layers in main memory, as the loaders leave it, and what most graphs begin with."""
    native, nano = submodule("nodes.native.model"), submodule("flashvideo.nano")
    clip = submodule("nodes.native.clip").load_clip_native(None)
    vae = submodule("nodes.native.vae").load_vae_native(vae_file)
    draft, refiner, eight_bits = (
        native.load_model(shallow(nano.nano_state(stage)), dtype)
        for stage, dtype in (
            ("stage1", torch.bfloat16), ("stage2", torch.bfloat16), ("stage2", torch.float8_e4m3fn)
        )
    )  # fmt: skip
    with card, torch.inference_mode(False), torch.no_grad():
        positive, negative = comfy_nodes["FlashVideoTextEncode"].execute(clip, "a red circle moves left", "none").result
        assert positive[0][0].device.type == "cpu"
        latent = {"samples": torch.zeros(LATENT)}
        degraded = comfy_nodes["FlashVideoLatentDegradation"].execute(latent, 675, 0).result[0]
        yield SimpleNamespace(
            nodes=comfy_nodes, draft=draft, refiner=refiner, eight_bits=eight_bits, vae=vae,
            texts=(positive, negative), latent=latent, degraded=degraded,
        )  # fmt: skip


def refined(
    graph: SimpleNamespace, model: Any, solver: str = "euler", latent: dict | None = None, **options: int
) -> Tensor:
    run = graph.nodes["FlashVideoStage2Refiner"].execute
    latent = graph.degraded if latent is None else {**graph.degraded, **latent}
    return run(model, *graph.texts, latent, 2, 13.0, 2.5, solver, **options).result[0]["samples"]


def in_main_memory(result: Tensor, shape: tuple[int, ...]) -> bool:
    return (tuple(result.shape), result.device.type, result.dtype) == (shape, "cpu", torch.float32)


@pytest.mark.parametrize("state", ["NORMAL_VRAM", "LOW_VRAM", "NO_VRAM"])
def test_both_stages_and_the_vae(graph: SimpleNamespace, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all weights on the card, and with none."""
    monkeypatch.setattr(management, "vram_state", getattr(management.VRAMState, state))
    empty = graph.nodes["EmptyFlashVideoLatent"].execute(96, 64, 9, 1).result[0]
    draft = graph.nodes["FlashVideoStage1Sampler"].execute(graph.draft, *graph.texts, empty, 0, 3, 6.0, True).result[0]
    assert in_main_memory(draft["samples"], LATENT)
    assert in_main_memory(refined(graph, graph.refiner, "heun"), LATENT)
    assert graph.refiner.loaded_size() == (0 if state == "NO_VRAM" else graph.refiner.model_size())
    for decode, options in (("VAEDecode", ()), ("VAEDecodeTiled", (64, 16))):
        assert in_main_memory(graph.nodes[decode]().decode(graph.vae, draft, *options)[0], CLIP)
    for encode, options in (("VAEEncode", ()), ("VAEEncodeTiled", (64, 16))):
        latent = graph.nodes[encode]().encode(graph.vae, torch.zeros(CLIP), *options)[0]
        assert in_main_memory(latent["samples"], LATENT)


@pytest.mark.parametrize("kind", ["fp8", "windows", "tiles", "wide view", "narrow view"])
def test_ways_to_refine(graph: SimpleNamespace, kind: str) -> None:
    nodes, model, options = graph.nodes, graph.refiner, {}
    if kind == "fp8":
        model = graph.eight_bits
    elif kind == "windows":
        options = {"window": 5, "overlap": 4}
    elif kind == "tiles":
        model = nodes["FlashVideoSpatialTiles"].execute(model, 128).result[0]
    else:
        model = nodes["FlashVideoFastAttention"].execute(model, kind).result[0]
    assert in_main_memory(refined(graph, model, **options), LATENT)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stock_samplers(graph: SimpleNamespace, sampler: str) -> None:
    model = graph.nodes["FlashVideoRefinerSettings"].execute(graph.refiner, 675, 2.5, 5, 4).result[0]
    run = graph.nodes["KSampler"]().sample
    result = run(model, 0, 3, 2.0, sampler, "simple", *graph.texts, graph.latent, denoise=0.7)[0]
    assert in_main_memory(result["samples"], LATENT)
    masked = {**graph.latent, "noise_mask": torch.ones(1, 1, 64, 96)}
    result = run(model, 0, 2, 2.0, sampler, "simple", *graph.texts, masked)[0]
    assert in_main_memory(result["samples"], LATENT)


@pytest.mark.parametrize("sampler", ["FlashVideo", "euler", "dpmpp_2m", "euler_ancestral"])
def test_comfyui_made_enough_room_for_a_long_latent(
    graph: SimpleNamespace,
    sampler: str,
    asked_memory: list[float],
    submodule: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """201 frames in windows: a network so small that latents are most of what is held."""

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
        return flash_attention(q, k, v, heads, 0)

    monkeypatch.setattr(submodule("nodes.native.attention"), "optimized_attention", attention)
    latent = {"samples": torch.zeros(1, 16, 51, 32, 48)}
    with LiveBytes(device=CARD) as held:
        if sampler == "FlashVideo":
            refined(graph, graph.refiner, latent=latent, window=49, overlap=16)
        else:
            model = graph.nodes["FlashVideoRefinerSettings"].execute(graph.refiner, 675, 2.5, 49, 16).result[0]
            graph.nodes["KSampler"]().sample(model, 0, 2, 13.0, sampler, "simple", *graph.texts, latent)
    (asked,) = asked_memory
    assert 0.5 * asked < held.peak - graph.refiner.model_size() <= asked


@pytest.mark.parametrize("share", [2.0, 0.9])
def test_a_long_video(graph: SimpleNamespace, submodule: Callable, share: float) -> None:
    """Everything of Refine Long Video but its files; `share` of what the VAE would hold in one piece."""
    native, library = submodule("nodes.native.long_video"), submodule("flashvideo.refiner.run")
    size = submodule("flashvideo.frames").TargetSize("scale", scale=2)
    held = submodule("flashvideo.vae.memory").held_bytes
    settings = library.RefineSettings(size, window=9, overlap=4, steps=2)
    network, device = graph.vae.first_stage_model, graph.vae.device
    budget = share * held(network.decoder, (6, 8, 12), graph.vae.vae_dtype)
    guided = native.GuidedRefiner(graph.refiner, *graph.texts, settings, device)
    loaded = native.LoadedVAE(graph.vae, budget)
    networks = library.Networks(guided, loaded, torch.zeros(1, 1, 1), device, budget, GIGABYTE)
    clip, parts = library.TensorClip(torch.zeros(13, 32, 48, 3, dtype=torch.uint8)), []
    work = submodule("flashvideo.refiner.work_folder").MemoryWork(library.ENCODE)
    pixels = settings.size.resolve(clip.height, clip.width)
    run = library.RefineRun(networks, clip, pixels, replace(settings, cfg=1.0), work, segment_chunks=2)
    run.run(lambda _, chunks: parts.extend(chunks))
    assert in_main_memory(torch.cat(parts), (13, 64, 96, 3))
    assert (run.main_bytes() > 0) == (share < 1)
