"""Training of the video VAE on crops of many sizes, and its export with latents of standard deviation one."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from ...checkpoints import STAGE_METADATA, load_vae
from ...checkpoints.architecture import NORM_GROUPS_METADATA, default_norm_groups
from ...config import VAEConfig
from ...nano import PREVIEW_METADATA
from ...parallel import Ranks
from ...vae import VideoVAE
from ...vae.layers import SpatialNorm
from ..config import LoopSettings
from ..data.latents import ScenePieces
from ..data.sources import SCENES, Clips, Footage
from ..errors import TrainingError
from ..loop.checkpointing import BEST, as_stored, export_weights, load_state
from ..loop.metrics import psnr, sheet
from ..randomness import generator_for, normal_like, randint
from ..rows import Batches, Rows
from ..scenes.stream import SceneStream
from .fused_vae import FusedVAE, fused_or_plain
from .latent_preview import fit_preview
from .latent_scale import fold_latent_scale, scale_towards
from .losses import PixelWeights, pixel_loss, vae_loss
from .pixels import with_large_of
from .refined import RefinedLatents, RefinedSettings, blend_weights
from .widening import widened

START_LOGVAR = -4.0  # of the posterior: noise of its usual size, 1, would drown what the first steps learn
FITTED_BATCHES = 8  # that other norm groups are fitted on
VALIDATION_SEED = 1  # of held-out scenes; the same for every run, so that runs compare


@dataclass(frozen=True)
class VAENumbers:
    """The network's sizes. `norm_groups` 0: as many as a file has that doesn't say how many."""

    base_channels: int
    channel_multipliers: tuple[int, ...]
    encoder_blocks: int
    decoder_blocks: int
    norm_groups: int = 0

    def __post_init__(self) -> None:
        """Refuse groups that don't fit the levels."""
        if self.norm_groups < 0 or any(width % max(1, self.norm_groups) for width in self._widths()):
            raise TrainingError(f"[model] norm_groups must divide every level's channels; got {self.norm_groups}.")

    def config(self) -> VAEConfig:
        """Return the whole architecture."""
        groups = self.norm_groups or default_norm_groups(self._widths())
        return VAEConfig(**{**dataclasses.asdict(self), "norm_groups": groups})

    def _widths(self) -> list[int]:
        return [self.base_channels * multiplier for multiplier in self.channel_multipliers]

    @classmethod
    def of(cls, config: VAEConfig) -> VAENumbers:
        """Return the sizes of an architecture."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})


@dataclass(frozen=True)
class Crop:
    """One kind of training batch: `clips` scenes rendered at a size, `crops` pieces cut from each.

    Of another source than scenes, a batch is `clips` x `crops` clips of the pieces' size.
    """

    render: tuple[int, int]  # height, width of drawn scenes
    size: tuple[int, int]  # height, width of a piece, multiples of 8
    frames: int  # 4n + 1
    clips: int
    crops: int = 1
    weight: float = 1.0  # how often, relative to the others
    source: str = ""  # goes before the footage's own


@dataclass(frozen=True)
class ValidationClip:
    """Whole held-out clips of one size; `name` stands in the metrics."""

    name: str
    size: tuple[int, int]
    frames: int
    clips: int
    source: str = ""  # goes before the footage's own


@dataclass(frozen=True)
class VAELossSettings(PixelWeights):
    """Weights of the loss terms."""

    kl: float = 1e-6


@dataclass(frozen=True)
class VAESettings:
    """A whole VAE config file."""

    seed: int
    out: Path
    model: VAENumbers
    loop: LoopSettings
    loss: VAELossSettings
    crops: tuple[Crop, ...]
    validation: tuple[ValidationClip, ...]
    # A file of weights, or a run's folder for its best ones; those of a narrower VAE are widened. Empty: fresh ones.
    start: str = ""
    fused: bool = False  # learns through the kernels of `fused_vae`, where the CPU and its compiler can
    eight_bits: bool = False  # the exported file's large weights are stored in 8 bits
    # A VAE's file: the exported latents are scaled to be near its latents, so that a stage II that knows these fits.
    latents_like: str = ""
    decoder_only: bool = False  # the encoder, and with it every latent, stays as it is
    latent_noise: float = 0.0  # up to so much noise, in deviations of the latent, is added to what is decoded
    clips: Footage = field(default_factory=Footage)  # where clips come from
    refined: RefinedSettings = field(default_factory=RefinedSettings)  # what the decoder learns from beside its latents

    def __post_init__(self) -> None:
        """Refuse noise on latents that still learn: they could grow until the noise no longer counts.

        And sources that can't be opened.
        """
        for each in (*self.crops, *self.validation):
            self.clips.check_source(each.source or self.clips.source)
        if self.latent_noise and not self.decoder_only:
            raise TrainingError("latent_noise is for a decoder that learns alone: add decoder_only = true.")
        if self.refined.share and not self.decoder_only:
            raise TrainingError("[refined] is for a decoder that learns alone: add decoder_only = true.")


class CropData(Batches):
    """data[i] is a batch of crops [B, 3, T, H, W], all of one kind."""

    def __init__(self, crops: tuple[Crop, ...], seed: int, footage: Footage | None = None) -> None:
        self.crops, self.seed = crops, seed
        self.weights = torch.tensor([crop.weight for crop in crops])
        footage = footage or Footage()
        self.drawn = [(crop.source or footage.source) == SCENES for crop in crops]
        self.streams = [self._open(crop, footage) for crop in crops]
        clips = (crop.clips * (1 if drawn else crop.crops) for crop, drawn in zip(crops, self.drawn, strict=True))
        self.stride = max(clips)

    def _open(self, crop: Crop, footage: Footage) -> Clips:
        scenes = SceneStream("train", *crop.render, crop.frames, self.seed)
        if (crop.source or footage.source) == SCENES:
            return scenes
        pieces = ScenePieces(scenes, *crop.size)
        return footage.open_footage(pieces, "train", *crop.size, crop.frames, self.seed, crop.source)

    def count(self, index: int) -> int:
        """Pieces of batch `index`."""
        crop = self.crops[self._kind(index)[0]]
        return crop.clips * crop.crops

    def _kind(self, index: int) -> tuple[int, torch.Generator]:
        """Which kind of crop batch `index` is of, and the generator that has drawn it."""
        generator = generator_for(self.seed, "crop", index)
        return int(torch.multinomial(self.weights, 1, generator=generator)), generator

    def part(self, rows: Rows) -> Tensor:
        """Make pieces of a batch."""
        kind, generator = self._kind(rows.index)
        crop, stream, first = self.crops[kind], self.streams[kind], rows.index * self.stride
        numbers = rows.of(list(range(crop.clips * crop.crops)))
        if not self.drawn[kind]:
            return torch.stack([stream.sample(first + number)[0] for number in numbers])
        places = [
            [randint(generator, 0, whole - part) for whole, part in zip(crop.render, crop.size, strict=True)]
            for _ in range(rows.count)
        ]
        clips = {clip: stream.sample(first + clip)[0] for clip in sorted({number // crop.crops for number in numbers})}
        pieces = []
        for number in numbers:
            top, left = places[number]
            piece = clips[number // crop.crops][..., top : top + crop.size[0], left : left + crop.size[1]]
            pieces.append(piece)
        return torch.stack(pieces)


def initialise(vae: VideoVAE, seed: int) -> None:
    """Draw starting weights; the decoder's norms begin as plain norms that follow the latent only a little."""
    generator = generator_for(seed, "weights")
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            limit = math.sqrt(3 / module.weight[0].numel())
            nn.init.uniform_(module.weight, -limit, limit, generator=generator)
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, SpatialNorm):
            for conv in (module.conv_y.conv, module.conv_b.conv):
                conv.weight.data *= 0.1
            nn.init.ones_(module.conv_y.conv.bias)
    logvar = vae.encoder.conv_out.conv.bias.data[vae.config.latent_channels :]
    logvar.fill_(START_LOGVAR)


