"""Recognising and loading checkpoints: every layout gives the same network, and every wrong file a clear message."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flashvideo.checkpoints import CheckpointError, load_dit, load_vae, open_checkpoint, read_dit, read_vae
from flashvideo.checkpoints.architecture import NORM_GROUPS_METADATA
from flashvideo.checkpoints.keymaps import Layout, original_name
from flashvideo.config import STAGE2, DiTConfig, VAEConfig
from flashvideo.dit import FlashVideoDiT
from flashvideo.nano import nano_state
from flashvideo.t5 import load_encoder
from flashvideo.vae import VideoVAE

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
UNET = "model.diffusion_model."
DIFFUSERS = Layout("dit", "diffusers")
TINY = DiTConfig(num_layers=1, hidden_size=32, num_heads=2, time_embed_dim=8, text_dim=12, ff_dim=48)
TINY_REFINER = replace(TINY, degradation_embedding=True, frame_count_embedding=True)
TINY_VAE = VAEConfig(base_channels=32, channel_multipliers=(1, 1, 1, 2), encoder_blocks=1, decoder_blocks=2)


def official(stage: int) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"dit_stage{stage}_weights.safetensors")


def official_vae() -> dict[str, Tensor]:
    halves = (load_file(GOLDEN / f"vae_stored_weights_{half}.safetensors") for half in ("encoder", "decoder"))
    return {key: value for half in halves for key, value in half.items()}


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(state) == set(expected)
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


def random_network(network: type[nn.Module], config: DiTConfig | VAEConfig) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return network(config).state_dict()


def empty_network(config: DiTConfig | VAEConfig, network: type[nn.Module] = FlashVideoDiT) -> dict[str, Tensor]:
    """The names and shapes of a network's weights, its tensors without memory."""
    return dict(network(config, device="meta").state_dict())


# Merging


def test_merged_lora_equals_the_reference() -> None:
    golden = load_file(GOLDEN / "dit_stage1_io.safetensors")
    _, state = read_dit(official(1))
    adaln = f"merged.{UNET}mixins.adaln_layer.adaLN_modulations.0.1."
    layer = f"merged.{UNET}transformer.layers.0.attention."
    for leaf in ("weight", "bias"):
        twelve = golden[adaln + leaf].chunk(12)
        parts = {
            "norm1.linear": torch.cat([twelve[i] for i in (0, 1, 2, 6, 7, 8)]),
            "norm2.linear": torch.cat([twelve[i] for i in (3, 4, 5, 9, 10, 11)]),
            "attn_out": golden[f"{layer}dense.{leaf}"],
        }
        parts |= dict(zip("qkv", golden[f"{layer}query_key_value.{leaf}"].chunk(3), strict=True))
        for name, expected in parts.items():
            # Two float32 matrix products in different order.
            torch.testing.assert_close(state[f"blocks.0.{name}.{leaf}"], expected, rtol=1e-6, atol=1e-6)


