"""Both stages as ComfyUI's MODELs: stored, compiled and patched as others are, with the memory that they ask for."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_graphs import NANO_STAGE2

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"


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
    tokens = t5.T5Tokens("")
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
