"""What a decoder learns from beside its encoder's latents: those that stage II makes of enlarged drafts.

A latent that stage II has guessed holds less detail than a true one, and other errors. A decoder that knows both kinds
shows more of what the guess knows; of true latents it must still give back the clip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoints import load_dit
from ...config import STAGE2_LATENT_SCALE
from ...degradation import degrade_latent
from ...samplers import sample_stage2
from ...vae import Posterior
from ..config import check_strengths
from ..data.degradations import resize_frames
from ..errors import TrainingError
from ..randomness import generator_for, randint
from ..rows import Rows
from .networks import FrozenText, as_called
from .pixels import check_detail


@dataclass(frozen=True)
class RefinedSettings:
    """Which of the VAE's batches are refined drafts, and how these are made."""

    share: float = 0.0  # of batches; 0: none
    weight: float = 1.0  # of their loss; that of detail alone is small beside a whole picture's
    blend: float = 1.0  # of the written decoder's weights, so much is learnt and the rest what it began with
    stage2: str = ""  # its file
    text: str = ""  # the text encoder's, whose context of an empty prompt is used
    tokenizer: str = ""
    factor: float = 4.0  # by which drafts are enlarged
    strengths: tuple[int, int] = (60, 60)  # each batch has one of these and what is between
    steps: int = 4  # evaluations
    detail_size: float = 0.0  # pixels: what is larger isn't compared, see `pixels.PixelSettings`

    def __post_init__(self) -> None:
        """Refuse what is no share, weight, blend, strength, number of evaluations or size."""
        if not 0 <= self.share <= 1:
            raise TrainingError(f"[refined] share must be 0 to 1; got {self.share:g}.")
        if not 0 < self.blend <= 1:
            raise TrainingError(f"[refined] blend must be above 0, and at most 1; got {self.blend:g}.")
        if self.weight <= 0:
            raise TrainingError(f"[refined] weight must be above 0; got {self.weight:g}.")
        if self.factor < 1:
            raise TrainingError(f"[refined] factor must be 1 or more; got {self.factor:g}.")
        check_strengths(self.strengths, "[refined] strengths")
        if self.steps < 1:
            raise TrainingError(f"[refined] steps must be 1 or more; got {self.steps}.")
        check_detail(self.detail_size, "[refined]")


def blend_weights(began: Mapping[str, Tensor], learnt: Mapping[str, Tensor], blend: float) -> dict[str, Tensor]:
    """Weights between those that a training began with and those that it has learnt.

    In between, a network is nearly as good at what is new, and better at what it knew (arXiv 2109.01903).
    """
    return {name: began[name].to(weight).lerp(weight, blend) for name, weight in learnt.items()}


class RefinedLatents:
    """Stage II, which doesn't learn here, on drafts of a training's clips."""

    def __init__(self, settings: RefinedSettings, seed: int, device: torch.device) -> None:
        """Read the files; raises TrainingError if one of them isn't there."""
        self.settings, self.seed = settings, seed
        if not Path(settings.stage2).is_file():
            raise TrainingError(f"{settings.stage2 or '[refined] stage2'}: there is no such stage II. Train it first.")
        dit = load_dit(Path(settings.stage2), device=device, dtype=torch.float32, stage=2)
        self._network = as_called(dit.requires_grad_(False))
        text = FrozenText(settings.text, settings.tokenizer, device)
        self._context = text([""]).to(device)

    def chosen(self, index: int) -> bool:
        """Whether batch `index` is one of refined drafts."""
        return float(torch.rand((), generator=generator_for(self.seed, "refined", index))) < self.settings.share

    @torch.no_grad()
    def __call__(self, encode: Callable[[Tensor], Posterior], video: Tensor, rows: Rows) -> Tensor:
        """Clips [B, 3, T, H, W] in [-1, 1] -> what becomes of their drafts, [B, 16, T', h, w] in raw scale."""
        settings, generator = self.settings, generator_for(self.seed, "drafts", rows.index)
        posterior = encode(torch.stack([self._enlarged_draft(clip) for clip in video]))
        reference = posterior.sample(rows.normal_like(posterior.mean, generator)) * STAGE2_LATENT_SCALE
        strength = randint(generator, *settings.strengths)
        start = degrade_latent(reference, rows.normal_like(reference, generator), strength)
        context = self._context.expand(len(video), -1, -1)
        latent = sample_stage2(
            self._network, start, context, torch.zeros_like(context),
            steps=settings.steps, cfg=1.0, degradation_step=strength,
        )  # fmt: skip
        return latent / STAGE2_LATENT_SCALE

    def _enlarged_draft(self, clip: Tensor) -> Tensor:
        """Made smaller by means over areas, and enlarged as a clip of real footage is."""
        height, width = clip.shape[-2:]
        small = (max(1, round(side / self.settings.factor)) for side in (height, width))
        return resize_frames(resize_frames(clip, *small, "area"), height, width, "bicubic")