def test_merged_weight_takes_the_data_type_of_its_bias() -> None:
    weights = official(1)
    stem = f"{UNET}transformer.layers.1.attention.dense."
    weights[stem + "original.bias"] = weights[stem + "original.bias"].bfloat16()
    _, state = read_dit(weights)
    up, down = weights[stem + "matrix_B.0"], weights[stem + "matrix_A.0"]
    expected = (weights[stem + "original.weight"] + up @ down / down.shape[0]).bfloat16()
    assert state["blocks.1.attn_out.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(state["blocks.1.attn_out.weight"], expected)
    assert state["blocks.0.attn_out.weight"].dtype == torch.float32


def test_merging_leaves_the_source_as_it_was() -> None:
    weights, untouched = official(1), official(1)
    read_dit(weights)
    assert_same(weights, untouched)


def test_plain_weights_without_lora_are_accepted() -> None:
    weights = {key.replace(".original.", "."): value for key, value in official(1).items() if ".matrix_" not in key}
    _, state = read_dit(weights)
    dense = weights[f"{UNET}transformer.layers.0.attention.dense.weight"]
    assert torch.equal(state["blocks.0.attn_out.weight"], dense)


# Layouts and containers


@pytest.mark.parametrize("stage", [1, 2])
def test_every_layout_of_a_stage_gives_the_same_weights(stage: int) -> None:
    _, converted = read_dit(official(stage))
    diffusers = {original_name(name, DIFFUSERS): value for name, value in converted.items()}
    assert not set(diffusers) & {name for name in converted if name.startswith("blocks.")}
    sources = [
        converted,
        {UNET + name: value for name, value in converted.items()},
        {f"diffusion_model.{name}": value for name, value in converted.items()},
        diffusers,
        {f"transformer.{name}": value for name, value in diffusers.items()},
        {**diffusers, "patch_embed.pos_embedding": torch.zeros(1, 4, 128)},
    ]
    for source in sources:
        config, state = read_dit(source)
        assert config.stage == stage
        assert_same(state, converted)


@pytest.mark.parametrize("stage", [1, 2])
def test_every_container_of_a_stage_gives_the_same_weights(stage: int, tmp_path: Path) -> None:
    weights = official(stage)
    _, expected = read_dit(weights)
    torch.save({"module": weights, "iteration": 7}, tmp_path / "archive.pt")
    torch.save({"module": weights}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "official.safetensors")
    (tmp_path / "no name to go by").write_bytes((tmp_path / "archive.pt").read_bytes())
    for file in tmp_path.iterdir():
        _, state = read_dit(file)
        assert_same(state, expected)


def test_official_vae_becomes_the_diffusers_layout(tmp_path: Path) -> None:
    weights = official_vae()
    torch.save({"state_dict": {**weights, "loss.logvar": torch.zeros(())}}, tmp_path / "3d-vae.pt")
    config, state = read_vae(tmp_path / "3d-vae.pt")
    assert config == TINY_VAE
    # The decoder's levels are counted from the other end.
    deepest = weights["decoder.up.3.block.1.conv2.conv.weight"]
    assert torch.equal(state["decoder.up_blocks.0.resnets.1.conv2.conv.weight"], deepest)
    assert read_vae(state)[0] == config
    assert_same(read_vae(state)[1], state)


def test_other_models_in_the_same_file_are_ignored_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    extra = {"first_stage_model.encoder.conv_in.conv.weight": torch.zeros(1), "conditioner.x.weight": torch.zeros(1)}
    with caplog.at_level(logging.WARNING):
        _, state = read_dit({"module": {**official(2), **extra}})
    assert_same(state, read_dit(official(2))[1])
    assert "ignored 2 keys of other models" in caplog.text and "first_stage_model." in caplog.text


# Architecture and loading


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        TINY_REFINER,
        replace(TINY, num_layers=11, hidden_size=192, num_heads=3, time_embed_dim=20, text_dim=7, ff_dim=100),
        replace(TINY, in_channels=8, out_channels=8, patch_size=4),
    ],
)
def test_any_transformer_size_is_read_from_its_shapes(config: DiTConfig | VAEConfig) -> None:
    assert open_checkpoint(empty_network(config)).config == config


@pytest.mark.parametrize(
    "config",
    [
        TINY_VAE,
        replace(TINY_VAE, channel_multipliers=(1, 2, 2, 4), encoder_blocks=3, decoder_blocks=4, latent_channels=4),
        replace(TINY_VAE, base_channels=16, channel_multipliers=(1, 3, 3, 5), norm_groups=16),
    ],
)
def test_any_vae_size_is_read_from_its_shapes(config: DiTConfig | VAEConfig) -> None:
    assert open_checkpoint(empty_network(config, VideoVAE)).config == config


@pytest.mark.parametrize("stated", ["0", "-4", "5", "64", "four", "", "9" * 5000])
def test_norm_groups_that_do_not_divide_every_width_are_refused(stated: str, tmp_path: Path) -> None:
    save_file(random_network(VideoVAE, TINY_VAE), tmp_path / "vae.safetensors", {NORM_GROUPS_METADATA: stated})
    with pytest.raises(CheckpointError, match=r"vae\.safetensors .*norm_groups.*32, 32, 32, 64") as caught:
        open_checkpoint(tmp_path / "vae.safetensors")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("load", "network", "config"), [(load_dit, FlashVideoDiT, TINY), (load_vae, VideoVAE, TINY_VAE)]
)
def test_loaded_network_has_the_file_s_weights(
    load: Callable[..., Any], network: type[nn.Module], config: DiTConfig | VAEConfig, tmp_path: Path
) -> None:
    weights = random_network(network, config)
    save_file(weights, tmp_path / "model.safetensors")
    model = load(tmp_path / "model.safetensors")
    assert model.config == config and not model.training
    assert_same(model.state_dict(), weights)
    assert {tensor.dtype for tensor in load(weights, dtype=torch.float16).state_dict().values()} == {torch.float16}