class VAETask:
    """Training of the VAE, for the training loop."""

    def __init__(self, settings: VAESettings, device: torch.device, _ranks: Ranks | None = None) -> None:
        """Build the network with fresh weights."""
        self.settings = settings
        self.model = VideoVAE(settings.model.config())
        self.description = _describe(settings.model)
        self._exported = False  # whether it starts from weights whose latents have a deviation of one already
        initialise(self.model, settings.seed)
        self.data = CropData(settings.crops, settings.seed, settings.clips)
        if settings.start:
            self._start_from(Path(settings.start))
        refines = settings.refined.share > 0
        if refines and not self._exported:
            raise TrainingError("[refined] needs `start` to be a VAE's file, whose latents stage II knows.")
        self._began = {name: weight.clone() for name, weight in self.model.state_dict().items()} if refines else {}
        self.model.encoder.requires_grad_(not settings.decoder_only)
        self.model.to(device)
        self._held_out: dict[str, list[Tensor]] = {}
        self._refined = RefinedLatents(settings.refined, settings.seed, device) if refines else None
        self._noise = settings.latent_noise * self._latent_deviation() if settings.latent_noise else None

    def _start_from(self, path: Path) -> None:
        """Take over a run's best weights or a file's; those of a narrower VAE are widened."""
        if path.is_dir():
            state = load_state(path / BEST)
            found, weights = state["description"], state["mean"]
        else:
            vae = load_vae(path, dtype=torch.float32)
            found, weights = _describe(VAENumbers.of(vae.config)), vae.state_dict()
            self._exported = True
        if found == self.description:
            self.model.load_state_dict(weights)
            return
        if self.settings.decoder_only:
            raise TrainingError(f"{path} holds {found}, the config asks for {self.description}.")
        narrow = VideoVAE(_numbers(found).config())
        narrow.load_state_dict(weights)
        clips = (self.data[index] for index in range(FITTED_BATCHES))
        self.model = widened(narrow, self.model.config, clips, self.settings.seed)

    def prepare(self) -> None:
        """Clips are made as they are needed."""

    @cached_property
    def _learner(self) -> FusedVAE | VideoVAE:
        return fused_or_plain(self.model) if self.settings.fused else self.model

    def loss(self, batch: Tensor, rows: Rows) -> dict[str, Tensor]:
        """Encode, draw a latent, decode, compare; or decode what stage II makes of drafts, in the batches for it."""
        if self._refined is not None and self._refined.chosen(rows.index):
            return self._of_drafts(self._refined(self._learner.encode, batch, rows), batch)
        posterior = self._learner.encode(batch)
        generator = generator_for(self.settings.seed, "latent", rows.index)
        latent = posterior.sample(rows.normal_like(posterior.mean, generator))
        if self._noise is not None:
            share = rows.of(torch.rand(rows.count, 1, 1, 1, 1, generator=generator)).to(latent)
            latent = latent + share * self._noise[:, None, None, None] * rows.normal_like(latent, generator)
        video = self._learner.decode(latent)
        return vae_loss(video, batch, posterior.mean, posterior.logvar, **dataclasses.asdict(self.settings.loss))

    def _of_drafts(self, latent: Tensor, batch: Tensor) -> dict[str, Tensor]:
        """The loss of refined drafts; what the draft shows is compared as if it were true."""
        video = with_large_of(batch, self._learner.decode(latent), self.settings.refined.detail_size)
        weights = dataclasses.asdict(self.settings.loss)
        del weights["kl"]
        terms = pixel_loss(video, batch, **weights)
        loss = self.settings.refined.weight * terms.pop("loss")
        return {"loss": loss, **{f"drafts_{name}": value for name, value in terms.items()}}

    def validate(self) -> dict[str, float]:
        """Scores of held-out clips: first minus the loss, then PSNR and the latents' deviation.

        PSNR alone would prefer a blur where texture is learnt.
        """
        scores: dict[str, float] = {}
        of_drafts: dict[str, float] = {}
        losses, spreads = [], []
        for kind in self.settings.validation:
            values, refined = [], []
            for clip in self._clips(kind):
                video, latent = self._reconstruct(clip)
                clip = clip.to(video.device)
                values.append(psnr(video, clip))
                losses.append(self._distance(video, clip))
                spreads.append(latent.std().item())
                if self._refined is not None:
                    latent = self._refined(self.model.encode, clip, Rows.whole(0, 1))
                    video = with_large_of(clip, self.model.decode(latent), self.settings.refined.detail_size)
                    refined.append(psnr(video, clip))
                    losses.append(self._distance(video, clip))
            scores[f"psnr_{kind.name}"] = sum(values) / len(values)
            if refined:
                of_drafts[f"psnr_{kind.name}_drafts"] = sum(refined) / len(refined)
        mean = sum(scores.values()) / len(scores)
        score = -sum(losses) / len(losses)
        return {"score": score, "psnr": mean, **scores, **of_drafts, "latent_std": sum(spreads) / len(spreads)}

    def _distance(self, video: Tensor, clip: Tensor) -> float:
        """The loss of a reconstruction without the latent's part."""
        nothing, weights = torch.zeros(1, device=clip.device), dataclasses.asdict(self.settings.loss)
        return vae_loss(video, clip, nothing, nothing, **{**weights, "kl": 0.0})["loss"].item()

    def sheet(self) -> Image.Image:
        """A held-out clip of each size above its reconstruction."""
        rows = []
        for kind in self.settings.validation:
            clip = self._clips(kind)[0]
            rows += [(f"{kind.name}: clip", clip[0]), ("reconstruction", self._reconstruct(clip)[0][0])]
        return sheet(rows)

    def _reconstruct(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        latent = self.model.encode(clip.to(next(self.model.parameters()).device)).mode()
        return self.model.decode(latent), latent

    def _clips(self, kind: ValidationClip) -> list[Tensor]:
        if kind.name not in self._held_out:
            size = (*kind.size, kind.frames)
            scenes = SceneStream("validation", *size, VALIDATION_SEED)
            stream = self.settings.clips.open_footage(scenes, "validation", *size, VALIDATION_SEED, kind.source)
            self._held_out[kind.name] = [stream.sample(index)[0][None] for index in range(kind.clips)]
        return self._held_out[kind.name]

    def export(self, folder: Path, step: int) -> dict[Path, dict[str, float]]:
        """Write vae.safetensors with normalised latents in half precision; returns the metrics of what it holds."""
        with torch.no_grad():
            if self._began:
                blend = self.settings.refined.blend
                self.model.load_state_dict(blend_weights(self._began, self.model.state_dict(), blend))
            if not (self._exported and self.settings.decoder_only):
                fold_latent_scale(self.model, self._latent_scale())
            self.model.load_state_dict(as_stored(self.model.state_dict(), eight_bits=self.settings.eight_bits))
            scores = self.validate()
        metadata = {STAGE_METADATA: "vae", "flashvideo.trained": "true", "flashvideo.step": str(step)}
        metadata[NORM_GROUPS_METADATA] = str(self.model.config.norm_groups)
        metadata |= {f"flashvideo.{name}": f"{value:.3f}" for name, value in scores.items()}
        metadata[PREVIEW_METADATA] = json.dumps([[round(v, 4) for v in row] for row in self._preview().tolist()])
        path = folder / "vae.safetensors"
        export_weights(path, self.model.state_dict(), metadata, eight_bits=self.settings.eight_bits)
        return {path: scores}

    def _latent_scale(self) -> Tensor:
        """What the latent's channels are divided by: [16]."""
        if not self.settings.latents_like:
            return self._latent_deviation()
        known = load_vae(Path(self.settings.latents_like), dtype=torch.float32)
        return scale_towards(
            self.model, known, [clip for kind in self.settings.validation for clip in self._clips(kind)]
        )

    @torch.no_grad()
    def _preview(self) -> Tensor:
        """The linear map from a latent to its picture, [17, 3]; see `fit_preview`."""
        device = next(self.model.parameters()).device
        clips = [clip for kind in self.settings.validation for clip in self._clips(kind)]
        latents = [self.model.encode(clip.to(device)).mode()[0].cpu() for clip in clips]
        return fit_preview(latents, [clip[0] for clip in clips])

    @torch.no_grad()
    def _latent_deviation(self) -> Tensor:
        """Standard deviation of each latent channel over held-out clips, the posterior's own noise included: [16]."""
        device = next(self.model.parameters()).device
        draws = []
        for kind in self.settings.validation:
            for clip in self._clips(kind):
                posterior = self.model.encode(clip.to(device))
                noise = normal_like(posterior.mean, generator_for(VALIDATION_SEED, kind.name, len(draws)))
                draws.append(rearrange(posterior.sample(noise)[0], "c t h w -> c (t h w)"))
        return torch.cat(draws, dim=1).std(dim=1)


def _describe(numbers: VAENumbers) -> dict[str, Any]:
    """Return a network's sizes as a checkpoint holds them: tuples as lists, and norm groups where they are chosen."""
    plain = {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(numbers).items()
    }
    default = dataclasses.replace(numbers, norm_groups=0).config().norm_groups
    if plain["norm_groups"] in (0, default):
        del plain["norm_groups"]
    return {"network": "vae", **plain}


def _numbers(description: Mapping[str, Any]) -> VAENumbers:
    """The sizes in a checkpoint's description. Raises TrainingError if it is another network's."""
    if description.get("network") != "vae":
        raise TrainingError(f"A VAE can't begin as {description.get('network')}.")
    sizes = {name: value for name, value in description.items() if name != "network"}
    return VAENumbers(**{**sizes, "channel_multipliers": tuple(sizes["channel_multipliers"])})
