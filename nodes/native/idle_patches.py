"""Patches of ComfyUI's nodes that have no effect on this network: a warning once a run names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_execution.utils import get_executing_context
from execution import nodes  # ComfyUI's module; this pack's folder has the same name
from server import PromptServer

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
# Nodes that look for weights by the names of a UNet's, find none here and leave the MODEL as it was: only the graph
# shows them.
_TRACELESS = {
    "UNetSelfAttentionMultiply": "UNet Self-Attention Multiply",
    "UNetCrossAttentionMultiply": "UNet Cross-Attention Multiply",
    "UNetTemporalAttentionMultiply": "UNet Temporal Attention Multiply",
}
_CARRIERS = ("MODEL", "GUIDER")  # types of outputs by which a model reaches a sampler
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


def idle_nodes(graph: Mapping[str, Any], node_id: str) -> list[str]:
    """The nodes of a graph in ComfyUI's API format through which a node gets its model, and that do nothing to it."""
    found, seen, waiting = set(), set(), [node_id]
    while waiting:
        number = waiting.pop()
        if number in seen or number not in graph:
            continue
        seen.add(number)
        kind = graph[number]["class_type"]
        found |= {_TRACELESS[kind]} if kind in _TRACELESS else set()
        links = [value for value in graph[number]["inputs"].values() if isinstance(value, list) and len(value) == 2]
        waiting += [str(before) for before, slot in links if _carries_model(graph, str(before), slot)]
    return sorted(found)


def _carries_model(graph: Mapping[str, Any], number: str, slot: Any) -> bool:
    kind = nodes.NODE_CLASS_MAPPINGS.get(graph.get(number, {}).get("class_type"))
    types = tuple(getattr(kind, "RETURN_TYPES", ()))
    return isinstance(slot, int) and slot < len(types) and types[slot] in _CARRIERS


def _running_graph(prompt_id: str) -> Mapping[str, Any]:
    """The graph that the server runs under this number; empty without a server."""
    queue = getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)
    running = () if queue is None else queue.get_current_queue_volatile()[0]
    return next((item[2] for item in running if item[1] == prompt_id), {})


def warn_of_idle_patches(options: Mapping[str, Any]) -> None:
    """Warn of patches that do nothing, on the node that runs and once for each of its runs."""
    found, context = idle_patches(options), get_executing_context()
    if context is not None:
        found = sorted({*found, *idle_nodes(_running_graph(context.prompt_id), context.node_id)})
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