def test_file_of_mixed_data_types_loads_in_its_main_one() -> None:
    weights = random_network(FlashVideoDiT, TINY)
    mixed = {name: value.bfloat16() if value.ndim > 1 else value for name, value in weights.items()}
    assert {tensor.dtype for tensor in load_dit(mixed).state_dict().values()} == {torch.bfloat16}
    eight_bit = {name: value.to(torch.float8_e4m3fn) if value.ndim > 1 else value for name, value in weights.items()}
    assert {tensor.dtype for tensor in load_dit(eight_bit).state_dict().values()} == {torch.bfloat16}


def test_files_with_scale_factors_are_refused() -> None:
    weights = random_network(FlashVideoDiT, TINY)
    weights |= {"scaled_fp8": torch.zeros(2), "blocks.0.q.scale_weight": torch.ones(())}
    assert open_checkpoint(weights).quantised
    packed = random_network(FlashVideoDiT, TINY)
    packed["blocks.0.q.weight"] = torch.zeros(32, 16, dtype=torch.uint8)
    for source in (weights, packed):
        for load in (load_dit, read_dit):
            with pytest.raises(CheckpointError, match="is quantised in a way that FlashVideo's loaders don't read"):
                load(source)
    for name in ("scaled_fp8", "encoder.block.0.layer.0.SelfAttention.q.scale_weight"):
        with pytest.raises(CheckpointError, match=r"is quantised, which only ComfyUI reads: take t5xxl_fp16"):
            load_encoder({**nano_state("text_encoder"), name: torch.ones(1)})


def test_a_layer_that_no_network_has_is_refused_at_once() -> None:
    weights = random_network(FlashVideoDiT, TINY)
    weights["blocks.999999999.norm1.norm.weight"] = torch.zeros(32)
    with pytest.raises(CheckpointError, match=r"names a layer 999,999,999, and no network has more than 512"):
        read_dit(weights)
    encoder = {name.replace(".0.", ".999999999."): tensor for name, tensor in nano_state("text_encoder").items()}
    with pytest.raises(CheckpointError, match="names a layer 999,999,999"):
        load_encoder({**nano_state("text_encoder"), **encoder})


def test_what_comfyui_saves_of_sampling_is_passed_over() -> None:
    weights = random_network(FlashVideoDiT, TINY)
    saved = {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}
    assert_same(read_dit({**saved, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})[1], weights)


# Files that don't fit


def test_one_message_names_all_that_is_wrong(tmp_path: Path) -> None:
    weights = official(1)
    weights.pop(f"{UNET}mixins.final_layer.linear.bias")
    weights.pop(f"{UNET}transformer.layers.1.attention.query_key_value.original.bias")
    weights[f"{UNET}mixins.extra.weight"] = torch.zeros(2)
    weights[f"{UNET}transformer.final_layernorm.bias"] = torch.zeros(5)
    save_file(weights, tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_dit(tmp_path / "broken.safetensors")
    assert str(error.value) == (
        "broken.safetensors was taken for FlashVideo stage I (2 layers of 128, official layout), but doesn't fit:\n"
        f"  missing (2): {UNET}transformer.layers.1.attention.query_key_value.bias, "
        f"{UNET}mixins.final_layer.linear.bias\n"
        f"  unexpected (1): {UNET}mixins.extra.weight\n"
        f"  wrong shape (1): {UNET}transformer.final_layernorm.bias makes [5], not [128]"
    )


@pytest.mark.parametrize("which", ["A", "B"])
def test_lora_that_does_not_fit_its_weight_is_named(which: str) -> None:
    weights = official(1)
    stem = f"{UNET}transformer.layers.0.attention.query_key_value."
    weights[f"{stem}matrix_{which}.1"] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match=r"wrong shape \(1\): .*query_key_value"):
        read_dit(weights)
    del weights[f"{stem}matrix_{which}.1"]
    with pytest.raises(CheckpointError, match="LoRA matrices"):
        read_dit(weights)


