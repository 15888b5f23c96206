"""Preference tuning of stage II (FlashVideo table 7): best of n samples by a scorer, then fine-tuning on the best.

The settings of `python -m flashvideo train preference` are those of stage II and a table [choice]. The starting network
refines every clip `candidates` times, each with other noise; it then learns to give the one that the scorer prefers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...atomic_files import sha256
from ...config import DEGRADATION_STEP, STAGE2_LATENT_SCALE
from ...degradation import degrade_latent
from ...parallel import Ranks
from ...samplers import sample_stage2
from ..data.latents import LatentCache, cache_folder
from ..errors import TrainingError
from ..loop.metrics import psnr
from ..randomness import generator_for, normal_like
from ..rows import Batches, Rows
from .stage2 import Stage2Settings, Stage2Task, choose_reference

# score(candidate, clean) of videos [3, T, H, W] in [-1, 1]: the higher, the better
Scorer = Callable[[Tensor, Tensor], float]


def fidelity(candidate: Tensor, clean: Tensor) -> float:
    """How near a candidate is to the clean clip: PSNR in dB."""
    return psnr(candidate, clean)


def detail(candidate: Tensor, clean: Tensor) -> float:
    """How well the amount of detail agrees: minus the distance of gradient energies, in octaves."""
    energies = [
        sum(video.clamp(-1, 1).float().diff(dim=axis).square().mean() for axis in (-1, -2)).clamp_min(1e-8)
        for video in (candidate, clean)
    ]
    return -abs(float((energies[0] / energies[1]).log2()))


def sharpness(candidate: Tensor, _clean: Tensor) -> float:
    """How much detail there is, whatever the clean clip has: the gradient energy. It also prefers noise."""
    return float(sum(candidate.clamp(-1, 1).float().diff(dim=axis).square().mean() for axis in (-1, -2)))


SCORERS: dict[str, Scorer] = {"fidelity": fidelity, "detail": detail, "sharpness": sharpness}


@dataclass(frozen=True)
class ChoiceSettings:
    """How the clips that are learnt from are made and chosen."""

    clips: int = 64  # how many of the training's clips, the first ones
    candidates: int = 4  # 1 chooses nothing: tuning on the network's own samples as they come
    scorer: str = "fidelity"
    steps: int = 4
    cfg: float = 4.0
    strength: int = DEGRADATION_STEP

    def __post_init__(self) -> None:
        """Refuse settings that leave nothing to choose."""
        if self.scorer not in SCORERS:
            raise TrainingError(f"[choice] scorers are {', '.join(SCORERS)}; got {self.scorer!r}.")
        if min(self.candidates, self.clips) < 1:
            raise TrainingError(
                f"[choice] candidates and clips must be at least 1; got {self.candidates} and {self.clips}."
            )


@dataclass(frozen=True)
class PreferenceSettings(Stage2Settings):
    """All settings of preference tuning; its network must have weights to start from."""

    choice: ChoiceSettings = field(default_factory=ChoiceSettings)

    def __post_init__(self) -> None:
        """Refuse what stage II refuses, and a network that has nothing to choose from."""
        super().__post_init__()
        if not self.network.weights:
            raise TrainingError("Preference tuning starts from a trained stage II: set `weights` in [network].")
        if len(self.phases) != 1:
            raise TrainingError(f"Preference tuning has one of [[phases]]; got {len(self.phases)}.")
        phase = self.phases[0]
        if any(phase.window) or phase.lengths or self.pixels.weight:
            raise TrainingError(
                "Preference tuning learns whole clips, and latents alone: take `window` and `lengths` out of "
                "[[phases]], and [pixels] out of the config."
            )


class ChosenData(Batches):
    """data[i]: references, the samples chosen for them, and contexts of batch i."""

    def __init__(self, settings: PreferenceSettings, chosen: LatentCache) -> None:
        self.settings, self.chosen = settings, chosen

    def count(self, _index: int) -> int:
        """Every batch is as large."""
        return self.settings.phases[0].batch

    def part(self, rows: Rows) -> dict[str, Tensor]:
        """Read clips of a batch."""
        return self.chosen.batch(rows.of(self.chosen.draw(rows.count, self.settings.seed, "clips", rows.index)))


class PreferenceTask(Stage2Task):
    """Preference tuning, for the training loop."""

    def __init__(self, settings: PreferenceSettings, device: torch.device, ranks: Ranks | None = None) -> None:
        """Load the network; nothing is sampled yet."""
        super().__init__(settings, device, ranks)
        self.settings: PreferenceSettings = settings
        self.chosen = self._chosen(self.clips[0])
        self.data = ChosenData(settings, self.chosen)

    def prepare(self) -> None:
        """Let the network make the samples that aren't in the cache yet."""
        super().prepare()
        self.model.eval()
        self.chosen.fill(self.ranks)

    def _chosen(self, clips: LatentCache) -> LatentCache:
        """For each clip of the cache its reference, and the best of its samples as "clean"."""
        settings = self.settings
        network = settings.network
        source = settings.phases[0].clips.open("train", settings.seed)
        kinds = (clips.folder.name, settings.choice, settings.degradation, settings.seed, network)
        digest = sha256(Path(network.weights), lambda *_: None)
        judged_through = self.vae.digest  # the choice depends on the decoder, too
        folder = cache_folder(settings.cache, settings.vae, "chosen", digest, judged_through, *kinds)

        def make(index: int) -> tuple[dict[str, Tensor], str]:
            strong = torch.rand(1, generator=generator_for(settings.seed, "strong", "chosen", index))
            entry = choose_reference(clips.batch([index]), settings.degradation, strong)
            clean, _ = source.sample(index)
            best = self.choose(entry["reference"], entry["context"], clean, index)
            tensors = {"reference": entry["reference"][0], "clean": best, "context": entry["context"][0]}
            return tensors, clips.caption(index)

        return LatentCache(folder, min(settings.choice.clips, len(clips)), make)

    @torch.no_grad()
    def choose(self, reference: Tensor, context: Tensor, clean: Tensor, index: int) -> Tensor:
        """Refine clip `index` several times; return the best latent [C, T, h, w] in raw scale.

        `reference` and `context` are a batch of one, `clean` is the video [3, T, H, W] in [-1, 1].
        """
        choice, dtype = self.settings.choice, self.model.proj_out.weight.dtype
        reference = reference.to(self.device) * STAGE2_LATENT_SCALE
        context = context.to(self.device, dtype)
        best, highest = None, -float("inf")
        for candidate in range(choice.candidates):
            noise = normal_like(reference, generator_for(self.settings.seed, "candidate", index, candidate))
            latent = sample_stage2(
                self.called(reference), degrade_latent(reference, noise, choice.strength), context,
                torch.zeros_like(context), steps=choice.steps, cfg=choice.cfg, shift=self.settings.shift,
                degradation_step=choice.strength,
            )  # fmt: skip
            latent = latent / STAGE2_LATENT_SCALE
            score = SCORERS[choice.scorer](self.vae.decode(latent)[0], clean)
            if best is None or score > highest:
                best, highest = latent[0].cpu(), score
        return best
