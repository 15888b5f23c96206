"""Approximate attention, where a user asks for it: in the refiner, in KSampler, in the long video; else exact."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from types import ModuleType
from typing import Any

import comfy.cli_args
import comfy.ldm.modules.attention as core_attention
import pytest
import torch
from comfy_api.latest import InputImpl, Types
from draws import normal
from safetensors.torch import load_file
from torch import Tensor

STRENGTH, STEPS, SHIFT, CFG = 450, 2, 2.5, 4.0
SHAPE = (1, 16, 2, 8, 12)  # as many patches: one a latent pixel
LARGER_THAN_A_TILE = (1, 16, 2, 16, 24)
VIEWS = ["wide view", "medium view", "narrow view"]
# ComfyUI computes with its own attention in other pieces; guidance multiplies the rounding by 4, twice.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def fast(comfy_nodes: dict[str, Any], model: Any) -> Callable[..., Any]:
    """The MODEL behind the node."""
    node = comfy_nodes["FlashVideoFastAttention"]
    return lambda attention, use=model: node.execute(model=use, attention=attention).result[0]


@pytest.fixture(scope="module")
def refine(degrade_and_refine: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Degrade a latent and refine it, with the two nodes."""

    def run(model: Any, shape: tuple[int, ...] = SHAPE) -> Tensor:
        return degrade_and_refine(model, normal(*shape), STRENGTH, steps=STEPS, cfg=CFG, shift=SHIFT)

    return run


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_gives_what_the_library_gives(
    view: str,
    fast: Callable[..., Any],
    refine: Callable[..., Tensor],
    submodule: Callable[[str], ModuleType],
    text: dict[str, list],
    model: Any,
) -> None:
    sparse = submodule("flashvideo.dit.tile_attention")
    nano = submodule("flashvideo.nano").nano_state("stage2")
    dit = submodule("flashvideo.checkpoints").load_dit(nano, dtype=torch.float32)
    context, uncond = (text[name][0][0] for name in ("positive", "negative"))
    windows = sparse.WindowAttention(context.shape[1], (2, 8, 12), sparse.VIEWS[view.split()[0]])
    scale = submodule("flashvideo.config").STAGE2_LATENT_SCALE
    noise = submodule("nodes.native.stages").latent_noise(torch.Size(SHAPE), 1)
    start = submodule("flashvideo.degradation").degrade_latent(normal(*SHAPE) * scale, noise, STRENGTH)
    expected = submodule("flashvideo.samplers").sample_stage2(
        lambda *given, **named: dit(*given, **named, attention=windows, order=windows.order),
        start,
        context,
        uncond,
        steps=STEPS,
        cfg=CFG,
        shift=SHIFT,
        degradation_step=STRENGTH,
    )
    result = refine(fast(view))
    torch.testing.assert_close(result, expected / scale, rtol=0, atol=TOLERANCE)
    assert (result - refine(model)).abs().max() > 100 * TOLERANCE


def test_exact_changes_no_bit_and_the_model_that_came_in_stays_exact(
    fast: Callable[..., Any], refine: Callable[..., Tensor], model: Any
) -> None:
    before = refine(model)
    narrow = refine(fast("narrow view"))
    assert torch.equal(refine(fast("exact")), before)
    assert torch.equal(refine(model), before)
    assert not torch.equal(narrow, before)


def test_a_second_node_takes_the_place_of_the_first(fast: Callable[..., Any], refine: Callable[..., Tensor]) -> None:
    assert torch.equal(refine(fast("wide view", fast("narrow view"))), refine(fast("wide view")))


def test_ksampler_sees_the_same_view(
    comfy_nodes: dict[str, Any], fast: Callable[..., Any], refine: Callable[..., Tensor], text: dict[str, list]
) -> None:
    settings = {"strength": STRENGTH, "shift": SHIFT}
    with torch.inference_mode():
        ready = comfy_nodes["FlashVideoRefinerSettings"].execute(model=fast("medium view"), **settings).result[0]
        sampled = comfy_nodes["KSampler"]().sample(
            ready, 1, STEPS, CFG, "euler", "simple", **text, latent_image={"samples": normal(*SHAPE)}
        )[0]["samples"]
    torch.testing.assert_close(sampled, refine(fast("medium view")), rtol=0, atol=TOLERANCE)


def test_a_long_video_is_made_anew_with_another_attention(
    comfy_nodes: dict[str, Any],
    fast: Callable[..., Any],
    submodule: Callable[[str], ModuleType],
    model: Any,
    text: dict[str, list],
) -> None:
    frames = torch.rand(5, 64, 96, 3, generator=torch.Generator().manual_seed(2))
    video = InputImpl.VideoFromComponents(Types.VideoComponents(images=frames, frame_rate=Fraction(8)))
    vae = submodule("nodes.native.vae").load_vae_native("vae")
    size = {"size": "keep", "short_side": 1080, "scale": 4.0, "width": 64, "height": 48, "resample": "bilinear"}
    refining = {"strength": STRENGTH, "steps": 1, "cfg": CFG, "shift": SHIFT, "seed": 5, "color_match": "none"}

    def run(model: Any) -> tuple[Any, Tensor]:
        inputs = {"model": model, "vae": vae, **text, "video": video, **size, **refining}
        with torch.inference_mode():
            result = comfy_nodes["FlashVideoRefineLongVideo"].execute(**inputs).result[0]
        return result.get_stream_source(), result.get_components().images

    (exact, plain), (narrow, changed), (again, _) = run(model), run(fast("narrow view")), run(fast("narrow view"))
    assert exact != narrow == again
    assert plain.shape == changed.shape and not torch.equal(plain, changed)


