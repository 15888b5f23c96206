"""Both stages as citizens of ComfyUI: loaded once, patched by stock nodes, stopped by Cancel, shown in previews."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
NANO = "FlashVideo-Nano (built-in)"
NANO_STAGE1, NANO_STAGE2 = "FlashVideo-Nano Stage I (built-in)", "FlashVideo-Nano Stage II (built-in)"


def text_to_video(**changes: Any) -> dict[str, Any]:
    """The two-stage graph on FlashVideo-Nano, 5 frames of 64x32, refined to 128x64; `changes` are "node.input"."""
    prompt = {
        "model1": ("FlashVideoModelLoader", {"model_name": NANO_STAGE1, "weight_dtype": "default"}),
        "model2": ("FlashVideoModelLoader", {"model_name": NANO_STAGE2, "weight_dtype": "default"}),
        "clip": ("FlashVideoTextEncoderLoader", {"text_encoder_name": NANO}),
        "vae": ("FlashVideoVAELoader", {"vae_name": NANO}),
        "text": ("FlashVideoTextEncode", {"clip": ["clip", 0], "text": "a red kite", "motion": "none"}),
        "empty": ("EmptyFlashVideoLatent", {"width": 64, "height": 32, "length": 5, "batch_size": 1}),
        "stage1": (
            "FlashVideoStage1Sampler",
            {
                "model": ["model1", 0],
                "positive": ["text", 0],
                "negative": ["text", 1],
                "latent": ["empty", 0],
                "seed": 1,
                "steps": 4,
                "cfg": 8.0,
                "dynamic_cfg": True,
            },
        ),
        "decode1": ("VAEDecode", {"samples": ["stage1", 0], "vae": ["vae", 0]}),
        "prepare": (
            "FlashVideoPrepareFrames",
            {
                "images": ["decode1", 0],
                "size": "scale",
                "short_side": 1080,
                "scale": 2.0,
                "width": 64,
                "height": 64,
                "resample": "bilinear",
            },
        ),
        "encode": ("VAEEncode", {"pixels": ["prepare", 0], "vae": ["vae", 0]}),
        "degrade": ("FlashVideoLatentDegradation", {"latent": ["encode", 0], "strength": 675, "seed": 1}),
        "stage2": (
            "FlashVideoStage2Refiner",
            {
                "model": ["model2", 0],
                "positive": ["text", 0],
                "negative": ["text", 1],
                "latent": ["degrade", 0],
                "steps": 2,
                "cfg": 13.0,
                "shift": 2.5,
                "solver": "euler",
            },
        ),
        "decode2": ("VAEDecode", {"samples": ["stage2", 0], "vae": ["vae", 0]}),
        "finish": (
            "FlashVideoFinishFrames",
            {"images": ["decode2", 0], "reference": ["prepare", 1], "color_match": "none"},
        ),
        "draft": ("TestCapture", {"value": ["stage1", 0], "name": "draft"}),
        "refined": ("TestCapture", {"value": ["finish", 0], "name": "refined"}),
    }
    graph = {node: {"class_type": kind, "inputs": dict(inputs)} for node, (kind, inputs) in prompt.items()}
    for place, value in changes.items():
        node, _, name = place.partition("__")
        graph[node]["inputs"][name] = value
    return graph


@pytest.fixture()
def loads(submodule: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read from disk or built while a test ran; the real readers still run. Nothing is loaded at first."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    seen: list[str] = []

    def count(module: str, name: str) -> None:
        target = submodule(module)
        real = getattr(target, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(target, name, counted)

    count("nodes.models", "load_model")
    count("nodes.text", "load_clip_native")
    count("nodes.vae", "load_vae_native")
    return seen


def test_text_to_refined_video(run_prompt: Any, captured: dict[str, Any]) -> None:
    run_prompt(text_to_video())
    frames = captured["refined"]
    assert frames.shape == (5, 64, 128, 3)
    assert frames.min() >= 0 and frames.max() <= 1 and torch.isfinite(frames).all()


def test_another_seed_loads_nothing_again(run_prompt: Any, captured: dict[str, Any], loads: list[str]) -> None:
    run_prompt(text_to_video())
    first = captured["draft"]["samples"].clone()
    assert sorted(loads) == ["load_clip_native", "load_model", "load_model", "load_vae_native"]
    run_prompt(text_to_video(stage1__seed=2))
    assert len(loads) == 4
    assert not torch.equal(captured["draft"]["samples"], first)


def test_two_graphs_in_turn_share_their_models(run_prompt: Any, captured: dict[str, Any], loads: list[str]) -> None:
    """A second graph with loaders of its own, under other ids, reads nothing; nor does the first one afterwards."""
    other = {f"other-{node}": entry for node, entry in text_to_video(stage1__steps=3).items()}
    for entry in other.values():
        for name, value in entry["inputs"].items():
            if isinstance(value, list):
                entry["inputs"][name] = [f"other-{value[0]}", value[1]]
    run_prompt(text_to_video())
    run_prompt(other)
    run_prompt(text_to_video(stage1__seed=9))
    assert sorted(loads) == ["load_clip_native", "load_model", "load_model", "load_vae_native"]


def test_two_loaders_of_one_file_give_one_model(
    run_prompt: Any, captured: dict[str, Any], comfy_base: Path, loads: list[str]
) -> None:
    folder = comfy_base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(load_file(GOLDEN / "dit_stage2_weights.safetensors"), folder / "golden_stage2.safetensors")
    load = {"model_name": "golden_stage2.safetensors", "weight_dtype": "default"}
    graph: dict[str, Any] = {}
    for name in ("a", "b"):
        graph[f"load-{name}"] = {"class_type": "FlashVideoModelLoader", "inputs": dict(load)}
        settings = {"model": [f"load-{name}", 0], "strength": 650 if name == "a" else 700, "shift": 2.5}
        graph[f"settings-{name}"] = {"class_type": "FlashVideoRefinerSettings", "inputs": settings}
        graph[name] = {"class_type": "TestCapture", "inputs": {"value": [f"settings-{name}", 0], "name": name}}
    run_prompt(graph)
    assert loads == ["load_model"]
    assert captured["a"].model is captured["b"].model
    assert captured["a"].get_model_object("model_sampling").degradation_step == 650
    assert captured["b"].get_model_object("model_sampling").degradation_step == 700


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


def test_progress_moves_in_every_phase_and_previews_arrive(
    run_prompt: Any, captured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Auto)
    # Newer versions set what a prompt asks for, or else this.
    monkeypatch.setattr(latent_preview, "default_preview_method", LatentPreviewMethod.Auto, raising=False)
    _, events = run_prompt(text_to_video(empty__length=17))
    progress: dict[str, list[tuple[float, float]]] = {}
    previews = set()
    for name, data in events:
        if name == "progress":
            progress.setdefault(data["node"], []).append((data["value"], data["max"]))
            if data["preview"] is not None:
                previews.add(data["node"])
    assert set(progress) >= {"text", "stage1", "decode1", "encode", "stage2", "decode2"}
    for node, moves in progress.items():
        assert moves[-1][0] == moves[-1][1], f"{node} ends at {moves[-1]}"
        assert moves == sorted(moves), f"{node} runs backwards"
    assert previews >= {"stage1", "stage2"}


@pytest.mark.parametrize("node", ["stage1", "decode1", "encode", "stage2", "decode2"])
def test_cancel_answers_within_a_step_and_the_next_run_works(
    run_prompt: Any, captured: dict[str, Any], monkeypatch: pytest.MonkeyPatch, node: str
) -> None:
    """Cancel arrives while a node is at its first step or chunk; no second one may end."""
    import comfy.utils

    import nodes

    moves: list[str] = []

    def cancelling(value: float, total: float, preview: object, *rest: Any, **named: Any) -> None:
        at = run_prompt.server.last_node_id
        if at == node:
            moves.append(at)
            if len(moves) == 1:
                nodes.interrupt_processing(True)
        run_prompt.progress_hook(value, total, preview, *rest, **named)

    comfy.utils.set_progress_bar_global_hook(cancelling)
    graph = text_to_video(empty__length=33)
    with pytest.raises(run_prompt.Failed, match="interrupted"):
        run_prompt(graph)
    assert len(moves) == 1
    comfy.utils.set_progress_bar_global_hook(run_prompt.progress_hook)
    run_prompt(graph)
    assert captured["refined"].shape[0] == 33


def test_block_replacements_and_wrappers_of_other_packs_are_called(comfy_nodes: dict, submodule: Callable) -> None:
    import comfy.patcher_extension

    model = submodule("nodes.native.model").load_model(load_file(GOLDEN / "dit_stage1_weights.safetensors")).clone()
    calls = {"block": 0, "wrapper": 0, "attention": 0}

    def replacement(args: dict, extra: dict) -> dict:
        calls["block"] += 1
        assert args["txt"].shape[1] == 24 and args["img"].shape[1] == 2 * 2 * 2
        return extra["original_block"](args)

    def wrapper(executor: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls["wrapper"] += 1
        return executor(*args, **kwargs)

    def attention(function: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls["attention"] += 1
        return function(*args, **kwargs)

    golden = load_file(GOLDEN / "sample_stage1.safetensors")
    run = comfy_nodes["FlashVideoStage1Sampler"].execute
    inputs = ([[golden["case0.cond"], {}]], [[golden["case0.uncond"], {}]], {"samples": torch.zeros(1, 16, 2, 4, 4)})
    with torch.inference_mode():
        plain = run(model, *inputs, 0, 2, 8.0, True).result[0]["samples"]
        model.set_model_patch_replace(replacement, "dit", "double_block", 1)
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", wrapper)
        model.model_options["transformer_options"]["optimized_attention_override"] = attention
        patched = run(model, *inputs, 0, 2, 8.0, True).result[0]["samples"]
    assert torch.equal(plain, patched)
    assert calls["block"] == calls["wrapper"] == 2 and calls["attention"] == 4


def test_weights_kept_in_fp8_compute_in_full_precision(comfy_nodes: dict, submodule: Callable) -> None:
    load_model = submodule("nodes.native.model").load_model
    _, state = submodule("flashvideo.checkpoints").read_dit(GOLDEN / "dit_stage1_weights.safetensors")
    golden = load_file(GOLDEN / "sample_stage1.safetensors")
    inputs = ([[golden["case0.cond"], {}]], [[golden["case0.uncond"], {}]], {"samples": torch.zeros(1, 16, 2, 4, 4)})

    def draft(state: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> torch.Tensor:
        model = load_model(dict(state), dtype)
        with torch.inference_mode():
            run = comfy_nodes["FlashVideoStage1Sampler"].execute
            return run(model, *inputs, 0, 2, 1.0, False).result[0]["samples"]

    coarse = draft(state, torch.float8_e4m3fn)
    assert (coarse - draft(state)).abs().mean() > 0.01
    rounded = {name: tensor.to(torch.float8_e4m3fn).float() for name, tensor in state.items()}
    torch.testing.assert_close(coarse, draft(rounded), rtol=1e-4, atol=1e-4)


def test_the_loader_keeps_weights_as_it_is_told(comfy_nodes: dict, run_prompt: Any, captured: dict[str, Any]) -> None:
    schema = comfy_nodes["FlashVideoModelLoader"].define_schema()
    (choice,) = (port for port in schema.inputs if port.id == "weight_dtype")
    graph: dict[str, Any] = {}
    for name in choice.options:
        inputs = {"model_name": NANO_STAGE2, "weight_dtype": name}
        graph[f"load {name}"] = {"class_type": "FlashVideoModelLoader", "inputs": inputs}
        graph[name] = {"class_type": "TestCapture", "inputs": {"value": [f"load {name}", 0], "name": name}}
    run_prompt(graph)
    models = {name: captured[name] for name in choice.options}
    kept = {name: model.model.diffusion_model.blocks[0].q.weight.dtype for name, model in models.items()}
    fast = [name for name, model in models.items() if model.model.model_config.optimizations["fp8"]]
    assert kept == {
        "default": torch.float32,
        "fp8_e4m3fn": torch.float8_e4m3fn,
        "fp8_e4m3fn_fast": torch.float8_e4m3fn,
        "fp8_e5m2": torch.float8_e5m2,
    }
    assert fast == ["fp8_e4m3fn_fast"]
    assert len({id(model.model) for model in models.values()}) == len(models)


def test_a_small_run_gives_what_the_last_release_gave(comfy_nodes: dict, submodule: Callable) -> None:
    """Same seed, same inputs, same output, in this release and the next.

    Numbers and not a hash of bits: the last bits differ between processors.
    """
    load_model = submodule("nodes.native.model").load_model
    models = [load_model(load_file(GOLDEN / f"dit_stage{stage}_weights.safetensors")) for stage in (1, 2)]
    golden = load_file(GOLDEN / "sample_stage1.safetensors")
    text = ([[golden["case0.cond"], {}]], [[golden["case0.uncond"], {}]])
    with torch.inference_mode():
        empty = comfy_nodes["EmptyFlashVideoLatent"].execute(32, 32, 5, 1).result[0]
        draft = comfy_nodes["FlashVideoStage1Sampler"].execute(models[0], *text, empty, 3, 4, 8.0, True).result[0]
        degraded = comfy_nodes["FlashVideoLatentDegradation"].execute(draft, 675, 4).result[0]
        run = comfy_nodes["FlashVideoStage2Refiner"].execute
        refined = run(models[1], *text, degraded, 4, 13.0, 2.5, "euler").result[0]["samples"]
    released = json.loads((GOLDEN.parent / "small_run.json").read_text())["refined"]
    # Rounding differs between processors; cfg 13 over four steps amplifies it to about 1e-4.
    assert (refined.flatten()[::16] - torch.tensor(released)).abs().max() <= 1e-3


def test_a_compiled_model_has_one_graph_and_a_new_size_recompiles_once(comfy_nodes: dict, submodule: Callable) -> None:
    """What core's TorchCompileModel does, with a compiler that counts graphs; fullgraph refuses breaks."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = submodule("nodes.native.model").load_model(load_file(GOLDEN / "dit_stage1_weights.safetensors"))
    golden = load_file(GOLDEN / "sample_stage1.safetensors")
    text = ([[golden["case0.cond"], {}]], [[golden["case0.uncond"], {}]])
    graphs = []

    def backend(graph: torch.fx.GraphModule, _examples: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend=backend, fullgraph=True)
    run = comfy_nodes["FlashVideoStage1Sampler"].execute
    for height, width in ((4, 8), (8, 4), (6, 10)):
        empty = {"samples": torch.zeros(1, 16, 2, height, width)}
        with torch.inference_mode():
            plain, fast = (run(m, *text, empty, 0, 2, 8.0, True).result[0]["samples"] for m in (model, compiled))
        assert (plain - fast).abs().max() <= 1e-4 * plain.abs().max()
    torch._dynamo.reset()
    assert len(graphs) == 2


