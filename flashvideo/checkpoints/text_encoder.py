"""The T5 v1.1 encoder in a file, from the shapes of its weights; for other files, what they seem to be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import T5Config
from .architecture import Shapes, layer_count
from .foreign import describe_foreign
from .keymaps import find_layout
from .weights import CheckpointError, Weights, open_weights

_FIRST = "encoder.block.0.layer.0.SelfAttention.q.weight"  # every T5 has it
_GGUF_FIRST = "enc.blk.0.attn_q.weight"
_GGUF_NAMES = (  # parts of llama.cpp's names for T5's encoder, and what stands in their place elsewhere
    ("enc.blk.", "encoder.block."),
    ("enc.output_norm.", "encoder.final_layer_norm."),
    ("token_embd.", "shared."),
    *((f".attn_{part}.", f".layer.0.SelfAttention.{part}.") for part in "qkvo"),
    (".attn_rel_b.", ".layer.0.SelfAttention.relative_attention_bias."),
    (".attn_norm.", ".layer.0.layer_norm."),
    (".ffn_gate.", ".layer.1.DenseReluDense.wi_0."),
    (".ffn_up.", ".layer.1.DenseReluDense.wi_1."),
    (".ffn_down.", ".layer.1.DenseReluDense.wo."),
    (".ffn_norm.", ".layer.1.layer_norm."),
)
GGUF_ARCHITECTURE = "t5encoder"  # llama.cpp's word for it
T5_VOCABULARY = 32128
UMT5_VOCABULARY = 256384
BYT5_VOCABULARIES = (384, 1510)
TIED = "encoder.embed_tokens.weight"  # the same tensor as shared.weight
ADVICE = "Use t5xxl_fp16.safetensors (or an fp8 version of it), which Flux and Stable Diffusion 3 use too"


def is_text_encoder(weights: Weights) -> bool:
    """Whether a file is that of a T5 text encoder, by its names; another network beside it makes it none."""
    shapes = weights.shapes
    return _GGUF_FIRST in shapes or (_FIRST in shapes and find_layout(shapes) is None)


def open_text_encoder(source: str | Path | Mapping[str, Any]) -> Weights:
    """Open a file of a text encoder, or one that holds one beside other networks, as Save Checkpoint writes it.

    Names are those of the encoder alone. Raises CheckpointError as `open_weights` does.
    """
    weights = open_weights(source)
    if _GGUF_FIRST in weights.shapes:
        return _renamed(weights, {_from_gguf(name): name for name in weights.shapes})
    prefix = next((name.removesuffix(_FIRST) for name in weights.shapes if name.endswith(f".{_FIRST}")), "")
    if not prefix or _FIRST in weights.shapes:
        return weights
    return _renamed(weights, {name.removeprefix(prefix): name for name in weights.shapes if name.startswith(prefix)})


def _from_gguf(name: str) -> str:
    """The usual name of a tensor that llama.cpp's converter named."""
    for theirs, usual in _GGUF_NAMES:
        name = name.replace(theirs, usual)
    return name


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of the encoder."""
    for theirs, usual in _GGUF_NAMES:
        name = name.replace(usual, theirs)
    return name


def _renamed(weights: Weights, names: Mapping[str, str]) -> Weights:
    """Weights by new names; `names` gives the old ones."""

    def by_new_name(reopen: Callable[[], Callable[[str], Tensor]]) -> Callable[[], Callable[[str], Tensor]]:
        def opened() -> Callable[[str], Tensor]:
            read = reopen()
            return lambda name: read(names[name])

        return opened

    return Weights(
        weights.label,
        weights.container,
        {new: weights.shapes[old] for new, old in names.items()},
        {new: weights.dtypes[old] for new, old in names.items()},
        by_new_name(weights.reopen),
        weights.metadata,
        {new: weights.packings[old] for new, old in names.items() if old in weights.packings},
        weights.reopen_packed and by_new_name(weights.reopen_packed),
    )


def t5_config(weights: Weights) -> T5Config:
    """Architecture of a T5 v1.1 encoder from the shapes of its weights. Raises CheckpointError for another model."""
    shapes, label = weights.shapes, weights.label
    embeddings = shapes.get("shared.weight", shapes.get(TIED))
    first = "encoder.block.0.layer.{}".format
    attention, feed_forward = first("0.SelfAttention.q.weight"), first("1.DenseReluDense.wi_0.weight")
    if embeddings is None or attention not in shapes:
        raise CheckpointError(f"{label} is not a T5 text encoder: it seems to be {_no_t5(shapes)}. {ADVICE}")
    if foreign := _other_t5(shapes, embeddings[0] if embeddings else 0):
        raise CheckpointError(f"{label} seems to be {foreign}, which FlashVideo can't read. {ADVICE}")
    bias = first("0.SelfAttention.relative_attention_bias.weight")
    sizes = [shapes.get(name, ()) for name in (bias, attention, feed_forward)]
    if not all(len(size) == 2 and all(size) for size in (embeddings, *sizes)) or sizes[1][0] % sizes[0][1]:
        raise CheckpointError(f"{label} seems to be a part of a T5 text encoder only, or damaged. {ADVICE}")
    heads = sizes[0][1]
    blocks = {int(match[1]) for name in shapes if (match := re.match(r"encoder\.block\.(\d+)\.", name))}
    return T5Config(
        num_layers=layer_count(blocks, label),
        d_model=embeddings[1],
        d_ff=shapes[feed_forward][0],
        d_kv=shapes[attention][0] // heads,
        num_heads=heads,
        vocab_size=embeddings[0],
    )


def _no_t5(shapes: Shapes) -> str:
    """What a file without a T5 seems to be."""
    if layout := find_layout(shapes):
        return "FlashVideo's VAE" if layout.kind == "vae" else "a FlashVideo or CogVideoX diffusion model"
    if any("vision_model." in name or name.startswith("visual.") for name in shapes):
        return "a CLIP vision model, which reads pictures and not text"
    if any(".self_attn.q_proj." in name and not name.startswith("text_model.") for name in shapes):
        return "a language model (such as Gemma, Llama or Qwen)"
    return describe_foreign(shapes)


def _other_t5(shapes: Shapes, vocabulary: int) -> str | None:
    """Which relative of T5 v1.1 this is; None if it is T5 v1.1 itself."""
    if vocabulary == UMT5_VOCABULARY:
        return "UMT5-XXL (Wan's text encoder)"
    if vocabulary in BYT5_VOCABULARIES:
        return "ByT5 (HunyuanImage's second text encoder)"
    if vocabulary != T5_VOCABULARY:
        return f"a T5 with another vocabulary ({vocabulary:,} words; T5 v1.1 has {T5_VOCABULARY:,})"
    if "encoder.block.0.layer.1.DenseReluDense.wi.weight" in shapes:
        return "the first T5 (Cosmos's or Stable Audio's text encoder), not T5 v1.1"
    return None
