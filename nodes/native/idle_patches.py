"""Patches of ComfyUI's nodes that this network has no place for: they do nothing, and that is said once a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_execution.utils import get_executing_context

from .notices import tell

# By the key under which a patch lies in the transformer options, the nodes that put it there.
_PATCHES = {
    "attn1_patch": "HyperTile, ToMe",
    "attn1_output_patch": "HyperTile, ToMe",
    "output_block_patch": "FreeU",
}
_REPLACED = {"attn1": "Self-Attention Guidance"}
_TAKEN = "dit"  # the block replacements that the network makes use of
_ROPE = "rope_options"
_GUIDANCE = {"nodes_pag": "Perturbed-Attention Guidance", "nodes_sag": "Self-Attention Guidance"}
_MOST_SAID = 256
_said: set[tuple[Any, ...]] = set()


def idle_patches(options: Mapping[str, Any]) -> list[str]:
    """The nodes behind a MODEL's options whose patches do nothing here."""
    inside = options.get("transformer_options", {})
    found = [_PATCHES.get(name, name) for name, patches in inside.get("patches", {}).items() if patches]
    replaced = inside.get("patches_replace", {})
    found += [_REPLACED.get(name, name) for name, patches in replaced.items() if patches and name != _TAKEN]
    found += ["ScaleROPE"] if inside.get(_ROPE) else []
    modules = [getattr(each, "__module__", "") for each in options.get("sampler_post_cfg_function", [])]
    found += [node for module in modules for name, node in _GUIDANCE.items() if module.endswith(name)]
    return sorted(set(found))


def tell_idle_patches(options: Mapping[str, Any]) -> None:
    """Say which patches do nothing, on the node that runs and once for each of its runs."""
    found = idle_patches(options)
    context = get_executing_context()
    run = (*found, *((context.prompt_id, context.node_id) if context is not None else ()))
    if not found or run in _said:
        return
    if len(_said) >= _MOST_SAID:
        _said.clear()
    _said.add(run)
    tell(
        f"FlashVideo: what these nodes change has no place in this model, so they do nothing: {', '.join(found)}.",
        None if context is None else context.node_id,
    )
