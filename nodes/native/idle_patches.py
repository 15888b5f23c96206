"""Patches of ComfyUI's nodes that have no effect on this network: a warning once a run names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_execution.utils import get_executing_context

from .notices import warn

# The nodes that add a patch, by its key in the transformer options.
_PATCHES = {
    "attn1_patch": "HyperTile, ToMe",
    "attn1_output_patch": "HyperTile, ToMe",
    "output_block_patch": "FreeU",
}
_REPLACED = {"attn1": "Self-Attention Guidance"}
_SUPPORTED = "dit"  # block replacements, which the network applies
_ROPE = "rope_options"
_GUIDANCE = {"nodes_pag": "Perturbed-Attention Guidance", "nodes_sag": "Self-Attention Guidance"}
_MOST_REPORTED = 256
_reported: set[tuple[Any, ...]] = set()


def idle_patches(options: Mapping[str, Any]) -> list[str]:
    """The nodes that added patches to a MODEL's options which do nothing here."""
    inside = options.get("transformer_options", {})
    found = [_PATCHES.get(name, name) for name, patches in inside.get("patches", {}).items() if patches]
    replaced = inside.get("patches_replace", {})
    found += [_REPLACED.get(name, name) for name, patches in replaced.items() if patches and name != _SUPPORTED]
    found += ["ScaleROPE"] if inside.get(_ROPE) else []
    modules = [getattr(each, "__module__", "") for each in options.get("sampler_post_cfg_function", [])]
    found += [node for module in modules for name, node in _GUIDANCE.items() if module.endswith(name)]
    return sorted(set(found))


def warn_of_idle_patches(options: Mapping[str, Any]) -> None:
    """Warn of patches that do nothing, on the node that runs and once for each of its runs."""
    found = idle_patches(options)
    context = get_executing_context()
    run = (*found, *((context.prompt_id, context.node_id) if context is not None else ()))
    if not found or run in _reported:
        return
    if len(_reported) >= _MOST_REPORTED:
        _reported.clear()
    _reported.add(run)
    warn(
        f"FlashVideo: what these nodes change has no place in this model, so they do nothing: {', '.join(found)}.",
        None if context is None else context.node_id,
    )
