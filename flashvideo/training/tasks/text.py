"""Training of the miniature text encoder.

The miniature learns twice. First alone, and fast: every token's output must predict the token itself and its
neighbours (the output of "circle" knows that the circle is red, striped and moves), so that no word is lost and a
colour stays with its shape. Then, if the config asks for it, together with stage I, from which it learns what matters
for the picture.

Predicting all words from the mean of the outputs was tried before, and lost the shapes: 48 numbers can't hold a
sentence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from ...config import NANO_TEXT_ENCODER
from ...nano import NANO_SEED, build_part
from ...parallel import Ranks
from ...t5 import T5Encoder, T5Tokens
from ..config import LoopSettings
from ..loop.checkpointing import export_weights
from ..loop.metrics import text_page
from ..rows import Batches, Rows
from ..scenes.stream import SceneStream
from .networks import ShortText

NEIGHBOURS = (-3, -2, -1, 0, 1, 2)  # positions, relative to a token, of those that it must predict
_PADDING = 0
_UNKNOWN = -100  # the target of tokens that captions don't have; such places are left out of the loss


def fresh_encoder(seed: int) -> T5Encoder:
    """The miniature encoder with starting weights."""
    encoder = T5Encoder(NANO_TEXT_ENCODER)
    encoder.load_weights({name: weight.float() for name, weight in build_part("text_encoder", seed).items()})
    return encoder


@dataclass(frozen=True)
class TextSettings:
    """All settings of the text encoder's own training."""

    seed: int
    out: Path
    loop: LoopSettings
    batch: int = 32
    vocabulary_captions: int = 5_000  # from which the list of tokens is made
    validation_captions: int = 256
    tokenizer: str = ""
    short_text: ShortText = field(default_factory=ShortText)


class CaptionData(Batches):
    """data[i]: tokens of a batch of captions, [B, 226]; of all rows, whose tokens count together."""

    def __init__(self, stream: SceneStream, tokens: T5Tokens, batch: int) -> None:
        self.stream, self.tokens, self.batch = stream, tokens, batch

    def captions(self, index: int) -> list[str]:
        """Write batch `index`."""
        return [self.stream.caption(index * self.batch + row) for row in range(self.batch)]

    def count(self, _index: int) -> int:
        """Every batch is as large."""
        return self.batch

    def part(self, rows: Rows) -> dict[str, Tensor]:
        """The batch as tokens."""
        return {"tokens": self.tokens(self.captions(rows.index))}


class TextTask:
    """The text encoder's own training, for the training loop."""

    def __init__(self, settings: TextSettings, device: torch.device, _ranks: Ranks | None = None) -> None:
        """Build the encoder with fresh weights, and a linear layer that reads each token's output."""
        self.settings = settings
        tokens = T5Tokens(settings.tokenizer)
        self.data = CaptionData(_captions("train", settings.seed), tokens, settings.batch)
        known = torch.unique(tokens([self.data.stream.caption(index) for index in range(settings.vocabulary_captions)]))
        self._places = torch.full((NANO_TEXT_ENCODER.vocab_size,), _UNKNOWN)
        self._places[known] = torch.arange(len(known))
        reader = nn.Linear(NANO_TEXT_ENCODER.d_model, len(NEIGHBOURS) * len(known))
        nn.init.zeros_(reader.weight)
        nn.init.zeros_(reader.bias)
        self.model = nn.ModuleDict({"encoder": fresh_encoder(NANO_SEED), "reader": reader}).to(device)
        self._held_out = CaptionData(_captions("validation", settings.seed), tokens, settings.validation_captions)
        self.description = {"network": "text", "width": NANO_TEXT_ENCODER.d_model, "tokens": len(known)}

    def prepare(self) -> None:
        """Captions are made as they are needed."""

    def loss(self, batch: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
        """Mean cross entropy of all neighbours, in nats."""
        tokens = self.settings.short_text.cut(batch["tokens"], rows.index // self.settings.loop.accumulate)
        guesses, targets = self._read(rows.of(tokens))
        counted = (self._targets(tokens) != _UNKNOWN).sum() * rows.share  # as many as if all rows had the same number
        return {"loss": F.cross_entropy(guesses, targets, ignore_index=_UNKNOWN, reduction="sum") / counted}

    def _read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions of the neighbours of each token of [B, N], [K, known], and what the neighbours are, [K].

        Padding predicts nothing, but is predicted as a neighbour. Positions outside the text are left out.
        """
        guesses = self.model["reader"](self.model["encoder"](tokens)).float()
        guesses = rearrange(guesses, "b n (neighbours known) -> b n neighbours known", neighbours=len(NEIGHBOURS))
        guesses = rearrange(guesses[tokens != _PADDING], "n neighbours known -> (n neighbours) known")
        return guesses, self._targets(tokens)

    def _targets(self, tokens: Tensor) -> Tensor:
        """What the neighbours of each token of [B, N] are, [K]."""
        reach = max(map(abs, NEIGHBOURS))
        around = F.pad(self._places.to(tokens.device)[tokens], (reach, reach), value=_UNKNOWN)
        count = tokens.shape[1]
        targets = torch.stack([around[:, reach + place :][:, :count] for place in NEIGHBOURS], -1)
        return targets[tokens != _PADDING].flatten()

    def validate(self) -> dict[str, float]:
        """Of held-out captions: the share of neighbours that are predicted right, and of captions without a mistake."""
        right = [self._predicted(row) for row in self._held_out[0]["tokens"]]
        return {
            "told": torch.cat(right).float().mean().item(),
            "flawless": sum(each.all().item() for each in right) / len(right),
        }

    def _predicted(self, tokens: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        guesses, targets = self._read(tokens[None].to(device))
        return (guesses.argmax(-1) == targets)[targets != _UNKNOWN].cpu()

    def sheet(self) -> Image.Image:
        """Some held-out captions, and the share of each that is predicted right."""
        rows = zip(self._held_out.captions(0)[:24], self._held_out[0]["tokens"], strict=False)
        return text_page([f"{self._predicted(tokens).float().mean():7.1%}  {caption}" for caption, tokens in rows])

    def export(self, folder: Path, step: int) -> dict[Path, dict[str, float]]:
        """Write text_encoder.safetensors."""
        with torch.no_grad():
            scores = self.validate()
        path = folder / "text_encoder.safetensors"
        export_weights(path, self.model["encoder"].weights(), text_metadata(step))
        return {path: scores}


def _captions(split: str, seed: int) -> SceneStream:
    return SceneStream(split, 16, 16, 1, seed)


def text_metadata(step: int) -> dict[str, str]:
    """The metadata of a text encoder's file."""
    return {"flashvideo.trained": "true", "flashvideo.step": str(step)}