def test_memory_required_is_what_an_evaluation_takes(comfy_nodes: dict, submodule: Callable) -> None:
    """ComfyUI batches both branches of the guidance, or doesn't, by this number: it may not be too small."""
    model = submodule("nodes.native.model").load_model(load_file(GOLDEN / "dit_stage1_weights.safetensors"))
    network, config = model.model.diffusion_model, model.model.diffusion_model.config
    shape = [2, 16, 5, 32, 32]
    arguments = (torch.randn(shape), torch.full((2,), 500.0), torch.randn(2, 226, config.text_dim))
    with torch.inference_mode(), torch.autograd.profiler.profile(profile_memory=True) as profiler:
        submodule("flashvideo.dit").FlashVideoDiT.forward(network, *arguments)
    held = peak = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0.9 * peak <= model.model.memory_required(shape) <= 4 * peak


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_are_stored_as_asked_even_by_layers_that_take_them_as_they_come(
    submodule: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None
) -> None:
    """As with the dynamic VRAM of newer ComfyUIs, whose layers have no weights before the file's."""
    import comfy.model_base

    def as_they_come(self: comfy.model_base.BaseModel, state: dict[str, torch.Tensor], _prefix: str = "") -> None:
        self.diffusion_model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)

    native = submodule("nodes.native.model")
    state = submodule("flashvideo.nano").nano_state("stage1")
    expected = native.load_model(dict(state), dtype).model
    monkeypatch.setattr(comfy.model_base.BaseModel, "load_model_weights", as_they_come)
    model = native.load_model(dict(state), dtype).model
    assert {weight.dtype for weight in model.diffusion_model.parameters()} == {dtype or expected.get_dtype()}
    for name, weight in expected.state_dict().items():
        assert torch.equal(weight.float(), model.state_dict()[name].float()), name


