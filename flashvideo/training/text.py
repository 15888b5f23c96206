"""T5 as a text encoder: tokens, contexts, and training of the miniature one.

The miniature learns twice. First alone, and fast: the mean of its output must tell the caption's words and pairs of
neighbouring words ("striped red", "red circle", "moves left"), so that prompts become separable and a colour stays
with its shape. Then, if the config says so, together with stage I, which tells it what matters for the picture.
"""

from __future__ import annotations

import importlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..config import TEXT_TOKENS
from ..nano import NANO_SEED, NANO_TEXT_ENCODER, T5_POSITION_BUCKETS, T5Config, build_nano
from ..weightfiles import open_weights
from .checkpointing import export_weights
from .config import LoopSettings
from .errors import TrainingError
from .metrics import text_page
from .scenes import SceneStream

TOKENIZER_IN_COMFYUI = Path("comfy") / "text_encoders" / "t5_tokenizer" / "tokenizer.json"
TIED = "encoder.embed_tokens.weight"  # the same tensor as shared.weight
_BLOCK_COUNT = re.compile(r"encoder\.block\.(\d+)\.")


class T5Tokens:
    """T5's tokenizer, always 226 tokens: padded with 0, and cut where a caption is longer."""

    def __init__(self, path: str) -> None:
        """Read a tokenizer.json; an empty path stands for the one that comes with ComfyUI."""
        tokenizers = _library("tokenizers")
        self._tokenizer = tokenizers.Tokenizer.from_file(str(_find_tokenizer(path)))
        self._tokenizer.enable_truncation(TEXT_TOKENS)
        self._tokenizer.enable_padding(length=TEXT_TOKENS, pad_id=0, pad_token="<pad>")

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[B, 226] token numbers."""
        return torch.tensor([encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))])


def _find_tokenizer(path: str) -> Path:
    if path:
        candidates = [Path(path)]
    else:
        roots = [Path(os.environ["COMFYUI_PATH"])] if "COMFYUI_PATH" in os.environ else []
        pack = Path(__file__).resolve().parents[2]
        roots += [pack.parents[1], pack / ".bed" / "ComfyUI"]  # installed in custom_nodes, or with its own ComfyUI
        candidates = [root / TOKENIZER_IN_COMFYUI for root in roots]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise TrainingError(
            f"T5's tokenizer isn't at {candidates[0]}. Give the tokenizer.json of ComfyUI's "
            f"{TOKENIZER_IN_COMFYUI.parent} folder with --tokenizer, or ComfyUI's folder in COMFYUI_PATH."
        )
    return found


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        message = f"Training on text needs the package {name}, which ComfyUI brings: pip install {name}."
        raise TrainingError(message) from error


class T5Encoder(nn.Module):
    """T5's encoder without an attention mask: padding is attended to, as FlashVideo was trained."""

    def __init__(self, config: T5Config) -> None:
        """Build with the library's own weights; see `fresh_encoder` and `load_encoder`."""
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


def fresh_encoder(seed: int) -> T5Encoder:
    """The miniature encoder with starting weights."""
    encoder = T5Encoder(NANO_TEXT_ENCODER)
    _load(encoder, build_nano(seed)["text_encoder"])
    return encoder


