"""T5 as a text encoder outside ComfyUI: tokens, contexts, and the network itself, of any size."""

from __future__ import annotations

import importlib
import lzma
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoints import CheckpointError
from .checkpoints.text_encoder import TIED, open_text_encoder, t5_config
from .checkpoints.weights import QUANTISATION, some
from .config import NO_MOTION, T5_POSITION_BUCKETS, TEXT_TOKENS, T5Config
from .errors import CommandError

# T5 v1.1's, by Google, under the Apache License 2.0; the same in every size of T5.
_TOKENIZER = Path(__file__).resolve().parents[1] / "models" / "t5_tokenizer.json.xz"
_WITHOUT = "Without --tokenizer the pack's own is used."
NORM_EPSILON = 1e-6
LONGEST_DISTANCE = 128  # in tokens, that has a bias of its own
LARGEST_HALF = 64504.0  # float16's largest number, less 1000


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


class RMSNorm(nn.Module):
    """T5's norm: no mean is taken off and nothing is added, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] -> the same shape, in the weights' data type."""
        wide = x.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPSILON)
        return self.weight * normal.to(self.weight.dtype)


class SelfAttention(nn.Module):
    """Attention without a scale, with a bias for each distance of two tokens."""

    def __init__(self, config: T5Config, *, has_bias: bool) -> None:
        """`has_bias`: the first block keeps the biases of all."""
        super().__init__()
        width, inner = config.d_model, config.d_kv * config.num_heads
        self.heads = config.num_heads
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in "qkv")
        self.o = nn.Linear(inner, width, bias=False)
        if has_bias:
            self.relative_attention_bias = _embedding(T5_POSITION_BUCKETS, config.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """[B, N, width] and [heads, N, N] -> [B, N, width]."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(2, 3) + bias
        attended = scores.softmax(-1, dtype=torch.float32).to(scores.dtype) @ v
        return self.o(attended.transpose(1, 2).flatten(2))

    def bias(self, count: int) -> Tensor:
        """[heads, N, N]: of the query's token, then the key's."""
        places = torch.arange(count, device=self.relative_attention_bias.weight.device)
        return self.relative_attention_bias(position_buckets(places - places[:, None])).permute(2, 0, 1)


def position_buckets(distance: Tensor) -> Tensor:
    """Which bias belongs to a key so many tokens after the query: half of them are for each direction.

    Half of those are for one distance each, the others grow with its logarithm up to LONGEST_DISTANCE.
    """
    each = T5_POSITION_BUCKETS // 2
    exact = each // 2
    far = (distance.abs().float() / exact).log() / math.log(LONGEST_DISTANCE / exact) * (each - exact)
    bucket = torch.where(distance.abs() < exact, distance.abs(), (exact + far.clamp(0).long()).clamp(max=each - 1))
    return bucket + each * (distance > 0)


class GatedGELU(nn.Module):
    """A feed-forward layer of three matrices."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(config.d_model, config.d_ff, bias=False) for _ in range(2))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] -> the same shape."""
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class Residual(nn.Module):
    """A layer behind its norm, whose result is added; named as Hugging Face does."""

    def __init__(self, name: str, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, layer)
        self.layer_norm = RMSNorm(width)

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        """[B, N, width] -> the same shape."""
        x = x + getattr(self, self.name)(self.layer_norm(x), *given)
        if x.dtype == torch.float16:  # T5-XXL's largest numbers are beyond it
            return x.clamp(-LARGEST_HALF, LARGEST_HALF)
        return x


def _embedding(count: int, width: int) -> nn.Embedding:
    """With any numbers: to draw them takes time, and on the meta device PyTorch imports sympy for it."""
    return nn.Embedding.from_pretrained(torch.empty(count, width), freeze=False)


class T5Network(nn.Module):
    """T5 v1.1's encoder (arXiv 1910.10683; v1.1: arXiv 2002.05202), its weights named as in Hugging Face's files."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        width = config.d_model
        self.shared = _embedding(config.vocab_size, width)
        self.encoder = nn.Module()
        self.encoder.embed_tokens = self.shared
        self.encoder.block = nn.ModuleList()
        for index in range(config.num_layers):
            attention = SelfAttention(config, has_bias=index == 0)
            parts = (("SelfAttention", attention), ("DenseReluDense", GatedGELU(config)))
            block = nn.Module()
            block.layer = nn.ModuleList(Residual(name, layer, width) for name, layer in parts)
            self.encoder.block.append(block)
        self.encoder.final_layer_norm = RMSNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N] -> [B, N, width]."""
        x = self.shared(tokens)
        bias = self.encoder.block[0].layer[0].SelfAttention.bias(tokens.shape[1])
        for block in self.encoder.block:
            attention, feed_forward = block.layer
            x = feed_forward(attention(x, bias))
        return self.encoder.final_layer_norm(x)


class T5Encoder(nn.Module):
    """T5's encoder without an attention mask: padding is attended to, as FlashVideo was trained."""

    def __init__(self, config: T5Config) -> None:
        """Build with arbitrary weights; see `load_encoder`."""
        super().__init__()
        self.network = T5Network(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, 226] -> [B, 226, width]."""
        return self.network(tokens)

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
    device, known = next(encoder.parameters()).device, encoder.network.shared.num_embeddings
    numbers = tokens(texts)
    if int(numbers.max()) >= known:
        raise CommandError(
            f"The tokenizer gives token {int(numbers.max())} and the text encoder knows {known}: they don't belong "
            f"together. {_WITHOUT}"
        )
    return torch.cat([encoder(part.to(device)).float().cpu() for part in numbers.split(batch)])