def test_8_bit_attention_is_comfyuis_sage_attention_in_a_view_too(
    fast: Callable[..., Any],
    refine: Callable[..., Tensor],
    submodule: Callable[[str], ModuleType],
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What ComfyUI registers under that name is called; here it is its basic attention, for want of a card."""
    calls: list[int] = []

    def registered(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(q.shape[2])
        return core_attention.attention_basic(q, *args, **kwargs)

    with_sage = submodule("nodes.native.attention").with_sage
    plain, wide = refine(model), refine(fast("wide view"))
    monkeypatch.setitem(core_attention.REGISTERED_ATTENTION_FUNCTIONS, "sage", registered)
    torch.testing.assert_close(refine(with_sage(model)), plain, rtol=0, atol=TOLERANCE)
    assert set(calls) == {8 + 2 * 8 * 12}
    calls.clear()
    torch.testing.assert_close(refine(with_sage(fast("wide view"))), wide, rtol=0, atol=TOLERANCE)
    assert set(calls) == {8, 2 * 2 * 3}  # the text, and tiles


def test_8_bit_attention_says_what_it_lacks(fast: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    registered = core_attention.REGISTERED_ATTENTION_FUNCTIONS
    monkeypatch.delitem(registered, "sage", raising=False)
    with pytest.raises(
        ValueError, match="^FlashVideo Fast Attention: .* needs the package sageattention, .* wide view"
    ):
        fast("8-bit (SageAttention)")
    monkeypatch.setitem(registered, "sage", core_attention.attention_basic)
    with pytest.raises(ValueError, match="^FlashVideo Fast Attention: .* needs an NVIDIA card; this model runs on cpu"):
        fast("8-bit (SageAttention)")


def test_other_models_are_refused(fast: Callable[..., Any], submodule: Callable[[str], ModuleType]) -> None:
    golden = submodule("flashvideo.nano").NANO_FOLDER.parents[1] / "tests" / "data" / "golden"
    draft = submodule("nodes.native.model").load_model(load_file(golden / "dit_stage1_weights.safetensors"))
    with pytest.raises(ValueError, match="^FlashVideo Fast Attention: model must be .* got FlashVideo stage I "):
        fast("wide view", draft)


def test_comfyui_makes_room_for_a_windows_keys_and_values(
    fast: Callable[..., Any], refine: Callable[..., Tensor], model: Any, asked_memory: list[float]
) -> None:
    for use in (model, fast("narrow view"), fast("wide view"), fast("wide view", fast("wide view"))):
        refine(use)
    exact, narrow, wide, again = asked_memory
    assert exact < narrow < wide == again


def test_tiles_before_and_behind_make_room_for_a_tile_and_its_views_keys(
    fast: Callable[..., Any],
    refine: Callable[..., Tensor],
    comfy_nodes: dict[str, Any],
    model: Any,
    asked_memory: list[float],
) -> None:
    def tiled(use: Any) -> Any:
        return comfy_nodes["FlashVideoSpatialTiles"].execute(model=use, tile=128).result[0]

    for use in (fast("wide view"), tiled(model), tiled(fast("wide view")), fast("wide view", tiled(model))):
        refine(use, LARGER_THAN_A_TILE)
    whole, tile, before, behind = asked_memory
    assert tile < before == behind < whole


def test_a_compiled_model_sees_the_same_view(fast: Callable[..., Any], refine: Callable[..., Tensor]) -> None:
    """What core's TorchCompileModel does, in one graph."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    compiled = fast("medium view").clone()
    torch._dynamo.reset()
    set_torch_compile_wrapper(compiled, backend="eager", fullgraph=True)
    torch.testing.assert_close(refine(compiled), refine(fast("medium view")), rtol=0, atol=TOLERANCE)
    torch._dynamo.reset()


def test_a_cpu_uses_pytorchs_attention_unless_a_start_option_names_another(
    submodule: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = submodule("nodes.native.attention").exact_attention
    assert core_attention.optimized_attention is core_attention.attention_sub_quad  # ComfyUI's own choice on a CPU
    assert chosen(torch.device("cpu")) is core_attention.attention_pytorch
    assert chosen(torch.device("cuda")) is core_attention.optimized_attention
    monkeypatch.setattr(comfy.cli_args.args, "use_quad_cross_attention", True)
    assert chosen(torch.device("cpu")) is core_attention.optimized_attention