def load_encoder(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> T5Encoder:
    """Load a T5 encoder of any size from one file; its sizes follow from the weights."""
    weights = open_weights(path)
    shapes = weights.shapes
    blocks = [int(match[1]) for name in shapes if (match := _BLOCK_COUNT.match(name))]
    try:
        first = "encoder.block.0.layer."
        heads = shapes[f"{first}0.SelfAttention.relative_attention_bias.weight"][1]
        vocabulary, width = shapes["shared.weight"]
        inner = shapes[f"{first}0.SelfAttention.q.weight"][0]
        feed_forward = shapes[f"{first}1.DenseReluDense.wi_0.weight"][0]
    except KeyError as error:
        raise TrainingError(f"{path} is no T5 v1.1 encoder: it has no {error.args[0]}.") from error
    config = T5Config(1 + max(blocks), width, feed_forward, inner // heads, heads, vocabulary)
    with torch.device(device):
        encoder = T5Encoder(config).to(dtype)
    _load(encoder, {name: weights.read(name) for name in shapes if name.startswith(("shared.", "encoder."))})
    return encoder


def _load(encoder: T5Encoder, state: dict[str, Tensor]) -> None:
    missing, _ = encoder.network.load_state_dict(state, strict=False)
    if missing := [name for name in missing if name != TIED]:
        raise TrainingError(f"The text encoder lacks {missing[0]}.")


@torch.inference_mode()
def contexts(encoder: T5Encoder, tokens: T5Tokens, texts: Sequence[str], batch: int = 16) -> Tensor:
    """Encode texts: [N, 226, width] in float32 on the CPU."""
    device = next(encoder.parameters()).device
    parts = [texts[start : start + batch] for start in range(0, len(texts), batch)]
    return torch.cat([encoder(tokens(part).to(device)).float().cpu() for part in parts])


@dataclass(frozen=True)
class TextSettings:
    """A whole config file of the text encoder's own training."""

    seed: int
    out: Path
    loop: LoopSettings
    batch: int = 64
    vocabulary_captions: int = 20_000  # from which the list of words and pairs is made
    rarest: int = 20  # words and pairs that occur less often there aren't asked for
    validation_captions: int = 256
    tokenizer: str = ""


class CaptionData(Dataset):
    """data[i]: tokens [B, 226] and which words and pairs each caption has, [B, labels]."""

    def __init__(self, stream: SceneStream, tokens: T5Tokens, labels: dict[str, int], batch: int) -> None:
        self.stream, self.tokens, self.labels, self.batch = stream, tokens, labels, batch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Write batch `index`."""
        captions = [self.stream.caption(index * self.batch + row) for row in range(self.batch)]
        target = torch.zeros(self.batch, len(self.labels))
        for row, caption in enumerate(captions):
            target[row, [self.labels[part] for part in words_and_pairs(caption) if part in self.labels]] = 1
        return {"tokens": self.tokens(captions), "target": target}


def words_and_pairs(caption: str) -> set[str]:
    """Words of a caption, and pairs of neighbouring words."""
    words = re.findall(r"[^\W_]+", caption.lower())
    return {*words, *(f"{one} {two}" for one, two in zip(words, words[1:], strict=False))}


class TextTask:
    """The text encoder's own training as the loop sees it."""

    def __init__(self, settings: TextSettings, device: torch.device) -> None:
        """Build the encoder with fresh weights, and a linear layer that reads its mean."""
        self.settings = settings
        tokens = T5Tokens(settings.tokenizer)
        stream = SceneStream("train", 16, 16, 1, settings.seed)
        counts = Counter(
            part for index in range(settings.vocabulary_captions) for part in words_and_pairs(stream.caption(index))
        )
        frequent = sorted(part for part, count in counts.items() if count >= settings.rarest)
        self.labels = {part: place for place, part in enumerate(frequent)}
        if not self.labels:
            raise TrainingError("No word is frequent enough to be learnt: lower `rarest`, or take more captions.")
        reader = nn.Linear(NANO_TEXT_ENCODER.d_model, len(self.labels))
        nn.init.zeros_(reader.weight)
        nn.init.constant_(reader.bias, -3.0)  # most labels are absent from most captions
        self.model = nn.ModuleDict({"encoder": fresh_encoder(NANO_SEED), "reader": reader}).to(device)
        self.data = CaptionData(stream, tokens, self.labels, settings.batch)
        held_out = SceneStream("validation", 16, 16, 1, settings.seed)
        self._held_out = CaptionData(held_out, tokens, self.labels, settings.validation_captions)[0]
        self.description = {"network": "text", "width": NANO_TEXT_ENCODER.d_model, "labels": len(self.labels)}

    def loss(self, batch: dict[str, Tensor], _index: int) -> dict[str, Tensor]:
        """How badly the mean output tells the words and pairs."""
        return {"loss": F.binary_cross_entropy_with_logits(self._read(batch["tokens"]), batch["target"])}

    def _read(self, tokens: Tensor) -> Tensor:
        return self.model["reader"](self.model["encoder"](tokens).mean(dim=1)).float()

    def validate(self) -> dict[str, float]:
        """Of held-out captions: the F1 of words and pairs, and how many captions are told without a mistake."""
        predicted, target = self._predictions()
        right = (predicted & target).sum().item()
        f1 = 2 * right / max(1, predicted.sum().item() + target.sum().item())
        return {"f1": f1, "flawless": (predicted == target).all(dim=1).float().mean().item()}

    def _predictions(self) -> tuple[Tensor, Tensor]:
        device = next(self.model.parameters()).device
        return self._read(self._held_out["tokens"].to(device)).cpu() > 0, self._held_out["target"] > 0

    def sheet(self) -> Image.Image:
        """Some held-out captions, and which pairs were missed or invented."""
        predicted, target = self._predictions()
        names, lines = list(self.labels), []
        for row in range(min(12, len(target))):
            lines.append(self._held_out_caption(row))
            for word, wrong in (("missed", target[row] & ~predicted[row]), ("invented", predicted[row] & ~target[row])):
                if wrong.any():
                    lines.append(f"    {word}: " + ", ".join(names[place] for place in wrong.nonzero()[:, 0].tolist()))
        return text_page(lines)

    def _held_out_caption(self, index: int) -> str:
        return SceneStream("validation", 16, 16, 1, self.settings.seed).caption(index)

    def export(self, folder: Path, step: int) -> dict[Path, dict[str, float]]:
        """Write text_encoder.safetensors."""
        with torch.no_grad():
            scores = self.validate()
        path = folder / "text_encoder.safetensors"
        export_weights(path, self.model["encoder"].weights(), text_metadata(step))
        return {path: scores}


def text_metadata(step: int) -> dict[str, str]:
    """Return what a text encoder's file says of itself."""
    return {"flashvideo.trained": "true", "flashvideo.step": str(step)}
