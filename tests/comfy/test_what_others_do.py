"""Other nodes' patches, caches and broken inputs on our models: right, or said in words."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from draws import normal
from safetensors.torch import load_file, save_file
from torch import Tensor


@pytest.fixture(scope="module")
def draft_model(submodule: Callable[[str], ModuleType]) -> Any:
    """Nano's stage I as a MODEL, in float32."""
    load = submodule("nodes.native.model").load_model
    return load(submodule("flashvideo.nano").nano_state("stage1"), dtype=torch.float32)


@pytest.fixture(scope="module")
def draft_text(draft_model: Any) -> list[list]:
    """A prompt and the empty one for it."""
    width = draft_model.model.diffusion_model.config.text_dim
    return [[[normal(1, 8, width, seed=0), {}]], [[torch.zeros(1, 8, width), {}]]]


@pytest.fixture()
def draft(comfy_nodes: dict[str, Any], draft_text: list[list]) -> Callable[..., Tensor]:
    """Stage I Sampler on a MODEL."""

    def run(model: Any, steps: int = 8) -> Tensor:
        latent = {"samples": torch.zeros(1, 16, 2, 4, 6)}
        with torch.inference_mode():
            made = comfy_nodes["FlashVideoStage1Sampler"].execute(model, *draft_text, latent, 3, steps, 6.0, True)
        return made.result[0]["samples"]

    return run


@pytest.fixture()
def sample(comfy_nodes: dict[str, Any], draft_text: list[list]) -> Callable[..., Tensor]:
    """KSampler on stage I."""

    def run(model: Any) -> Tensor:
        inputs = (3, 4, 6.0, "euler", "simple", *draft_text, {"samples": torch.zeros(1, 16, 2, 4, 6)}, 1.0)
        with torch.inference_mode():
            return comfy_nodes["KSampler"]().sample(model, *inputs)[0]["samples"]

    return run


def test_easycache_that_skips_nothing_changes_nothing(
    comfy_nodes: dict[str, Any], draft_model: Any, draft: Callable[..., Tensor]
) -> None:
    cached = comfy_nodes["EasyCache"].execute(draft_model, 0.0, 0.0, 1.0, False).result[0]
    torch.testing.assert_close(draft(cached), draft(draft_model), rtol=0, atol=1e-5)


def test_easycache_skips_steps_and_leaves_a_picture(
    comfy_nodes: dict[str, Any], draft_model: Any, draft: Callable[..., Tensor]
) -> None:
    exact = draft(draft_model, 20)
    cached = comfy_nodes["EasyCache"].execute(draft_model, 0.2, 0.15, 0.95, False).result[0]
    skipped = draft(cached, 20)
    assert not torch.equal(skipped, exact)
    assert float((skipped - exact).std()) < float(exact.std())


def test_lazycache_that_skips_nothing_changes_nothing(
    comfy_nodes: dict[str, Any], draft_model: Any, draft: Callable[..., Tensor], sample: Callable[..., Tensor]
) -> None:
    cached = comfy_nodes["LazyCache"].execute(draft_model, 0.0, 0.0, 1.0, False).result[0]
    torch.testing.assert_close(draft(cached), draft(draft_model), rtol=0, atol=1e-5)
    torch.testing.assert_close(sample(cached), sample(draft_model), rtol=0, atol=1e-5)


def test_lazycache_skips_steps_and_leaves_a_picture(
    comfy_nodes: dict[str, Any], draft_model: Any, draft: Callable[..., Tensor]
) -> None:
    exact = draft(draft_model, 20)
    cached = comfy_nodes["LazyCache"].execute(draft_model, 0.2, 0.15, 0.95, False).result[0]
    skipped = draft(cached, 20)
    assert not torch.equal(skipped, exact)
    assert float((skipped - exact).std()) < float(exact.std())


