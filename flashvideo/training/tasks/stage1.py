"""Training of stage I: v-prediction on cached latents of drafts, the text encoder along with it if wanted."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from PIL import Image
from torch import Tensor, nn

from ...config import SPATIAL_FACTOR, STAGE1_LATENT_SCALE, TEMPORAL_FACTOR, TRAIN_STEPS, video_frames
from ...parallel import Ranks
from ...samplers import sample_stage1
from ...t5 import T5Encoder, T5Tokens, load_encoder
from ..config import LoopSettings
from ..data.frozen_vae import FrozenVAE
from ..data.latents import (
    ClipSettings,
    LatentCache,
    cache_folder,
    check_lengths,
    content_of,
    draw_length,
    layout_of,
    scenes_of,
)
from ..data.sources import Clips
from ..errors import TrainingError
from ..loop.checkpointing import export_weights
from ..loop.metrics import sheet
from ..randomness import generator_for, normal_like, spread_uniform
from ..rows import Batches, Rows
from . import networks
from .losses import CAPTION_DROPOUT, drop_captions, stage1_loss
from .text import fresh_encoder, text_metadata

VALIDATION_SEED = 1
LAYOUT_LAYER = 3  # whose tokens must contain where the subjects are; later layers draw them
LAYOUT_CELL = 4  # pixels


@dataclass(frozen=True)
class SheetSettings:
    """What is drawn while training."""

    prompts: tuple[str, ...] = ()  # empty for held-out captions
    count: int = 6
    steps: int = 20
    scale: float = 6.0  # of the guidance


@dataclass(frozen=True)
class ShortClips:
    """In the first part of training only the beginnings of clips are seen, stills included; a step has one length.

    They teach how things look, in a fraction of the time of whole clips. Whole clips teach motion.
    """

    lengths: tuple[int, ...] = ()  # in latent frames: one is drawn for each step; empty for whole clips
    until: int = 0  # the step from which on all clips are whole

    def __post_init__(self) -> None:
        """Refuse a length of nothing."""
        check_lengths(self.lengths, "[short_clips]")

    def length(self, whole: int, step: int, generator: torch.Generator) -> int:
        """How many of `whole` latent frames are seen in this step."""
        return whole if step >= self.until else draw_length(self.lengths, whole, generator)


@dataclass(frozen=True)
class Stage1Settings:
    """All settings of stage I."""

    seed: int
    out: Path
    cache: Path  # folder of latents; may be shared by runs
    vae: Path
    clips: ClipSettings
    loop: LoopSettings
    batch: int
    text: str = ""  # text encoder to start from; empty for a fresh miniature, which must then learn
    train_text: bool = False
    tokenizer: str = ""
    caption_dropout: float = CAPTION_DROPOUT
    timestep_power: float = 1.0  # below 1, noisy timesteps are drawn more often: there the layout is decided
    layout_weight: float = 0.0  # of the layout's loss; it is of the whole drawn scenes among the clips
    short_text: networks.ShortText = field(default_factory=networks.ShortText)
    short_clips: ShortClips = field(default_factory=ShortClips)
    network: networks.NetworkSettings = field(default_factory=networks.NetworkSettings)
    sheet: SheetSettings = field(default_factory=SheetSettings)

    def __post_init__(self) -> None:
        """Refuse a power that draws no timesteps."""
        if self.timestep_power <= 0:
            raise TrainingError(f"timestep_power must be above 0; got {self.timestep_power}.")
        if self.layout_weight and not self.clips.has_layouts:
            raise TrainingError("layout_weight must be 0 for clips that aren't whole procedural scenes.")


class Layout(nn.Module):
    """Predicts from a layer's video tokens how much of each square of 4 x 4 pixels the subjects cover.

    It learns along with the network and isn't exported. A draft's shapes are few tokens large, and count little in the
    loss of v: with this loss, the layers before it must place them from the first steps on (as arXiv 2410.06940 does
    with the features of another network).
    """

    def __init__(self, width: int, patch: int) -> None:
        """`width` of the tokens, and how many latent pixels a token's side is."""
        super().__init__()
        self.side = patch * SPATIAL_FACTOR // LAYOUT_CELL  # squares
        self.read = nn.Linear(width, self.side**2)
        nn.init.zeros_(self.read.weight)
        nn.init.zeros_(self.read.bias)

    def forward(self, tokens: Tensor, layout: Tensor, known_share: Tensor | None = None) -> Tensor:
        """Binary cross entropy between tokens [B, T' * rows * columns, hidden] and a layout [B, T, H / 4, W / 4].

        The layout may be of a longer clip. Clips whose layout isn't known (NaN) don't count. The mean is over as many
        numbers as if `known_share` of these clips were known, as in the batch that they are part of; None: over these.
        """
        # The first latent frame is of one frame, the others of four each.
        later = reduce(layout[:, 1:], "b (t frame) y x -> b t y x", "mean", frame=TEMPORAL_FACTOR)
        frames = torch.cat((layout[:, :1], later), dim=1)
        squares = "b t (row y) (column x) -> b (t row column) (y x)"
        wanted = rearrange(frames, squares, y=self.side, x=self.side)[:, : tokens.shape[1]]
        known = ~wanted.isnan()
        losses = F.binary_cross_entropy_with_logits(self.read(tokens).float(), wanted.nan_to_num(), reduction="none")
        counted = known.sum() if known_share is None else known_share * known.numel()
        return (losses * known).sum() / counted.clamp(min=1)


