"""FlashVideo-Nano: fits its budget, is the same everywhere, and its untrained networks give numbers of useful size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flashvideo.checkpoints import CheckpointError, load_dit, load_vae, read_vae
from flashvideo.checkpoints.convert import convert_file
from flashvideo.checkpoints.weights import open_weights
from flashvideo.config import (
    NANO_FOOTAGE_STAGE2,
    NANO_FOOTAGE_VAE,
    NANO_STAGE1,
    NANO_STAGE2,
    NANO_TEXT_ENCODER,
    NANO_VAE,
    STAGE1,
    STAGE2,
    TEXT_TOKENS,
    VAE,
    DiTConfig,
    VAEConfig,
)
from flashvideo.nano import (
    NANO_FOLDER,
    NANO_PARTS,
    NANO_SEED,
    build_nano,
    build_part,
    latent_family,
    nano_is_trained,
    nano_preview,
    nano_state,
    pair_notice,
)
from flashvideo.t5 import t5_shapes
from flashvideo.training.loop.metrics import psnr
from flashvideo.training.scenes.stream import SceneStream
from flashvideo.vae import VideoVAE

FILES_BUDGET, MEMORY_BUDGET = 32_000_000, 40_000_000  # bytes of all parts together
PROJ_OUT = [0.1405029296875, -0.042205810546875, 0.10980224609375]
CONV_OUT = [0.06134033203125, 0.0160675048828125, -0.00328826904296875]


@pytest.fixture(scope="module")
def nano() -> dict[str, dict[str, Tensor]]:
    """The untrained build."""
    return build_nano(NANO_SEED)


@pytest.fixture(scope="module")
def picture() -> Tensor:
    """A clip [1, 3, 17, 64, 96] with the spectrum of natural pictures: amplitude falls as 1 / frequency."""
    rows, columns = torch.fft.fftfreq(64)[:, None], torch.fft.rfftfreq(96)[None]
    frequency = (rows**2 + columns**2).sqrt().clamp(min=1 / 96)
    noise = torch.randn(1, 3, 17, 64, 96, generator=torch.Generator().manual_seed(0))
    clip = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(64, 96))
    return (clip / clip.std() / 2).clamp(-1, 1)


def test_all_parts_fit_the_budget_in_half_precision(nano: dict) -> None:
    assert set(nano) == set(NANO_PARTS)
    assert all(tensor.dtype == torch.float16 for state in nano.values() for tensor in state.values())
    assert sum(tensor.nbytes for state in nano.values() for tensor in state.values()) <= MEMORY_BUDGET


def test_the_trained_weights_come_along_and_fit_the_budget() -> None:
    assert nano_is_trained()
    assert sum((NANO_FOLDER / f"{part}.safetensors").stat().st_size for part in NANO_PARTS) <= FILES_BUDGET
    for part, untrained in build_nano(NANO_SEED).items():
        state = nano_state(part)
        assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in untrained.items()}
        assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in state.values())


def test_the_trained_vae_gives_clips_back_and_its_latents_are_normalised() -> None:
    """It reaches 25 dB on held-out drafts; an untrained one stays below 10."""
    vae, stream = load_vae(nano_state("vae"), dtype=torch.float32).eval(), SceneStream("test", 64, 112, 17, 11)
    scores, spreads = [], []
    with torch.no_grad():
        for index in range(3):
            clip = stream.sample(index)[0][None]
            latent = vae.encode(clip).mode()
            scores.append(psnr(vae.decode(latent), clip))
            spreads.append(latent.std().item())
    assert sum(scores) / len(scores) > 22
    assert 0.5 < sum(spreads) / len(spreads) < 2


@pytest.mark.parametrize(("part", "stage"), [("vae", NANO_STAGE2), ("footage_vae", NANO_FOOTAGE_STAGE2)])
def test_previews_have_nanos_own_colours(part: str, stage: DiTConfig) -> None:
    """The linear map of 16 channels tells colours to 0.1 of [-1, 1], where clips themselves vary by 0.3."""
    vae, factors = load_vae(nano_state(part), dtype=torch.float32).eval(), nano_preview(stage)
    errors, spreads = [], []
    for index in range(4):
        clip = SceneStream("test", 64, 112, 1, 12).sample(index)[0]
        with torch.no_grad():
            latent = vae.encode(clip[None]).mode()[0, :, 0]
        seen = torch.einsum("chw,ck->khw", latent, factors[:-1]) + factors[-1, :, None, None]
        small = torch.nn.functional.adaptive_avg_pool2d(clip[:, 0], latent.shape[1:])
        errors.append((seen - small).square().mean())
        spreads.append(small.var())
    assert torch.stack(errors).mean().sqrt() < 0.1
    assert torch.stack(spreads).mean().sqrt() > 0.2


def test_a_seed_gives_the_same_weights_every_time(nano: dict) -> None:
    again, other = build_nano(NANO_SEED), build_nano(NANO_SEED + 1)
    for part, state in nano.items():
        assert all(torch.equal(tensor, again[part][name]) for name, tensor in state.items())
        assert any(not torch.equal(tensor, other[part][name]) for name, tensor in state.items())


def test_weights_are_the_same_on_every_machine(nano: dict) -> None:
    """Exact numbers: they come from integers, and every step from there is exactly rounded."""
    assert nano["stage1"]["proj_out.weight"][0, :3].tolist() == PROJ_OUT
    assert nano["vae"]["decoder.conv_out.conv.weight"][0, 0, 0, 0].tolist() == CONV_OUT


def test_files_in_the_folder_replace_the_untrained_weights(tmp_path: Path) -> None:
    assert not nano_is_trained(tmp_path)
    for part in NANO_PARTS[:-1]:
        save_file({"weight": torch.ones(1)}, tmp_path / f"{part}.safetensors")
    assert not nano_is_trained(tmp_path)
    assert "patch_embed.proj.weight" in nano_state("stage1", tmp_path)
    save_file({"weight": torch.ones(1)}, tmp_path / f"{NANO_PARTS[-1]}.safetensors")
    assert nano_is_trained(tmp_path)
    assert all(nano_state(part, tmp_path).keys() == {"weight"} for part in NANO_PARTS)


@pytest.mark.parametrize("groups", [4, None])
def test_a_vae_in_the_folder_says_how_many_norm_groups_it_has(groups: int | None, tmp_path: Path) -> None:
    """Widths of 16, 32, 64 and 96 channels divide by 16, and that is what a file means that says nothing."""
    config = VAEConfig(16, (1, 2, 4, 6), encoder_blocks=1, decoder_blocks=1, norm_groups=groups or 16)
    metadata = {} if groups is None else {"flashvideo.norm_groups": str(groups)}
    for part in NANO_PARTS:
        save_file({"weight": torch.ones(1)}, tmp_path / f"{part}.safetensors")
    state = VideoVAE(config).state_dict()
    save_file(state, tmp_path / "vae.safetensors", metadata=metadata)
    convert_file(tmp_path / "vae.safetensors", tmp_path / "converted.safetensors")
    for source in (nano_state("vae", tmp_path), tmp_path / "vae.safetensors", tmp_path / "converted.safetensors"):
        assert read_vae(source)[0] == config
        assert load_vae(source).config == config
        norms = [module for module in load_vae(source).modules() if isinstance(module, torch.nn.GroupNorm)]
        assert norms and all(norm.num_groups == config.norm_groups for norm in norms)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    for part in NANO_PARTS:
        (tmp_path / f"{part}.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"stage2\.safetensors is empty"):
        nano_state("stage2", tmp_path)


STAGES = {"stage1": NANO_STAGE1, "stage2": NANO_STAGE2, "footage_stage2": NANO_FOOTAGE_STAGE2}


@pytest.mark.parametrize("part", STAGES)
def test_stages_load_as_what_they_are(nano: dict, part: str) -> None:
    for state in (nano[part], nano_state(part), NANO_FOLDER / f"{part}.safetensors"):
        assert load_dit(state, stage=int(part[-1])).config == STAGES[part]


@pytest.mark.parametrize(("part", "config"), [("vae", NANO_VAE), ("footage_vae", NANO_FOOTAGE_VAE)])
def test_vaes_load_as_what_they_are(nano: dict, part: str, config: VAEConfig) -> None:
    for state in (nano[part], nano_state(part), NANO_FOLDER / f"{part}.safetensors"):
        assert load_vae(state).config == config


def test_weights_that_are_stored_in_8_bits_load_as_the_numbers_that_they_are() -> None:
    file = open_weights(NANO_FOLDER / "footage_vae.safetensors")
    state, loaded = nano_state("footage_vae"), load_vae(NANO_FOLDER / "footage_vae.safetensors", dtype=torch.float32)
    kinds = {name: file.read(name).dtype for name in file.shapes}
    small = [name for name, dtype in kinds.items() if dtype == torch.float8_e4m3fn]
    assert set(kinds.values()) == {torch.float16, torch.float8_e4m3fn}
    assert sum(state[name].numel() for name in small) > 0.8 * sum(tensor.numel() for tensor in state.values())
    for name in small:
        assert torch.equal(file.read(name).float(), state[name].float())
        assert torch.equal(file.read(name).float(), loaded.state_dict()[name])


@pytest.mark.parametrize("part", STAGES)
def test_untrained_stages_predict_numbers_of_size_one_that_heed_text_and_time(nano: dict, part: str) -> None:
    dit = load_dit(nano[part], dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(1, 16, 3, 6, 10, generator=generator)
    text = torch.randn(1, TEXT_TOKENS, NANO_STAGE1.text_dim, generator=generator)
    extra = {"degradation_step": 675} if dit.config.stage == 2 else {}
    with torch.inference_mode():
        out, no_text, later = (
            dit(latent, torch.tensor([time]), context, **extra)
            for time, context in ((800.0, text), (800.0, torch.zeros_like(text)), (200.0, text))
        )
    assert out.shape == latent.shape
    assert 0.8 < out.std() < 1.25
    assert (out - no_text).std() > 1e-2
    assert (out - later).std() > 1e-2


@pytest.mark.parametrize(("part", "seed"), [("vae", NANO_SEED), ("vae", 1), ("footage_vae", NANO_SEED)])
def test_latents_of_a_picture_have_the_size_that_the_official_scale_factors_expect(
    picture: Tensor, part: str, seed: int
) -> None:
    vae = load_vae(build_part(part, seed), dtype=torch.float32)
    with torch.inference_mode():
        latent = vae.encode(picture).mean
        video = vae.decode(latent)
    assert 0.8 < latent.std() < 1.2
    assert video.shape == picture.shape
    assert 0.2 < video.std() < 1.2


def test_text_encoder_has_the_names_and_shapes_of_t5(nano: dict) -> None:
    transformers = pytest.importorskip("transformers")
    numbers = NANO_TEXT_ENCODER
    config = transformers.T5Config(
        vocab_size=numbers.vocab_size,
        d_model=numbers.d_model,
        d_ff=numbers.d_ff,
        d_kv=numbers.d_kv,
        num_heads=numbers.num_heads,
        num_layers=numbers.num_layers,
        feed_forward_proj="gated-gelu",
    )
    theirs = {name: tuple(tensor.shape) for name, tensor in transformers.T5EncoderModel(config).state_dict().items()}
    theirs.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight
    assert t5_shapes(numbers) == theirs
    assert {name: tuple(tensor.shape) for name, tensor in nano["text_encoder"].items()} == theirs


@pytest.mark.parametrize("read", [str, nano_state, lambda part: NANO_FOLDER / f"{part}.safetensors"])
def test_a_model_and_a_vae_of_two_families_are_named(read: Callable[[str], object]) -> None:
    """However they are read: by name, as weights, or from the pack's own files."""
    stages = {"stage1": NANO_STAGE1, "stage2": NANO_STAGE2, "footage_stage2": NANO_FOOTAGE_STAGE2}
    models = {part: latent_family(read(part), config) for part, config in stages.items()}
    vaes = {
        "vae": latent_family(read("vae"), NANO_VAE),
        "footage_vae": latent_family(read("footage_vae"), NANO_FOOTAGE_VAE),
    }
    models["official"], vaes["official"] = (
        latent_family(Path("stage2.pt"), STAGE2),
        latent_family(Path("3d-vae.pt"), VAE),
    )
    assert latent_family(Path("stage1.pt"), STAGE1) == models["official"]
    good = {(model, vae) for model in models for vae in vaes if pair_notice(models[model], vaes[vae]) is None}
    assert good == {
        ("stage1", "vae"), ("stage2", "vae"), ("footage_stage2", "footage_vae"), ("official", "official")
    }  # fmt: skip
    notice = pair_notice(models["footage_stage2"], vaes["vae"])
    assert "FlashVideo-Nano for real footage, and the VAE of FlashVideo-Nano for drawn scenes" in notice


def test_nothing_is_said_of_trainings_of_one_s_own(tmp_path: Path) -> None:
    assert latent_family(tmp_path / "stage2.safetensors", NANO_STAGE2) is None
    assert latent_family(dict(nano_state("stage2")), NANO_STAGE2) is None
    assert pair_notice(None, latent_family("vae", None)) is None