@pytest.mark.parametrize("stage", [1, 2])
def test_comfyuis_own_8_bit_attention_is_called_where_a_node_chooses_it(
    stage: int,
    comfy_nodes: dict[str, Any],
    draft_model: Any,
    draft: Callable[..., Tensor],
    model: Any,
    degrade_and_refine: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What ComfyUI registers under that name; here it is its basic attention, for want of a card."""
    if "ModelAttentionBackend" not in comfy_nodes:
        pytest.skip("this ComfyUI has no node for that")
    from comfy.ldm.modules import attention

    calls: list[int] = []

    def registered(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return attention.attention_basic(*args, **kwargs)

    monkeypatch.setitem(attention.REGISTERED_ATTENTION_FUNCTIONS, "comfy_kitchen_int8", registered)
    latent = normal(1, 16, 2, 4, 6, seed=1)

    def run(used: Any) -> Tensor:
        return draft(used) if stage == 1 else degrade_and_refine(used, latent, 300, steps=1, cfg=1.0)

    base = draft_model if stage == 1 else model
    chosen = comfy_nodes["ModelAttentionBackend"]().patch(base, "comfy kitchen attention")[0]
    torch.testing.assert_close(run(chosen), run(base), rtol=0, atol=1e-4)
    assert calls


def test_what_samplings_give_is_never_what_they_were_given(submodule: Callable[[str], ModuleType]) -> None:
    """ComfyUI and its nodes may write to it."""
    library, latent = submodule("nodes.native.sampling"), normal(1, 16, 1, 2, 2, seed=1)
    sigma = torch.tensor([0.5])
    for sampling in (library.Stage1ExactSampling(4), library.Stage1Sampling(), library.RefinerSampling()):
        for made in (
            sampling.calculate_input(sigma, latent),
            sampling.calculate_denoised(sigma, latent, latent),
            sampling.noise_scaling(sigma[0], latent, torch.zeros_like(latent)),
        ):
            assert made.data_ptr() != latent.data_ptr()


def test_renorm_cfg_works(comfy_nodes: dict[str, Any], draft_model: Any, sample: Callable[..., Tensor]) -> None:
    changed = comfy_nodes["RenormCFG"].execute(draft_model, 100.0, 1.0).result[0]
    assert not torch.equal(sample(changed), sample(draft_model))
    assert torch.isfinite(sample(changed)).all()


IDLE = {
    "FreeU": (lambda nodes, model: nodes["FreeU"]().patch(model, 1.1, 1.2, 0.9, 0.2)[0], "FreeU"),
    "FreeU_V2": (lambda nodes, model: nodes["FreeU_V2"]().patch(model, 1.3, 1.4, 0.9, 0.2)[0], "FreeU"),
    "HyperTile": (lambda nodes, model: nodes["HyperTile"].execute(model, 256, 2, 0, False)[0], "HyperTile"),
    "ToMe": (lambda nodes, model: nodes["TomePatchModel"].execute(model, 0.3).result[0], "ToMe"),
    "PAG": (
        lambda nodes, model: nodes["PerturbedAttentionGuidance"].execute(model, 3.0).result[0],
        "Perturbed-Attention Guidance",
    ),
    "ScaleROPE": (
        lambda nodes, model: nodes["ScaleROPE"].execute(model, 2.0, 2.0, 1.0, 0, 0, 0).result[0],
        "ScaleROPE",
    ),
}


@pytest.mark.parametrize("kind", IDLE)
def test_patches_that_do_nothing_are_named(
    kind: str,
    comfy_nodes: dict[str, Any],
    submodule: Callable[[str], ModuleType],
    draft_model: Any,
    sample: Callable[..., Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    submodule("nodes.native.idle_patches")._reported.clear()
    patch, name = IDLE[kind]
    try:
        patched = patch(comfy_nodes, draft_model)
    except KeyError as error:
        if str(error) != "'ScaleROPE'":  # newer than the oldest ComfyUI
            raise
        pytest.skip("this ComfyUI has no such node")
    assert torch.isfinite(sample(patched)).all()
    assert caplog.text.count("they do nothing") == 1 and name in caplog.text


@pytest.mark.parametrize("kind", ["UNetSelfAttentionMultiply", "UNetCrossAttentionMultiply"])
def test_nodes_that_leave_no_trace_in_a_model_are_found_in_the_graph(
    kind: str,
    comfy_nodes: dict[str, Any],
    submodule: Callable[[str], ModuleType],
    draft_model: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import execution
    from comfy_execution.utils import CurrentNodeContext
    from server import PromptServer

    library, changed = submodule("nodes.native.idle_patches"), comfy_nodes[kind].execute(draft_model, 0.0, 0, 0, 0)
    assert changed.result[0].patches == {} and library.idle_patches(changed.result[0].model_options) == []
    node = "FlashVideoStage1Sampler"
    graph = {
        "1": {"class_type": "FlashVideoModelLoader", "inputs": {}},
        "2": {"class_type": kind, "inputs": {"model": ["1", 0], "q": 0.5}},
        "3": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["2", 0]}},
        "4": {"class_type": "CFGGuider", "inputs": {"model": ["3", 0]}},
        "5": {"class_type": "SamplerCustomAdvanced", "inputs": {"guider": ["4", 0]}},
        "6": {"class_type": node, "inputs": {"model": ["1", 0], "latent": ["5", 0]}},  # another model's latent
    }
    queue = execution.PromptQueue(SimpleNamespace(queue_updated=lambda: None))
    queue.put((0, "run", graph, {}, ["5", "6"]))
    queue.get(timeout=1)
    server = SimpleNamespace(prompt_queue=queue, send_progress_text=lambda *_: None)
    monkeypatch.setattr(PromptServer, "instance", server, raising=False)
    for number, warned in (("6", 0), ("5", 1), ("5", 1)):
        with CurrentNodeContext("run", number):
            library.warn_of_idle_patches({})
        assert caplog.text.count("they do nothing: UNet") == warned


def test_what_works_is_not_said_to_do_nothing(
    comfy_nodes: dict[str, Any], draft_model: Any, sample: Callable[..., Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    sample(comfy_nodes["RescaleCFG"]().patch(draft_model, 0.7)[0])
    sample(comfy_nodes["SkipLayerGuidanceDiT"].execute(draft_model, 2.0, 0.0, 1.0, "1").result[0])
    assert "they do nothing" not in caplog.text


def test_a_prompt_that_is_not_finite_is_refused_before_the_run(
    comfy_nodes: dict[str, Any], submodule: Callable[[str], ModuleType], draft_model: Any
) -> None:
    clip = submodule("nodes.native.clip").load_clip_native(None)
    encode = comfy_nodes["FlashVideoTextEncode"].execute
    with torch.inference_mode():
        encode(clip, "a (cat:1.2)", "none")
        with pytest.raises(ValueError, match=r"^FlashVideo Prompt: the encoded prompt holds numbers .* not finite"):
            encode(clip, "a (cat:1e400)", "none")
        (text,) = comfy_nodes["CLIPTextEncode"]().encode(clip, "a (cat:1e400)")
        (empty,) = comfy_nodes["CLIPTextEncode"]().encode(clip, "")
    latent = {"samples": torch.zeros(1, 16, 1, 4, 4)}
    with pytest.raises(ValueError, match=r"the positive prompt holds numbers that are not finite"):
        comfy_nodes["KSampler"]().sample(draft_model, 3, 2, 6.0, "euler", "simple", text, empty, latent, 1.0)
    with pytest.raises(ValueError, match=r"FlashVideo Stage I Sampler: negative holds numbers that are not finite"):
        comfy_nodes["FlashVideoStage1Sampler"].execute(draft_model, empty, text, latent, 3, 2, 6.0, True)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 16, 8, 8), (1, 4, 2, 8, 8), (1, 16, 0, 8, 8)])
def test_latents_that_are_no_videos_are_refused_by_the_vae(
    shape: tuple[int, ...], comfy_nodes: dict[str, Any], submodule: Callable[[str], ModuleType]
) -> None:
    vae = submodule("nodes.native.vae").load_vae_native("vae")
    latent = {"samples": torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"FlashVideo's VAE must be \[batch, 16, frames, height, width\]; got"):
        comfy_nodes["VAEDecode"]().decode(vae, latent)
    with pytest.raises(ValueError, match=r"FlashVideo's VAE must be \[batch, 16, frames, height, width\]; got"):
        comfy_nodes["VAEDecodeTiled"]().decode(vae, latent, 512, 64)


def test_a_lora_that_was_exported_again_is_read_again(
    run_prompt: Any, captured: dict[str, Any], comfy_base: Path, comfy_nodes: dict[str, Any]
) -> None:
    folder = comfy_base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "again.safetensors"
    stem = "diffusion_model.blocks.0.q.lora_{}.weight".format
    graph = {
        "model": {
            "class_type": "FlashVideoModelLoader",
            "inputs": {"model_name": "FlashVideo-Nano Stage I (built-in)", "weight_dtype": "default"},
        },
        "lora": {
            "class_type": "FlashVideoLoraLoader",
            "inputs": {"model": ["model", 0], "lora_name": file.name, "strength": 1.0},
        },
        "end": {"class_type": "TestCapture", "inputs": {"value": ["lora", 0], "name": "lora"}},
    }
    made = []
    for number, scale in enumerate((1.0, 1.0, 2.0)):
        if number != 1:
            save_file({stem("A"): torch.full((2, 128), scale), stem("B"): torch.ones(128, 2)}, file)
            os.utime(file, (number, number))
        run_prompt(copy.deepcopy(graph))  # ComfyUI keeps fingerprints in it
        made.append(captured["lora"])
    assert made[0] is made[1]
    assert made[2] is not made[0]
    (patch,) = made[2].patches["diffusion_model.blocks.0.q.weight"]
    assert float(patch[1].weights[1].max()) == 2.0


def test_what_save_checkpoint_writes_loads_again(
    comfy_nodes: dict[str, Any],
    submodule: Callable[[str], ModuleType],
    comfy_base: Path,
    model: Any,
) -> None:
    native, checkpoints = submodule("nodes.native.vae"), submodule("flashvideo.checkpoints")
    vae, clip = native.load_vae_native("vae"), submodule("nodes.native.clip").load_clip_native(None)
    comfy_nodes["CheckpointSave"]().save(model, clip, vae, "ours")
    (file,) = (comfy_base / "output").glob("ours_*.safetensors")
    assert checkpoints.load_dit(file).config == model.model.diffusion_model.config
    assert checkpoints.load_vae(file).config == vae.first_stage_model.config
    loaded = submodule("nodes.native.model").load_model(file)
    before, after = (each.model.diffusion_model.state_dict() for each in (model, loaded))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    again = submodule("nodes.native.clip").load_clip_native(file)
    assert torch.equal(*(each.encode_from_tokens(each.tokenize("a red ball")) for each in (clip, again)))
    network = [name for name in load_file(file) if name.startswith("model.diffusion_model.")]
    # Without this prefix, newer versions of ComfyUI take the network for CogVideoX's.
    assert network and all(name.startswith("model.diffusion_model.flashvideo.") for name in network)
    file.unlink()


@pytest.mark.parametrize("node", ["VAESave", "CheckpointSave"])
def test_a_saved_vae_keeps_its_norm_groups(
    node: str, comfy_nodes: dict[str, Any], submodule: Callable[[str], ModuleType], comfy_base: Path, model: Any
) -> None:
    """Shapes don't show them, and ComfyUI's nodes save no metadata of ours."""
    native, checkpoints = submodule("nodes.native.vae"), submodule("flashvideo.checkpoints")
    config = replace(submodule("flashvideo.config").NANO_VAE, norm_groups=4)
    state = submodule("flashvideo.vae").VideoVAE(config).state_dict()
    source = comfy_base / "models" / "four.safetensors"
    save_file(state, source, {"flashvideo.norm_groups": "4"})
    vae = native.load_vae_native(source)
    if node == "VAESave":
        comfy_nodes[node]().save(vae, "vae_again")
    else:
        comfy_nodes[node]().save(model, None, vae, "vae_again")
    (file,) = (comfy_base / "output").glob("vae_again_*.safetensors")
    assert checkpoints.load_vae(file).config == config
    again, frames = native.load_vae_native(file), torch.rand(5, 32, 48, 3)
    assert torch.equal(vae.encode(frames), again.encode(frames))
    file.unlink()


@pytest.mark.parametrize("stage", [1, 2])
def test_out_of_memory_names_window_tiles_and_size(
    stage: int,
    comfy_nodes: dict[str, Any],
    model: Any,
    draft_model: Any,
    text: dict[str, list],
    draft_text: list[list],
) -> None:
    import comfy.model_management
    import comfy.patcher_extension

    def fail(*_: Any, **__: Any) -> Tensor:
        raise comfy.model_management.OOM_EXCEPTION("CUDA out of memory. Tried to allocate 20.00 GiB")

    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    broken = (draft_model if stage == 1 else model).clone()
    broken.add_wrapper_with_key(kind, "broken", fail)
    latent = {"samples": torch.zeros(1, 16, 3, 16, 32)}
    if stage == 1:
        pattern = r"stage I ran out of memory with 256x128, 9 frames\. .*Tried to allocate 20"
        with pytest.raises(comfy.model_management.OOM_EXCEPTION, match=pattern):
            comfy_nodes["FlashVideoStage1Sampler"].execute(broken, *draft_text, latent, 3, 2, 6.0, True)
        return
    broken = comfy_nodes["FlashVideoSpatialTiles"].execute(broken, 128).result[0]
    degraded = comfy_nodes["FlashVideoLatentDegradation"].execute({"samples": normal(1, 16, 3, 16, 32, seed=1)}, 600, 0)
    pattern = r"stage II ran out of memory with 256x128, 9 frames, window 49, tiles of 128 pixels\. .*Tried to allocate"
    with pytest.raises(comfy.model_management.OOM_EXCEPTION, match=pattern):
        comfy_nodes["FlashVideoStage2Refiner"].execute(
            broken, text["positive"], text["negative"], degraded.result[0], 2, 5.0, 2.5, "euler"
        )


def test_other_errors_stay_as_they_are(model: Any, submodule: Callable[[str], ModuleType]) -> None:
    explained = submodule("nodes.native.out_of_memory").explained
    with pytest.raises(RuntimeError, match=r"^something else$"), explained(model, torch.zeros(1, 16, 1, 2, 2), 2):
        raise RuntimeError("something else")
    plain, latent = SimpleNamespace(model_options={}), torch.zeros(1, 16, 1, 2, 2)
    with pytest.raises(MemoryError, match="stage II ran out of memory"), explained(plain, latent, 2):
        raise MemoryError