class DraftData(Batches):
    """data[i]: latents in raw scale and their captions, as tokens if the text encoder learns, else as contexts.

    With `source`, where the clips come from, the layouts of drawn scenes too; those of other clips are NaN, and "known"
    is the share of the batch's clips that have one.
    """

    def __init__(
        self, cache: LatentCache, batch: int, seed: int, tokens: T5Tokens | None, source: Clips | None = None
    ) -> None:
        self.cache, self.batch, self.seed, self.tokens, self.source = cache, batch, seed, tokens, source

    def count(self, _index: int) -> int:
        """Every batch is as large."""
        return self.batch

    def part(self, rows: Rows) -> dict[str, Tensor]:
        """Read clips of a batch."""
        drawn = self.cache.draw(self.batch, self.seed, "clips", rows.index)
        clips = rows.of(drawn)
        batch = self.cache.batch(clips)
        if self.tokens is not None:
            batch["tokens"] = self.tokens([self.cache.caption(clip) for clip in clips])
        if self.source is not None:
            batch["layout"] = torch.stack([self._layout(clip, batch["latent"]) for clip in clips])
            known = [scenes_of(self.source, clip) is not None for clip in drawn]
            batch["known"] = torch.tensor(known).float().mean()
        return batch

    def _layout(self, clip: int, latents: Tensor) -> Tensor:
        layout = layout_of(self.source, clip, LAYOUT_CELL)
        if layout is not None:
            return layout
        frames, rows, columns = latents.shape[2:]
        cells = SPATIAL_FACTOR // LAYOUT_CELL
        return torch.full((video_frames(frames), rows * cells, columns * cells), torch.nan)


