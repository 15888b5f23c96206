"""T5 as a text encoder outside ComfyUI: tokens, contexts, and the network itself, of any size."""

from __future__ import annotations

import importlib
import lzma
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import CheckpointError
from .checkpoints.text_encoder import TIED, open_text_encoder, t5_config
from .checkpoints.weights import QUANTISATION, some
from .config import T5_POSITION_BUCKETS, TEXT_TOKENS, T5Config
from .errors import CommandError

# T5 v1.1's, by Google, under the Apache License 2.0; the same in every size of T5.
_TOKENIZER = Path(__file__).resolve().parents[1] / "models" / "t5_tokenizer.json.xz"
_WITHOUT = "Without --tokenizer the pack's own is used."
NO_MOTION = "none"
MOTIONS = (NO_MOTION, "very low", "low", "medium", "high", "very high")


def with_motion(text: str, motion: str) -> str:
    """The prompt as the official scripts put it: "medium motion," and the text, without a space."""
    return text if motion == NO_MOTION else f"{motion} motion,{text}"


class T5Tokens:
    """T5's tokenizer, always 226 tokens: padded with 0, and cut where a text is longer."""

    def __init__(self, path: str) -> None:
        """Read a tokenizer.json; an empty path stands for the one that comes with the pack. Raises CommandError."""
        tokenizers, file = _library("tokenizers"), Path(path) if path else _TOKENIZER
        if not file.is_file():
            raise CommandError(f"There is no tokenizer {file}. {_WITHOUT}")
        try:
            text = file.read_text(encoding="utf-8") if path else lzma.decompress(file.read_bytes()).decode()
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the package raises nothing narrower
            raise CommandError(f"{file} is no tokenizer.json ({str(error).splitlines()[0]}). {_WITHOUT}") from error
        self._tokenizer.enable_truncation(TEXT_TOKENS)
        self._tokenizer.enable_padding(length=TEXT_TOKENS, pad_id=0, pad_token="<pad>")

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[B, 226] token numbers."""
        return torch.tensor([encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))])


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        message = f"Reading text needs the package {name}, which ComfyUI brings: pip install {name}."
        raise CommandError(message) from error


def t5_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a T5 v1.1 encoder's weights, as Hugging Face and ComfyUI have them."""
    width, inner = config.d_model, config.d_kv * config.num_heads
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (config.vocab_size, width)}
    for index in range(config.num_layers):
        attention, feed_forward = (f"encoder.block.{index}.layer.{part}." for part in (0, 1))
        for name in ("q", "k", "v"):
            shapes[f"{attention}SelfAttention.{name}.weight"] = (inner, width)
        shapes[f"{attention}SelfAttention.o.weight"] = (width, inner)
        if index == 0:
            bias = (T5_POSITION_BUCKETS, config.num_heads)
            shapes[f"{attention}SelfAttention.relative_attention_bias.weight"] = bias
        shapes[f"{attention}layer_norm.weight"] = (width,)
        for name in ("wi_0", "wi_1"):
            shapes[f"{feed_forward}DenseReluDense.{name}.weight"] = (config.d_ff, width)
        shapes[f"{feed_forward}DenseReluDense.wo.weight"] = (width, config.d_ff)
        shapes[f"{feed_forward}layer_norm.weight"] = (width,)
    shapes["encoder.final_layer_norm.weight"] = (width,)
    return shapes


class T5Encoder(nn.Module):
    """T5's encoder without an attention mask: padding is attended to, as FlashVideo was trained."""

    def __init__(self, config: T5Config) -> None:
        """Build with arbitrary weights; see `load_encoder`."""
        super().__init__()
        transformers = _library("transformers")
        self.network = transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=config.vocab_size,
                d_model=config.d_model,
                d_ff=config.d_ff,
                d_kv=config.d_kv,
                num_heads=config.num_heads,
                num_layers=config.num_layers,
                relative_attention_num_buckets=T5_POSITION_BUCKETS,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, 226] -> [B, 226, width]."""
        return self.network(input_ids=tokens).last_hidden_state

    def weights(self) -> dict[str, Tensor]:
        """Weights by the names that ComfyUI reads."""
        return {name: tensor for name, tensor in self.network.state_dict().items() if name != TIED}

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Take weights by those names, as they are; others are passed over. Raises CommandError if one is missing."""
        missing, _ = self.network.load_state_dict(state, strict=False, assign=True)
        self.network.encoder.embed_tokens = self.network.shared
        if missing := [name for name in missing if name != TIED]:
            raise CommandError(f"The text encoder lacks {missing[0]}.")


def load_encoder(
    path: Path | Mapping[str, Tensor], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> T5Encoder:
    """Load a T5 encoder of any size from one file or a state; its sizes follow from the weights.

    Raises CheckpointError for another model's file, an incomplete one and a quantised one.
    """
    weights = open_text_encoder(path)
    if any(QUANTISATION.search(name) for name in weights.shapes):
        raise CheckpointError(f"{weights.label} is quantised, which only ComfyUI reads: take t5xxl_fp16.safetensors.")
    config = t5_config(weights)
    found = {**weights.shapes, "shared.weight": weights.shapes.get("shared.weight", weights.shapes.get(TIED))}
    if wrong := [name for name, shape in t5_shapes(config).items() if found.get(name) != shape]:
        raise CheckpointError(
            f"{weights.label} is incomplete or damaged: {len(wrong)} weights are not as they should be ({some(wrong)})."
        )
    with torch.device("meta"):
        encoder = T5Encoder(config)
    # Placed one by one, so that a cast or a copy to the device never holds the weights twice.
    names = [name for name in weights.shapes if name.startswith(("shared.", "encoder.")) and name != TIED]
    state = {name: weights.read(name).to(device, dtype) for name in names}
    if "shared.weight" not in state:
        state["shared.weight"] = weights.read(TIED).to(device, dtype)
    encoder.load_weights(state)
    return encoder.eval()


@torch.inference_mode()
def contexts(encoder: T5Encoder, tokens: T5Tokens, texts: Sequence[str], batch: int = 16) -> Tensor:
    """Encode texts: [N, 226, width] in float32 on the CPU. Raises CommandError for another model's tokens."""
    device, known = next(encoder.parameters()).device, encoder.network.config.vocab_size
    numbers = tokens(texts)
    if int(numbers.max()) >= known:
        raise CommandError(
            f"The tokenizer gives token {int(numbers.max())} and the text encoder knows {known}: they don't belong "
            f"together. {_WITHOUT}"
        )
    return torch.cat([encoder(part.to(device)).float().cpu() for part in numbers.split(batch)])
