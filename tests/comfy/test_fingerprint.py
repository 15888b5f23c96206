"""Which patched networks count as the same: an unfinished long video goes on with the very network it began with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType, ModuleType
from typing import Any

import comfy.model_management
import numpy as np
import pytest
import torch


def test_a_fingerprint_tells_networks_apart_and_nothing_else(
    submodule: Callable[[str], ModuleType], model: Any
) -> None:
    fingerprint = submodule("nodes.native.fingerprint").weights_fingerprint
    again = submodule("nodes.native.model").load_model(submodule("flashvideo.nano").nano_state("stage2"))
    name = "diffusion_model.blocks.0.q.weight"
    assert fingerprint(again) == fingerprint(model)
    shape = again.model.state_dict()[name].shape
    patched = again.clone()
    patched.add_patches({name: ("diff", (torch.ones(shape),))}, 0.5)
    stronger = again.clone()
    stronger.add_patches({name: ("diff", (torch.ones(shape),))}, 0.6)
    before = fingerprint(patched)
    assert len({before, fingerprint(stronger), fingerprint(again)}) == 3
    comfy.model_management.load_models_gpu([patched])  # the weights hold the patch now
    assert fingerprint(patched) == before
    assert fingerprint(again) == fingerprint(model)


def test_a_fingerprint_knows_the_settings_of_patches(submodule: Callable[[str], ModuleType], model: Any) -> None:
    from comfy_extras.nodes_model_advanced import RescaleCFG
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    fingerprint = submodule("nodes.native.fingerprint").weights_fingerprint

    class Holder:
        def __init__(self, strength: float) -> None:
            self.strength, self.model, self.itself = strength, model, self

        def __call__(self, args: dict[str, Any]) -> torch.Tensor:
            return args["denoised"]

    def hold(strength: float) -> Any:
        patched = model.clone()
        patched.set_model_sampler_post_cfg_function(Holder(strength))
        return patched

    def replace(strength: float) -> Any:
        patched = model.clone()
        patched.add_object_patch("diffusion_model.proj_out.forward", partial(max, strength))
        return patched

    def rescale(multiplier: float) -> Any:
        return RescaleCFG().patch(model, multiplier)[0]

    def skip(scale: float) -> Any:
        return SkipLayerGuidanceDiT.execute(model, scale, 0.0, 1.0, "0", "1").result[0]

    def bind(index: float) -> Any:
        patched = model.clone()
        block = model.model.diffusion_model.blocks[round(index)]
        patched.add_object_patch("diffusion_model.proj_out.forward", MethodType(max, block))
        return patched

    deep: list[Any] = [Holder(1.0)]
    for _ in range(2000):
        deep[0], deep[0].strength = Holder(1.0), deep[0]
    fingerprint(hold(deep[0]))  # comes to an end
    for patch in (rescale, skip, hold, replace, bind):
        first, again, other = (fingerprint(patch(value)) for value in (0.3, 0.3, 0.9))
        assert first == again != other, patch
        assert first != fingerprint(model)


class Slotted:
    """Keeps a setting where no dictionary is."""

    __slots__ = ("strength",)

    def __init__(self, strength: float) -> None:
        self.strength = strength


@pytest.mark.parametrize(
    "kind",
    [float, np.float32, lambda value: {value}, lambda value: np.full(3, value), Slotted],
    ids=["number", "numpy", "set", "array", "slots"],
)
def test_a_fingerprint_knows_the_settings_of_wrappers(
    submodule: Callable[[str], ModuleType], model: Any, kind: Callable[[float], Any]
) -> None:
    fingerprint = submodule("nodes.native.fingerprint").weights_fingerprint

    def wrapped(value: Any) -> str:
        patched = model.clone()
        patched.add_wrapper_with_key("predict_noise", "test", lambda executor, *args: executor(*args, value))
        return fingerprint(patched)

    itself: dict[str, Any] = {}
    itself["itself"] = itself
    wrapped(itself)  # comes to an end
    assert wrapped(kind(0.3)) == wrapped(kind(0.3)) != wrapped(kind(0.9))
    assert wrapped(kind(0.3)) != fingerprint(model)


def test_a_fingerprint_stays_while_things_run(submodule: Callable[[str], ModuleType], model: Any) -> None:
    """What patches and hooks remember of a run is not what they were made with."""
    import comfy.hooks

    module = submodule("nodes.native.fingerprint")
    patched = submodule("nodes.native.model").load_model(submodule("flashvideo.nano").nano_state("stage2"))
    network = patched.model.diffusion_model
    patched.add_object_patch("diffusion_model.proj_out.forward", MethodType(lambda *_: None, network))
    name = "diffusion_model.blocks.0.q.weight"
    patched.add_patches({name: ("diff", (torch.ones(patched.model.state_dict()[name].shape),))}, 0.5)
    frames = comfy.hooks.HookKeyframeGroup()
    frames.add(comfy.hooks.HookKeyframe(strength=0.5, start_percent=0.2))
    hooks = comfy.hooks.create_hook_lora({name: torch.ones(2)}, 1.0, 1.0)
    hooks.set_keyframes_on_hooks(frames)
    before = [module.weights_fingerprint(patched), module.fingerprint(hooks)]
    comfy.model_management.load_models_gpu([patched])
    for hook in hooks.hooks:
        hook.initialize_timesteps(patched.model)
    assert [module.weights_fingerprint(patched), module.fingerprint(hooks)] == before
    hooks.hooks[0].hook_keyframe.keyframes[0].strength = 0.6
    assert module.fingerprint(hooks) != before[1]