def test_a_quantised_stage_is_refused(submodule: Callable[[str], ModuleType]) -> None:
    state = submodule("flashvideo.nano").nano_state("stage2")
    state = {name: value.to(torch.float8_e4m3fn) if value.ndim > 1 else value for name, value in state.items()}
    scales = {name.replace("weight", "scale_weight"): torch.ones(()) for name, value in state.items() if value.ndim > 1}
    with pytest.raises(ValueError, match=r"is quantised.*weight_dtype fp8_e4m3fn"):
        submodule("nodes.native.model").load_model({**state, **scales, "scaled_fp8": torch.zeros(2)})


@pytest.mark.parametrize("dynamic", [True, False])
def test_patches_for_a_part_of_the_draft_hold_for_that_part(
    comfy_nodes: dict[str, type], submodule: Callable[[str], ModuleType], dynamic: bool
) -> None:
    """Such patches are told sigmas by the loader's model before the sampler knows its steps."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    model = submodule("nodes.native.model").load_model(submodule("flashvideo.nano").nano_state("stage1"))
    width = model.model.diffusion_model.config.text_dim
    text, empty = ([[torch.zeros(1, 226, width), {}]] for _ in range(2))
    seen: list[tuple[float, bool]] = []
    law = model.get_model_object("model_sampling")
    start, end = law.percent_to_sigma(0.2), law.percent_to_sigma(0.6)

    def look(args: dict[str, Any]) -> torch.Tensor:
        sigma = float(args["sigma"][0])
        seen.append((sigma, end <= sigma <= start))
        return args["denoised"]

    patched = SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 0.01, "0", "").result[0].clone()
    patched.set_model_sampler_post_cfg_function(look)
    inputs = {"positive": text, "negative": empty, "latent": {"samples": torch.zeros(1, 16, 2, 4, 8)}}
    comfy_nodes["FlashVideoStage1Sampler"].execute(patched, **inputs, seed=1, steps=20, cfg=8.0, dynamic_cfg=dynamic)
    assert [sigma for sigma, _ in seen] == sorted((sigma for sigma, _ in seen), reverse=True)
    held = [index for index, (_, inside) in enumerate(seen) if inside]
    assert held == list(range(4, 12))


def test_guidance_of_another_node_is_not_undone_silently(
    comfy_nodes: dict[str, type], submodule: Callable[[str], ModuleType]
) -> None:
    from comfy_extras.nodes_model_advanced import RescaleCFG

    model = submodule("nodes.native.model").load_model(submodule("flashvideo.nano").nano_state("stage1"))
    width = model.model.diffusion_model.config.text_dim
    text = [[torch.zeros(1, 226, width), {}]]
    inputs = {"positive": text, "negative": text, "latent": {"samples": torch.zeros(1, 16, 1, 2, 2)}, "seed": 1}
    sample = partial(comfy_nodes["FlashVideoStage1Sampler"].execute, **inputs, steps=2, cfg=8.0)
    (rescaled,) = RescaleCFG().patch(model, 0.7)
    with pytest.raises(ValueError, match=r"^FlashVideo Stage I Sampler: model comes through .* such as RescaleCFG"):
        sample(rescaled, dynamic_cfg=True)
    sample(rescaled, dynamic_cfg=False)

    plain = sample(model, dynamic_cfg=False).result[0]["samples"]
    spreads, guided = [], model.clone()

    def guide(args: dict[str, Any]) -> torch.Tensor:
        spreads.append((float(args["input"].detach().std()), float(args["sigma"][0])))
        assert torch.equal(args["cond"], args["input"] - args["cond_denoised"])
        return args["uncond"] + args["cond_scale"] * (args["cond"] - args["uncond"])

    guided.set_model_sampler_cfg_function(guide)
    torch.testing.assert_close(sample(guided, dynamic_cfg=False).result[0]["samples"], plain, rtol=1e-3, atol=1e-3)
    for spread, sigma in spreads:  # as ComfyUI's own samplers have it: a latent of about 1, and sigma times noise
        assert abs(spread / (1 + sigma**2) ** 0.5 - 1) < 0.2
    dynamic = comfy_nodes["FlashVideoDynamicCFG"].execute(model, 8.0, 5).result[0]
    sample(dynamic, dynamic_cfg=True)
    with pytest.raises(ValueError, match="^FlashVideo Dynamic CFG: model comes through"):
        comfy_nodes["FlashVideoDynamicCFG"].execute(rescaled, 8.0, 5)


def test_nanos_parts_are_trained_and_belong_together(submodule: Callable[[str], ModuleType]) -> None:
    """On held-out scenes stage I explains 0.9 of v (untrained: nothing), and more with the right captions."""
    checkpoints, t5, nano = (submodule(f"flashvideo.{name}") for name in ("checkpoints", "t5", "nano"))
    config, scenes = submodule("flashvideo.config"), submodule("flashvideo.training.scenes.stream")
    stage1_loss = submodule("flashvideo.training.tasks.losses").stage1_loss
    vae = checkpoints.load_vae(nano.nano_state("vae"), dtype=torch.float32)
    clips = scenes.SceneStream("test", 64, 112, 17, 11)
    videos, captions = zip(*(clips.sample(index) for index in range(2)), strict=True)
    tokens = t5.T5Tokens(str(Path(folder_paths.__file__).parent / t5.TOKENIZER_IN_COMFYUI))
    text = t5.contexts(t5.load_encoder(nano.nano_state("text_encoder")), tokens, captions)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        latent = vae.encode(torch.stack(videos)).mode() * config.STAGE1_LATENT_SCALE
        noise, time = torch.randn(latent.shape, generator=generator), torch.tensor([500, 500])
        drafts = checkpoints.load_dit(nano.nano_state("stage1"), dtype=torch.float32)
        nothing = float(stage1_loss(lambda x, *_: torch.zeros_like(x), latent, text, noise, time))
        right, wrong = (float(stage1_loss(drafts, latent, words, noise, time)) for words in (text, text.flip(0)))
        assert 1 - right / nothing > 0.8
        assert wrong > 1.02 * right

        large = scenes.SceneStream("test", 256, 448, 5, 11).sample(0)[0][None, :, :, 64:192, 160:288]
        clean = vae.encode(large).mode() * config.STAGE2_LATENT_SCALE
        noise = torch.randn(clean.shape, generator=generator)
        degraded = submodule("flashvideo.degradation").degrade_latent(clean, noise, 300)
        refiner = checkpoints.load_dit(nano.nano_state("stage2"), dtype=torch.float32)
        velocity = refiner(degraded, torch.tensor([1000.0]), text[:1], degradation_step=300)
    assert (velocity - (clean - degraded)).square().mean() < 0.5 * (clean - degraded).square().mean()
