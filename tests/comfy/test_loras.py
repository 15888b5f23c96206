"""LoRAs for the draft model: in ComfyUI's loader and in ours, whatever their layers are called."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_graphs import text_to_video


@pytest.fixture()
def lora(comfy_base: Path) -> Iterator[str]:
    """A LoRA for stage I in ComfyUI core's CogVideoX names."""
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for layer in ("blocks.0.q", "blocks.3.attn_out", "blocks.5.ff_proj"):
        rows = 512 if layer.endswith("ff_proj") else 128
        weights[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(4, 128, generator=generator)
        weights[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.2
    path = comfy_base / "models" / "loras" / "test.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)
    yield path.name
    path.unlink()


STYLES = {
    "diffusers": ("transformer.{}.lora_B.weight", "transformer.{}.lora_A.weight"),
    "peft": ("base_model.model.{}.lora_B.style.weight", "base_model.model.{}.lora_A.style.weight"),
    "kohya": ("lora_unet__{}.lora_up.weight", "lora_unet__{}.lora_down.weight"),
    "lycoris": ("lycoris_{}.lokr_w1", "lycoris_{}.lokr_w2"),
}


@pytest.mark.parametrize("style", STYLES)
def test_a_published_cogvideox_lora_finds_its_layers(
    submodule: Callable[[str], ModuleType],
    comfy_nodes: dict[str, Any],
    comfy_base: Path,
    lora: str,
    tmp_path: Path,
    style: str,
) -> None:
    """Their names are those of diffusers, Kohya's scripts or LyCORIS, which ComfyUI places for its own models only."""
    import comfy.lora
    import comfy.sd

    model = submodule("nodes.native.model").load_model(submodule("flashvideo.nano").nano_state("stage1"))
    shapes = {name: weight.shape for name, weight in model.model.diffusion_model.state_dict().items()}
    layers = submodule("flashvideo.checkpoints.keymaps").DIT_DIFFUSERS | {
        name: name for name in ("patch_embed.proj", "patch_embed.text_proj", "norm_out.linear", "proj_out")
    }
    state = {}
    for old, new in layers.items():
        layer, (rows, *columns) = old.format(i=0), shapes[f"{new.format(i=0)}.weight"]
        if not columns:  # a norm's
            continue
        layer = layer if style in ("diffusers", "peft") else layer.replace(".", "_")
        up, down = (name.format(layer) for name in STYLES[style])
        if style == "lycoris":
            state |= {up: torch.full((2, 2), 0.5), down: torch.ones(rows // 2, math.prod(columns) // 2)}
        else:
            state |= {up: torch.ones(rows, 2), down: torch.full((2, math.prod(columns)), 0.25)}
    source, target = comfy_base / "models" / "loras" / lora, tmp_path / "out.safetensors"
    save_file(state, source)
    assert not comfy.sd.load_lora_for_models(model, None, dict(state), 1.0, 0)[0].patches
    assert submodule("flashvideo.checkpoints.lora").convert_lora(source, target) == 14
    stock, _ = comfy.sd.load_lora_for_models(model, None, load_file(target), 0.5, 0)
    (ours,) = comfy_nodes["FlashVideoLoraLoader"].execute(model, lora, 0.5).result
    assert len(stock.patches) == len(ours.patches) == 14
    key = "diffusion_model.blocks.0.q.weight"
    plain = model.model.state_dict()[key].float()
    weights = [comfy.lora.calculate_weight(patched.patches[key], plain.clone(), key) for patched in (stock, ours)]
    assert torch.equal(*weights)
    torch.testing.assert_close(weights[0] - plain, torch.full_like(plain, 0.25))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {
                "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 3072),
                "transformer.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.ones(3072, 4),
            },
            r"made for another model: its diffusion_model\.blocks\.0\.q is 3072 by 3072 .* this model's 128 by 128",
        ),
        (
            {"diffusion_model.blocks.41.q.lora_A.weight": torch.ones(4, 128)},
            r"made for another model: this one has no layer diffusion_model\.blocks\.41\.q",
        ),
        (
            {"lora_unet_down_blocks_0.lora_down.weight": torch.ones(4, 128)},
            "this one has no layer lora_unet_down_blocks_0",
        ),
        ({"transformer.transformer_blocks.0.attn9.to_q.lora_A.weight": torch.ones(4, 128)}, "attn9"),
        (
            {
                "lycoris_transformer_blocks_0_attn1_to_q.lokr_w1": torch.ones(48, 48),
                "lycoris_transformer_blocks_0_attn1_to_q.lokr_w2": torch.ones(64, 64),
            },
            "its .* is 3072 by 3072 numbers",
        ),
        (
            {
                f"diffusion_model.blocks.0.q.hada_w{i}": torch.ones(*((1920, 4) if i[-1] == "a" else (4, 1920)))
                for i in ("1_a", "1_b", "2_a", "2_b")
            },
            "its .* is 1920 by 1920 numbers",
        ),
        ({"diffusion_model.blocks.0.q.lora_B.weight": torch.ones(128, 4)}, "it is damaged: .* lacks 'lora_A'"),
        ({"diffusion_model.blocks.0.q.lora_B.weight": torch.ones(())}, "it is damaged: .* are not matrices"),
        ({"transformer.transformer_blocks.0.attn1.to_q.lora_B.bias": torch.ones(4)}, "unknown layer names: .*bias"),
        ({"an_image_model.weight": torch.ones(4, 4)}, "it isn't a LoRA, or is made for another model"),
        (
            {
                "diffusion_model.blocks.0.q.lora_A.weight": torch.ones(4, 128),
                "diffusion_model.blocks.0.q.lora_B.weight": torch.ones(128, 4),
                "diffusion_model.blocks.0.q.something": torch.ones(4),
            },
            "no layer of this model takes diffusion_model.blocks.0.q.something",
        ),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(
    submodule: Callable[[str], ModuleType],
    comfy_nodes: dict[str, Any],
    comfy_base: Path,
    lora: str,
    state: dict[str, torch.Tensor],
    message: str,
) -> None:
    model = submodule("nodes.native.model").load_model(submodule("flashvideo.nano").nano_state("stage1"))
    save_file(state, comfy_base / "models" / "loras" / lora)
    with pytest.raises(ValueError, match=f"^Load FlashVideo LoRA: {lora} .*{message}"):
        comfy_nodes["FlashVideoLoraLoader"].execute(model, lora, 1.0)


def test_a_missing_lora_and_another_model_are_refused(comfy_nodes: dict[str, Any], lora: str) -> None:
    import comfy.model_patcher

    other = comfy.model_patcher.ModelPatcher(torch.nn.Linear(1, 1), load_device="cpu", offload_device="cpu")
    node = comfy_nodes["FlashVideoLoraLoader"]
    assert node.validate_inputs(lora) is True
    assert "Put a LoRA for CogVideoX-5B, or one of your own training, into " in node.validate_inputs("gone.safetensors")
    with pytest.raises(ValueError, match="^Load FlashVideo LoRA: model must be FlashVideo stage I or stage II"):
        node.execute(other, lora, 1.0)


@pytest.mark.parametrize(
    ("loader", "strength_input"), [("LoraLoaderModelOnly", "strength_model"), ("FlashVideoLoraLoader", "strength")]
)
def test_lora_loaders_change_stage1_and_strength_0_restores_it(
    run_prompt: Any, captured: dict[str, Any], lora: str, loader: str, strength_input: str
) -> None:
    def draft(strength: float | None) -> torch.Tensor:
        graph = text_to_video()
        for node in ("refined", "finish"):
            del graph[node]
        if strength is not None:
            inputs = {"model": ["model1", 0], "lora_name": lora, strength_input: strength}
            graph["lora"] = {"class_type": loader, "inputs": inputs}
            graph["stage1"]["inputs"]["model"] = ["lora", 0]
        run_prompt(graph)
        return captured["draft"]["samples"].clone()

    plain = draft(None)
    assert (draft(1.0) - plain).abs().mean() > 0.01 * plain.abs().mean()
    assert torch.equal(draft(0.0), plain)
    assert torch.equal(draft(None), plain)