class Stage1Task:
    """Training of stage I, for the training loop."""

    def __init__(self, settings: Stage1Settings, device: torch.device, ranks: Ranks | None = None) -> None:
        """Build or load the networks, and encode the held-out clips that aren't in the cache yet, shared by `ranks`."""
        self.settings, self.device, self.ranks = settings, device, ranks
        self.vae = FrozenVAE(settings.vae, device)
        frozen = None if settings.train_text else networks.FrozenText(settings.text, settings.tokenizer, device)
        self.frozen, self.tokens = frozen, frozen.tokens if frozen else T5Tokens(settings.tokenizer)
        self.clips, self.held_out = (self._cached(split) for split in ("train", "validation"))
        self.held_out.fill(ranks)
        self.prompts = list(settings.sheet.prompts) or [
            self.held_out.caption(index) for index in range(min(settings.sheet.count, len(self.held_out)))
        ]
        self._prompt_contexts = None
        if frozen is not None:  # before the network needs its place
            self._prompt_contexts = frozen(self.prompts)
            frozen.release()
        dit = networks.make_network(settings.network, 1, settings.seed, device)
        self.model = nn.ModuleDict({"dit": dit})
        if frozen is None:
            self.model["text"] = self._encoder().to(device)
        if settings.layout_weight:
            self.model["layout"] = Layout(dit.config.hidden_size, dit.config.patch_size).to(device)
        source = settings.clips.open("train", settings.seed) if settings.layout_weight else None
        self.data = DraftData(self.clips, settings.batch, settings.seed, None if frozen else self.tokens, source)
        self.description = {**networks.describe_network(dit, settings.network), "train_text": settings.train_text}

    def _encoder(self) -> T5Encoder:
        if self.settings.text:
            return load_encoder(Path(self.settings.text))
        return fresh_encoder(self.settings.seed)

    def _cached(self, split: str) -> LatentCache:
        clips, text = self.settings.clips, self.frozen
        seed = self.settings.seed if split == "train" else VALIDATION_SEED
        source = clips.open(split, seed)
        kinds = (clips, split, seed, "tokens" if text is None else text.digest, *content_of(source))

        def make(index: int) -> tuple[dict[str, Tensor], str]:
            video, caption = source.sample(index)
            tensors = {"latent": self.vae.encode(video, seed, "posterior", index)}
            if text is not None:
                tensors["context"] = text([caption])[0]
            return tensors, caption

        folder = cache_folder(self.settings.cache, self.settings.vae, "stage1", *kinds)
        return LatentCache(folder, clips.clips if split == "train" else clips.validation_clips, make)

    def prepare(self) -> None:
        """Encode the clips that aren't in the cache yet."""
        with networks.set_aside(self.model, self.device):
            self.clips.fill(self.ranks)
            if self.frozen is not None:
                self.frozen.release()

    def _context(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model["text"](batch["tokens"]) if "tokens" in batch else batch["context"]

    def loss(self, batch: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
        """Mean squared error of v at random timesteps, well spread over the step; and the layout's loss if wanted."""
        settings, index, parts = self.settings, rows.index, self.settings.loop.accumulate
        step, part = divmod(index, parts)
        latent = batch["latent"] * STAGE1_LATENT_SCALE
        lengths = generator_for(settings.seed, "length", step)
        latent = latent[:, :, : settings.short_clips.length(latent.shape[2], step, lengths)]
        context = settings.short_text.cut(self._context(batch), step)
        dropout = generator_for(settings.seed, "dropout", index)
        context = drop_captions(context, dropout, settings.caption_dropout, rows)
        noise = rows.normal_like(latent, generator_for(settings.seed, "noise", index))
        times = generator_for(settings.seed, "time", index)
        timestep = _spread_timesteps(rows.count, times, settings.timestep_power, part, parts)
        timestep = rows.of(timestep).to(latent.device)
        layers: dict[int, Tensor] = {}
        network = networks.as_called(
            self.model["dit"], checkpoint_blocks=settings.network.checkpoint_blocks, watch=layers.__setitem__
        )
        loss = stage1_loss(network, latent, context, noise, timestep)
        if not settings.layout_weight:
            return {"loss": loss}
        layout = self.model["layout"](layers[LAYOUT_LAYER][:, context.shape[1] :], batch["layout"], batch["known"])
        return {"loss": loss + settings.layout_weight * layout, "v": loss, "layout": layout}

    def validate(self) -> dict[str, float]:
        """Part of v that is explained on held-out clips, over fixed noise and timesteps; and without the text."""
        batch = {name: value.to(self.device) for name, value in networks.held_out_batch(self.held_out, 16).items()}
        if "text" in self.model:
            captions = [self.held_out.caption(index) for index in range(len(batch["latent"]))]
            batch["tokens"] = self.tokens(captions).to(self.device)
        latent, context = batch["latent"] * STAGE1_LATENT_SCALE, self._context(batch)
        network = networks.as_called(self.model["dit"])
        totals = torch.zeros(3)
        for draw in range(4):
            noise = normal_like(latent, generator_for(VALIDATION_SEED, "noise", draw))
            timestep = _spread_timesteps(len(latent), generator_for(VALIDATION_SEED, "time", draw)).to(self.device)
            for row, (call, text) in enumerate(
                ((network, context), (network, torch.zeros_like(context)), (_nothing, context))
            ):
                totals[row] += stage1_loss(call, latent, text, noise, timestep).item()
        with_text, without, nothing = totals.tolist()
        return {"explained": 1 - with_text / nothing, "explained_without_text": 1 - without / nothing}

    def sheet(self) -> Image.Image:
        """Drafts of the prompts."""
        if self._prompt_contexts is None:
            context = self.model["text"](self.tokens(self.prompts).to(self.device))
        else:
            context = self._prompt_contexts.to(self.device)
        drafts = self.draft(context)
        return sheet(list(zip(self.prompts, drafts, strict=True)))

    @torch.no_grad()
    def draft(self, context: Tensor) -> Tensor:
        """Sample videos [B, 3, T, H, W] for contexts [B, 226, width]."""
        settings, first = self.settings, self.held_out[0]["latent"]
        dit = self.model["dit"]
        context = context.to(dit.proj_out.weight.dtype)

        def noise(step: int) -> Tensor:
            shape = (len(context), *first.shape)
            return torch.randn(shape, generator=generator_for(VALIDATION_SEED, "sample", step)).to(self.device)

        latent = sample_stage1(
            dit, noise(-1), context, torch.zeros_like(context),
            steps=settings.sheet.steps, scale=settings.sheet.scale, step_noise=noise,
        )  # fmt: skip
        return self.vae.decode(latent / STAGE1_LATENT_SCALE)

    def export(self, folder: Path, step: int) -> dict[Path, dict[str, float]]:
        """Write stage1.safetensors, and text_encoder.safetensors if it learnt too."""
        with torch.no_grad():
            networks.round_as_stored(self.model["dit"], self.settings.network)
            scores = self.validate()
        written: dict[Path, dict[str, Any]] = {
            networks.export_network(folder, self.model["dit"], self.settings.network, step, scores): scores
        }
        if "text" in self.model:
            path = folder / "text_encoder.safetensors"
            export_weights(path, self.model["text"].weights(), text_metadata(step))
            written[path] = {}
        return written


def _nothing(latent: Tensor, *_: Any) -> Tensor:
    """The output of an untrained network."""
    return torch.zeros_like(latent)


def _spread_timesteps(
    count: int, generator: torch.Generator, power: float = 1.0, part: int = 0, parts: int = 1
) -> Tensor:
    """[count] timesteps of 0 to 999, of batch `part` of the `parts` of a step: even in the batch, and in the step.

    One from each of count * parts intervals that are equally likely; uniform to the power `power`, in parts of 1000.
    """
    whole = count * parts
    uniform = spread_uniform(torch.arange(whole)[part::parts], whole, generator)
    return (uniform**power * TRAIN_STEPS).long().clamp(max=TRAIN_STEPS - 1)
