"""Training of stage II: flow matching from degraded to clean latents, at a low and then at full resolution."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...config import DEGRADATION_STEP, SPATIAL_FACTOR, STAGE2_LATENT_SCALE, STAGE2_SHIFT
from ...degradation import degrade_latent
from ...dit import FlashVideoDiT
from ...parallel import Ranks
from ...samplers import sample_stage2
from ..config import LoopSettings, check_strengths
from ..data.degradations import LatentDegradation, StrongDegradation, WeakDegradation
from ..data.frozen_vae import FrozenVAE
from ..data.latents import (
    ClipSettings,
    LatentCache,
    cache_folder,
    check_lengths,
    content_of,
    draw_length,
    enlarged_draft,
    sample_uncut,
)
from ..errors import TrainingError
from ..loop.metrics import psnr, sheet
from ..randomness import generator_for, normal_like, randint, spread_uniform
from ..rows import Batches, Rows
from . import networks
from .losses import CAPTION_DROPOUT, Network, drop_captions, flow_step, own_flow_step
from .pixels import PixelSettings, decoder_of, visible_loss, visible_part, weighted_loss

VALIDATION_SEED = 1


@dataclass(frozen=True)
class Phase:
    """A part of training at one size, which ends before optimiser step `until`."""

    until: int
    batch: int
    clips: ClipSettings
    window: tuple[int, int] = (0, 0)  # latent pixels of a piece of each clip, rows and columns; (0, 0): all of it
    lengths: tuple[int, ...] = ()  # latent frames of a piece: one is drawn for each batch; empty: all of them
    from_start: float = (
        0.0  # of the pieces, so many begin with their clip for certain, as they must for pixels to count
    )

    def __post_init__(self) -> None:
        """Refuse pieces larger than the clips, lengths of nothing, and what is no probability."""
        if not 0 <= self.from_start <= 1:
            raise TrainingError(f"[[phases]] from_start must be 0 to 1; got {self.from_start:g}.")
        sides = self._whole
        if any(self.window) and not all(0 < part <= side for part, side in zip(self.window, sides, strict=True)):
            raise TrainingError(
                f"[[phases]] window must be 1 to {sides[0]} by 1 to {sides[1]} latent pixels; got {list(self.window)}."
            )
        check_lengths(self.lengths, "[[phases]]")

    @property
    def _whole(self) -> tuple[int, int]:
        return self.clips.height // SPATIAL_FACTOR, self.clips.width // SPATIAL_FACTOR

    @property
    def sides(self) -> tuple[int, int]:
        """Latent rows and columns of a piece."""
        return self.window if any(self.window) else self._whole

    def piece(self, latent: Tensor, generator: torch.Generator) -> tuple[slice, ...]:
        """A random piece of latents [B, 16, T', h, w], the same for all of them, as slices.

        It may begin anywhere in time too, as a long video's windows do.
        """
        length = draw_length(self.lengths, latent.shape[2], generator)
        sides = zip(latent.shape[2:], (length, *self.sides), strict=True)
        starts = [(randint(generator, 0, side - part), part) for side, part in sides]
        if self.from_start and float(torch.rand((), generator=generator)) < self.from_start:
            starts[0] = 0, length
        return (..., *(slice(start, start + part) for start, part in starts))


@dataclass(frozen=True)
class DegradationSettings:
    """How the reference is degraded. Paper, table 6: none, pixel, or pixel and latent degradation."""

    pixel: bool = True  # False: the reference is the clean clip
    strong_probability: float = 0.5
    coded_probability: float = 0.0  # of drafts that are shrunk by `factor` and went through the VAE, as stage I's do
    factor: tuple[float, float] = (4.0, 4.0)  # of the weak degradation
    latent_steps: tuple[int, int] = (600, 750)  # 999, 999: noise alone; 0, 0: next to nothing
    latent_power: float = 1.0  # above 1, weak noise is drawn more often

    def __post_init__(self) -> None:
        """Refuse what is no probability, and powers that don't pick a step."""
        chances = (self.strong_probability, self.coded_probability)
        if min(chances) < 0 or sum(chances) > 1:
            raise TrainingError(
                "[degradation] strong_probability and coded_probability must be 0 or more, and at most 1 together; "
                f"got {' and '.join(map(str, chances))}."
            )
        check_strengths(self.latent_steps, "[degradation] latent_steps")
        if not 1 <= self.factor[0] <= self.factor[1]:
            raise TrainingError(
                f"[degradation] factor must be two numbers of 1 or more, the smaller first; got {list(self.factor)}."
            )
        if self.latent_power <= 0:
            raise TrainingError(f"[degradation] latent_power must be above 0; got {self.latent_power}.")


@dataclass(frozen=True)
class SheetSettings:
    """How the refiner is run on held-out clips while training."""

    clips: int = 2
    steps: int = 4
    cfg: float = 4.0
    strength: int = DEGRADATION_STEP


@dataclass(frozen=True)
class Stage2Settings:
    """All settings of stage II."""

    seed: int
    out: Path
    cache: Path  # folder of latents; may be shared by runs
    vae: Path
    text: str  # the text encoder, which doesn't learn here
    loop: LoopSettings
    phases: tuple[Phase, ...]
    tokenizer: str = ""
    shift: float = STAGE2_SHIFT
    caption_dropout: float = CAPTION_DROPOUT
    own_steps: float = 0.0  # of batches, so many learn where the network has come to by itself: see `own_flow_step`
    short_text: networks.ShortText = field(default_factory=networks.ShortText)
    degradation: DegradationSettings = field(default_factory=DegradationSettings)
    pixels: PixelSettings = field(default_factory=PixelSettings)
    network: networks.NetworkSettings = field(default_factory=networks.NetworkSettings)
    sheet: SheetSettings = field(default_factory=SheetSettings)

    def __post_init__(self) -> None:
        """Refuse phases that don't fill the schedule, and what is no probability."""
        if not 0 <= self.own_steps <= 1:
            raise TrainingError(f"own_steps must be 0 to 1; got {self.own_steps:g}.")
        ends = [phase.until for phase in self.phases]
        if not ends or ends != sorted(set(ends)) or ends[-1] != self.loop.steps:
            last = self.loop.steps
            raise TrainingError(f"[[phases]] must end one after the other, the last at step {last}; got {ends}.")
        shown = [phase for phase in self.phases if self.pixels.weight and phase.until > self.pixels.since]
        seen = min((side for phase in shown for side in phase.sides), default=self.pixels.window)
        if self.pixels.window > seen:
            raise TrainingError(
                f"[pixels] window must be at most {seen}, the shortest side of a phase's pieces in latent pixels; got "
                f"{self.pixels.window}."
            )


class PairData(Batches):
    """data[i]: clean and reference latents in raw scale, and contexts, of the phase that batch i is in.

    Where pixels count, and the batch's pieces begin with their clips, also "video", part of each clip [B, 3, F, h, w],
    and "place", the latent row and column where that part begins in the piece.
    """

    def __init__(self, settings: Stage2Settings, caches: list[LatentCache]) -> None:
        self.settings, self.caches = settings, caches
        self.sources = [phase.clips.open("train", settings.seed) for phase in settings.phases]

    def _number(self, index: int) -> int:
        """Which phase batch `index` is in."""
        step, phases = index // self.settings.loop.accumulate, self.settings.phases
        return next((i for i, phase in enumerate(phases) if step < phase.until), len(phases) - 1)

    def count(self, index: int) -> int:
        """Every batch of a phase is as large."""
        return self.settings.phases[self._number(index)].batch

    def part(self, rows: Rows) -> dict[str, Tensor]:
        """Read clips of a batch."""
        settings, index = self.settings, rows.index
        step, number = index // settings.loop.accumulate, self._number(index)
        cache, phase = self.caches[number], settings.phases[number]
        clips = rows.of(cache.draw(phase.batch, settings.seed, "clips", index))
        entries = cache.batch(clips)
        chance = rows.of(torch.rand(phase.batch, generator=generator_for(settings.seed, "strong", index)))
        batch = choose_reference(entries, settings.degradation, chance)
        piece = phase.piece(batch["clean"], generator_for(settings.seed, "piece", index))
        batch = {name: latent if name == "context" else latent[piece] for name, latent in batch.items()}
        if settings.pixels.weight and step >= settings.pixels.since and piece[1].start == 0:
            videos = [self.sources[number].sample(clip)[0] for clip in clips]
            batch |= visible_part(videos, piece, settings.pixels.window, generator_for(settings.seed, "pixels", index))
        return batch


def choose_reference(entries: dict[str, Tensor], settings: DegradationSettings, chance: Tensor) -> dict[str, Tensor]:
    """Pick each clip's reference: `chance` [B] in [0, 1] falls to the strong one, then a coded draft, or the weak."""
    if settings.pixel:
        chance, reference = chance[:, None, None, None, None], entries["weak"]
        if settings.coded_probability:
            coded = chance < settings.strong_probability + settings.coded_probability
            reference = torch.where(coded, entries["coded"], reference)
        reference = torch.where(chance < settings.strong_probability, entries["strong"], reference)
    else:
        reference = entries["clean"]
    return {"clean": entries["clean"], "reference": reference, "context": entries["context"]}


class Stage2Task:
    """Training of stage II, for the training loop."""

    def __init__(self, settings: Stage2Settings, device: torch.device, ranks: Ranks | None = None) -> None:
        """Build or load the network, and encode the held-out clips that aren't in the cache yet, shared by `ranks`."""
        self.settings, self.device, self.ranks = settings, device, ranks
        self.vae = FrozenVAE(settings.vae, device)
        self.text = networks.FrozenText(settings.text, settings.tokenizer, device)
        self.clips = [self._cached(phase.clips, "train") for phase in settings.phases]
        self.held_out = self._cached(settings.phases[-1].clips, "validation")
        self.held_out.fill(ranks)
        self.text.release()
        self.model = self.network()
        self.data = PairData(settings, self.clips)
        self.description = networks.describe_network(self.model, settings.network)
        self._decode = decoder_of(self.vae.network, fused=settings.pixels.fused)
        self._references: list[tuple[Tensor, Tensor]] = []

    def network(self) -> FlashVideoDiT:
        """Make the network that learns; a variant of stage II has another one."""
        return networks.make_network(self.settings.network, 2, self.settings.seed, self.device)

    def called(self, _reference: Tensor) -> Network:
        """The network as losses and samplers call it; a variant may show it the scaled reference [B, C, T, H, W]."""
        return networks.as_called(self.model, checkpoint_blocks=self.settings.network.checkpoint_blocks)

    def _degraded(self, video: Tensor, *names: str | int) -> dict[str, Tensor]:
        weak = WeakDegradation(self.settings.degradation.factor)
        return {
            "weak": weak(video, generator_for(self.settings.seed, "weak", *names)),
            "strong": StrongDegradation()(video, generator_for(self.settings.seed, "strong", *names)),
        }

    def _cached(self, clips: ClipSettings, split: str) -> LatentCache:
        seed = self.settings.seed if split == "train" else VALIDATION_SEED
        source = clips.open(split, seed)
        has_coded = self.settings.degradation.coded_probability > 0
        factors = self.settings.degradation.factor
        kinds = (clips, split, seed, factors, self.text.digest, *content_of(source))
        kinds += () if split == "train" else (self.settings.seed,)  # of the degradations
        kinds += ("coded", self.vae.digest) if has_coded else ()

        def make(index: int) -> tuple[dict[str, Tensor], str]:
            whole, caption, cut = sample_uncut(source, index)
            video = cut(whole)
            videos = {"clean": video, **self._degraded(video, split, index)}
            if has_coded:
                draft = enlarged_draft(self.vae, whole, round(factors[0]), self.settings.seed, "draft", index)
                videos["coded"] = cut(draft)
            tensors = {name: self.vae.encode(clip, seed, name, index) for name, clip in videos.items()}
            return {**tensors, "context": self.text([caption])[0]}, caption

        folder = cache_folder(self.settings.cache, self.settings.vae, "stage2", *kinds)
        return LatentCache(folder, clips.clips if split == "train" else clips.validation_clips, make)

    def prepare(self) -> None:
        """Encode the clips that aren't in the cache yet."""
        with networks.set_aside(self.model, self.device):
            for clips in self.clips:
                clips.fill(self.ranks)
            self.text.release()

    def loss(self, batch: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
        """Mean squared error of the velocity at a random place of the flow, and the pixels' where they count."""
        settings, index = self.settings, rows.index
        clean, reference = (batch[name] * STAGE2_LATENT_SCALE for name in ("clean", "reference"))
        degraded, steps = self._degrade(reference, rows)
        context = settings.short_text.cut(batch["context"], index // settings.loop.accumulate)
        dropout = generator_for(settings.seed, "dropout", index)
        context = drop_captions(context, dropout, settings.caption_dropout, rows)
        network = self.called(reference)
        uniform = self._uniform(rows, "time", in_order=True).to(clean.device)
        chance = float(torch.rand((), generator=generator_for(settings.seed, "own steps", index)))
        learn = own_flow_step if chance < settings.own_steps else flow_step
        step = learn(network, degraded, clean, context, uniform, steps, shift=settings.shift)
        if "video" not in batch:
            return {"loss": step.loss}
        latent = step.clean / STAGE2_LATENT_SCALE
        pixels = visible_loss(self._decode, latent, batch["video"], batch["place"], settings.pixels)
        return {"loss": step.loss + settings.pixels.weight * pixels, "velocity": step.loss, "pixels": pixels}

    def _degrade(self, reference: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Degraded latents, and their steps, which are spread over the step as the times of the flow are."""
        settings = self.settings.degradation
        uniform = self._uniform(rows, "strength", in_order=False)
        noise = rows.normal_like(reference, generator_for(self.settings.seed, "degradation", rows.index))
        return LatentDegradation(settings.latent_steps, settings.latent_power)(reference, uniform, noise)

    def _uniform(self, rows: Rows, name: str, *, in_order: bool) -> Tensor:
        """A number in [0, 1] for each of these rows: each uniform, those of a whole optimiser step together even.

        `in_order`: a batch's rise, and are even too; else shuffled over the step, to have nothing to do with these.
        """
        seed, parts = self.settings.seed, self.settings.loop.accumulate
        step, part = divmod(rows.index, parts)
        places = torch.arange(rows.count * parts)
        if not in_order:
            places = torch.randperm(len(places), generator=generator_for(seed, name, "order", step))
        drawn = spread_uniform(places[part::parts], len(places), generator_for(seed, name, rows.index))
        return rows.of(drawn)

    def validate(self) -> dict[str, float]:
        """Part of the velocity that is explained on held-out clips; PSNR of refined clips, and of their references.

        If pixels count, minus their loss comes first: a velocity that is better in pixels may explain less.
        """
        entries = networks.held_out_batch(self.held_out, 8)
        batch = choose_reference(entries, self.settings.degradation, torch.ones(len(entries["clean"])))
        explained = []
        for row in range(len(batch["clean"])):  # one by one: full resolution takes memory
            clean, reference, context = (
                batch[name][row : row + 1].to(self.device) for name in ("clean", "reference", "context")
            )
            clean, start = clean * STAGE2_LATENT_SCALE, self._start(reference, row)
            steps = torch.full((1,), self._step, device=self.device)
            place = torch.full((1,), (row + 0.5) / len(batch["clean"]), device=self.device)
            network = self.called(reference * STAGE2_LATENT_SCALE)
            loss = flow_step(network, start, clean, context, place, steps, shift=self.settings.shift).loss
            explained.append(1 - (loss / (clean - start).square().mean()).item())
        scores = {"explained": sum(explained) / len(explained)}
        refined = self.refine(batch)
        if self.settings.pixels.weight:
            terms, pairs = self.settings.pixels.terms, zip(refined, self._pairs(), strict=True)
            losses = [weighted_loss(video.cpu()[None], clean[None], terms).item() for video, (_, clean) in pairs]
            scores = {"score": -sum(losses) / len(losses), **scores}
        for name, videos in (("refined", refined), ("reference", [low for low, _ in self._pairs()])):
            values = [psnr(video.cpu(), clean) for video, (_, clean) in zip(videos, self._pairs(), strict=True)]
            scores[f"psnr_{name}"] = sum(values) / len(values)
        return scores

    @property
    def _step(self) -> int:
        """The degradation strength that is judged: the wanted one, or the nearest that was trained."""
        low, high = self.settings.degradation.latent_steps
        return min(max(self.settings.sheet.strength, low), high)

    def _start(self, reference: Tensor, row: int) -> Tensor:
        noise = normal_like(reference, generator_for(VALIDATION_SEED, "start", row))
        return degrade_latent(reference * STAGE2_LATENT_SCALE, noise, self._step)

    @torch.no_grad()
    def refine(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Refine the first references of a batch to videos [3, T, H, W]."""
        settings, videos = self.settings.sheet, []
        dtype = self.model.proj_out.weight.dtype
        for row in range(self._shown()):
            reference, context = (batch[name][row : row + 1].to(self.device) for name in ("reference", "context"))
            network, start = self.called(reference * STAGE2_LATENT_SCALE), self._start(reference, row)
            latent = sample_stage2(
                network, start, context.to(dtype), torch.zeros_like(context, dtype=dtype),
                steps=settings.steps, cfg=settings.cfg, shift=self.settings.shift, degradation_step=self._step,
            )  # fmt: skip
            videos.append(self.vae.decode(latent / STAGE2_LATENT_SCALE)[0])
        return videos

    def _shown(self) -> int:
        return min(self.settings.sheet.clips, len(self.held_out))

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Weakly degraded and clean video of each shown clip, [3, T, H, W] each."""
        if not self._references:
            source = self.settings.phases[-1].clips.open("validation", VALIDATION_SEED)
            for index in range(self._shown()):
                video, _ = source.sample(index)
                self._references.append((self._degraded(video, "validation", index)["weak"], video))
        return self._references

    def sheet(self) -> Image.Image:
        """Held-out clips: the reference, the refined clip and the clean clip."""
        entries = networks.held_out_batch(self.held_out, self._shown())
        batch = choose_reference(entries, self.settings.degradation, torch.ones(len(entries["clean"])))
        rows = []
        for index, (refined, (low, clean)) in enumerate(zip(self.refine(batch), self._pairs(), strict=True)):
            caption = self.held_out.caption(index)
            rows += [(f"reference: {caption}", low), ("refined", refined), ("clean", clean)]
        return sheet(rows, frames=3)

    def export(self, folder: Path, step: int) -> dict[Path, dict[str, float]]:
        """Write stage2.safetensors, or stage2_lora.safetensors."""
        with torch.no_grad():
            networks.round_as_stored(self.model, self.settings.network)
            scores = self.validate()
        return {networks.export_network(folder, self.model, self.settings.network, step, scores): scores}
