"""Training of the miniature text encoder.

The miniature learns twice. First alone, and fast: the mean of its output must tell the caption's words and pairs of
neighbouring words ("striped red", "red circle", "moves left"), so that prompts become separable and a colour stays
with its shape. Then, if the config says so, together with stage I, which tells it what matters for the picture.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..nano import NANO_SEED, NANO_TEXT_ENCODER, build_nano
from ..t5 import T5Encoder, T5Tokens
from .checkpointing import export_weights
from .config import LoopSettings
from .errors import TrainingError
from .metrics import text_page
from .scenes import SceneStream


def fresh_encoder(seed: int) -> T5Encoder:
    """The miniature encoder with starting weights."""
    encoder = T5Encoder(NANO_TEXT_ENCODER)
    encoder.load_weights(build_nano(seed)["text_encoder"])
    return encoder


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
