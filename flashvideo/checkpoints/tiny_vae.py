"""Files of the tiny autoencoder (TAECVX) for FlashVideo's latents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..vae.tiny import LATENT_CHANNELS, WIDTHS, TinyDecoder
from .weights import CheckpointError, open_weights

MARK = "taecvx"  # in the file's name: the tiny autoencoders of other models have the same layers


def is_tiny(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a file with these tensors is a tiny autoencoder of this architecture, whichever model's."""
    return shapes.get("decoder.1.weight") == (WIDTHS[0], LATENT_CHANNELS, 3, 3) and "decoder.22.weight" in shapes


def load_tiny(source: str | Path, decoder: TinyDecoder, dtype: torch.dtype) -> TinyDecoder:
    """Fill a decoder, which may be without memory, from a file such as taecvx.safetensors; returns it for inference.

    Raises CheckpointError for a file of another kind or another model's.
    """
    weights = open_weights(source)
    if not is_tiny(weights.shapes):
        raise CheckpointError(f"{weights.label} is no tiny autoencoder such as {MARK}.safetensors.")
    if MARK not in weights.label.lower():
        raise CheckpointError(
            f"{weights.label} is a tiny autoencoder, and {MARK}.safetensors is the one for FlashVideo's latents. Those "
            f'of other models look the same inside: if it is the right one, give it a name with "{MARK}".'
        )
    state = {}
    for name, tensor in decoder.state_dict().items():
        if name not in weights.shapes:
            raise CheckpointError(f"{weights.label} is incomplete: {name} is missing.")
        found = weights.read(name)
        rows = len(tensor)
        # Files may hold the layers that make two frames where one is wanted: the last one's rows are at the end.
        if name.endswith(".conv.weight") and tensor.shape[2:] == (1, 1):
            found = found[-rows:]
        if found.shape != tensor.shape:
            raise CheckpointError(
                f"{weights.label} doesn't fit: {name} is {list(found.shape)} and should be {list(tensor.shape)}."
            )
        state[name] = found.to(dtype, copy=True)  # copied, so that it doesn't change when its file is replaced
    decoder.load_state_dict(state, assign=True)
    return decoder.eval().requires_grad_(False)