@pytest.mark.parametrize("prefix", ["time_size_embedding", "ref_step_time_embedding"])
def test_stage2_without_one_of_its_embeddings(prefix: str) -> None:
    weights = {key: value for key, value in official(2).items() if prefix not in key}
    with pytest.raises(CheckpointError, match=rf"stage II .*\n  missing \(4\): .*{prefix}\.0\.weight"):
        read_dit(weights)


def test_stage2_without_both_of_its_embeddings() -> None:
    weights = {key: value for key, value in official(2).items() if "_embedding." not in key}
    with pytest.raises(CheckpointError, match=r"embeddings .* missing .*ref_step_time_embedding.*, .*time_size_emb"):
        read_dit(weights, stage=2)
    full = replace(STAGE2, degradation_embedding=False, frame_count_embedding=False)
    with pytest.raises(CheckpointError, match=r"are missing \(degradation_embedding\.\*, .*CogVideoX-2B"):
        open_checkpoint(empty_network(full))


def test_the_other_stage_is_refused_where_one_is_needed() -> None:
    assert read_dit(official(1), stage=1)[0].stage == 1
    with pytest.raises(CheckpointError, match="is a stage II model"):
        read_dit(official(2), stage=1)
    with pytest.raises(CheckpointError, match="seems to be a stage I model"):
        read_dit(official(1), stage=2)


def test_vae_and_transformer_are_not_mistaken_for_each_other() -> None:
    with pytest.raises(CheckpointError, match="is FlashVideo's VAE, and a diffusion model"):
        load_dit(official_vae())
    with pytest.raises(CheckpointError, match="diffusion model, and the VAE is needed"):
        load_vae(official(1))


def test_half_a_model_says_what_is_missing() -> None:
    decoder = {key: value for key, value in official_vae().items() if key.startswith("decoder.")}
    with pytest.raises(CheckpointError, match=r"taken for FlashVideo's VAE .*missing.*encoder\.conv_in"):
        load_vae(decoder)


FOREIGN = {
    "a LoRA": {
        "transformer_blocks.0.norm1.norm.lora_A.weight": (4, 8),
        "transformer_blocks.0.attn1.to_q.lora_B.weight": (8, 4),
    },
    "a Wan video model": {"blocks.0.cross_attn.q.weight": (8, 8), "head.modulation": (1, 2, 8)},
    "a HunyuanVideo model": {
        "double_blocks.0.img_attn.qkv.weight": (8, 8),
        "txt_in.individual_token_refiner.blocks.0.norm1.weight": (8,),
    },
    "an LTX-Video model": {"patchify_proj.weight": (8, 8), "transformer_blocks.0.attn1.to_q.weight": (8, 8)},
    "a Stable Diffusion checkpoint": {"model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3)},
    "an SDXL checkpoint": {
        "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
        "model.diffusion_model.label_emb.0.0.weight": (8, 8),
    },
    "a Flux model": {"double_blocks.0.img_attn.qkv.weight": (8, 8), "single_blocks.0.linear1.weight": (8, 8)},
    "a T5 text encoder": {"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8), "shared.weight": (8, 8)},
    "the VAE of an image model": {
        "encoder.conv_in.weight": (8, 3, 3, 3),
        "encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3),
    },
    "the VAE of another video model": {"encoder.down_blocks.0.resnets.0.conv1.conv.weight": (8, 8, 3, 3, 3)},
    "the optimizer state": {"state.exp_avg": (8,), "state.exp_avg_sq": (8,)},
    "first keys are a, b": {"a": (1,), "b": (1,)},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_of_another_model_says_what_it_seems_to_be(what: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(shape) for name, shape in FOREIGN[what].items()}, tmp_path / "other.safetensors")
    for load in (load_dit, load_vae):
        with pytest.raises(CheckpointError, match=rf"^other\.safetensors is no FlashVideo model: .*{what}"):
            load(tmp_path / "other.safetensors")


def test_cogvideox_s_other_models_are_named() -> None:
    one_five = {**empty_network(TINY), "patch_embed.proj.weight": torch.zeros(32, 128)}
    with pytest.raises(CheckpointError, match=r"CogVideoX 1\.5"):
        read_dit(one_five)
    with pytest.raises(CheckpointError, match="CogVideoX image-to-video"):
        read_dit(empty_network(replace(TINY, in_channels=32)))
