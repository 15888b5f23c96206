"""Long videos from file to file: the library's streamed refiner with ComfyUI's own networks in it.

ComfyUI loads the networks, patches them and makes room for them. For ComfyUI each evaluation of stage II is a sampler
run of its own, so that guidance, LoRAs, hooks and every other patch work as in a KSampler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...flashvideo.config import SPATIAL_FACTOR, TRAIN_STEPS
from ...flashvideo.frames import padded_shape
from ...flashvideo.progress import PhaseProgress
from ...flashvideo.refiner.files import READ, FileOptions, file_identity, refine_video
from ...flashvideo.refiner.run import (
    DECODE,
    ENCODE,
    MEASURE,
    REFINE,
    Networks,
    RefineSettings,
)
from ...flashvideo.schedule import stage2_times
from ...flashvideo.vae import Decoder, Encoder
from ...flashvideo.vae.memory import STORE_SHARE, VAE_SHARE
from .fingerprint import fingerprint, weights_fingerprint
from .sampling import flow_to_sigma, refiner_weights
from .stages import refiner_settings
from .vae import FlashVideoVAE
from .video_source import SAVED_AS_IT_IS, sound_suffix, source_file

H264 = "h264"  # with 8 bits every browser shows previews of it
CODECS = {H264: 8, "hevc": 10, "av1": 10}  # bits a colour
CHUNKS = 33, 9  # frames and latent frames: two chunks, more than the VAE has in hand
_SHARES = {READ: 2, ENCODE: 18, REFINE: 55, MEASURE: 10, DECODE: 15}  # of the time, roughly
_BAR_STEPS = 1000


@dataclass(frozen=True)
class Result:
    """A long video's file: in the folder `finished`, work on it in `unfinished`. `codec` is one of CODECS."""

    unfinished: Path
    finished: Path
    codec: str = H264

    @property
    def bits(self) -> int:
        """A colour."""
        return CODECS[self.codec]


class _Evaluation(comfy.samplers.Sampler):
    """A sampler that evaluates the guided network once and stores the clean latent unchanged."""

    def __init__(self, sigma: Tensor) -> None:
        self.sigma = sigma
        self.clean: Tensor | None = None

    def sample(
        self, model: Callable[..., Tensor], _sigmas: Tensor, extra_args: dict[str, Any], _: Any, noise: Tensor, *__: Any
    ) -> Tensor:
        """ComfyUI's call; what it gets as noise is the latent to evaluate."""
        self.clean = model(noise, self.sigma.to(noise).expand(len(noise)), **extra_args)
        return self.clean


class GuidedRefiner:
    """Stage II and its guidance as the network that `flashvideo.refiner.run` runs, with guidance left to ComfyUI."""

    def __init__(
        self,
        model: comfy.model_patcher.ModelPatcher,
        positive: list,
        negative: list,
        settings: RefineSettings,
        device: torch.device,
    ) -> None:
        """`device` is where latents come from and go to."""
        self.model, self._settings = model, settings
        self.config = model.model.diffusion_model.config
        self._strength: int | None = None  # known when the clip's size is
        self._sampling = {"cfg": settings.cfg, "positive": positive, "negative": negative, "seed": 0}
        self._latents = torch.empty(0, device=device)

    def parameters(self) -> Iterator[Tensor]:
        """A tensor with the device and precision of latents."""
        yield self._latents

    def to(self, _device: torch.device) -> GuidedRefiner:
        """Leave it to ComfyUI, which loads the model before every evaluation if need be."""
        return self

    def __call__(self, latent: Tensor, timestep: Tensor, _context: Tensor, *, degradation_step: int) -> Tensor:
        """dx/dt of a window [1, C, T, H, W], which was degraded by `degradation_step`."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._set_strength(degradation_step)
        place = timestep[0] / TRAIN_STEPS
        sigma = flow_to_sigma(place, degradation_step)
        evaluation, nothing = _Evaluation(sigma), torch.zeros_like(latent)
        sample = latent * sigma / (place * refiner_weights(degradation_step)[1])  # as ComfyUI's samplers know it
        comfy.sample.sample_custom(
            self.model, sample, sampler=evaluation, latent_image=nothing, disable_pbar=True, **self._sampling
        )
        return (evaluation.clean.to(latent) - latent) / place

    def _set_strength(self, strength: int) -> None:
        """Set the model up for a strength; it is the same in all calls of a run."""
        if strength == self._strength:
            return
        settings, self._strength = self._settings, strength
        self.model = refiner_settings(self.model, strength, settings.shift)
        self._sampling["sigmas"] = flow_to_sigma(1 - stage2_times(settings.steps, settings.shift), strength)


class LoadedVAE:
    """The VAE's network as `flashvideo.refiner.run` runs it, with loading left to ComfyUI."""

    def __init__(self, vae: FlashVideoVAE, needed: float) -> None:
        self._vae, self._needed = vae, needed

    @property
    def encoder(self) -> Encoder:
        """The network's first half."""
        return self._vae.first_stage_model.encoder

    @property
    def decoder(self) -> Decoder:
        """The network's second half."""
        return self._vae.first_stage_model.decoder

    def parameters(self) -> Iterator[Tensor]:
        """The network's."""
        return self._vae.first_stage_model.parameters()

    def to(self, device: torch.device) -> LoadedVAE:
        """Have ComfyUI load it on its device; ComfyUI also decides where it stays while unused."""
        if device == self._vae.device:
            # Whole: its layers can't fetch weights that stayed in main memory.
            comfy.model_management.load_models_gpu(
                [self._vae.patcher], memory_required=self._needed, force_full_load=True
            )
        return self


def refine_long_video(
    model: comfy.model_patcher.ModelPatcher,
    vae: FlashVideoVAE,
    positive: list,
    negative: list,
    video: Any,
    settings: RefineSettings,
    *,
    result: Result,
    warn: Callable[[str], None],
    note: Callable[[str], None],
) -> Path:
    """Refine a VIDEO to a file; one that was made before is returned at once.

    A call with the same arguments resumes unfinished work, in another process, too. `warn` gets what a user should know
    before the work starts, `note` the strength if it is auto. Raises CommandError for what can't be done, and
    ValueError for an invalid size.
    """
    budget, store = vae_budget(vae), vae_store(vae)
    about = {
        "model": weights_fingerprint(model),
        "vae": weights_fingerprint(vae.patcher),
        "prompt": fingerprint(positive, negative),
        "cfg": settings.cfg,
        "devices": [str(model.load_device), str(vae.device)],
        "precision": [str(model.model.get_dtype()), str(model.model.manual_cast_dtype), str(vae.vae_dtype)],
        "vae_memory": budget,
        "vae_store": store,
    }
    with long_files(video, result, settings, about, warn) as (source, target, key):
        if target.is_file():
            return target
        guided = GuidedRefiner(model, positive, negative, settings, vae.device)
        loaded = LoadedVAE(vae, _vae_bytes(vae, video, settings, budget))
        networks = Networks(guided, loaded, torch.zeros(1, 1, 1), vae.device, budget, store)
        written = {"codec": result.codec, "bits": result.bits}
        options = FileOptions(**written, work=result.unfinished / key, about=about, warn=warn, note=note)
        # The network is guided already: with cfg 1 the library evaluates it once a step.
        refine_video(networks, source, target, replace(settings, cfg=1.0), options, report_progress())
    return target


@contextmanager
def long_files(
    video: Any,
    result: Result,
    settings: RefineSettings,
    about: dict[str, Any],
    warn: Callable[[str], None],
) -> Iterator[tuple[Path, Path, str]]:
    """A VIDEO's file, that of its result, and a name for the run, which changes with `result`, `settings` and `about`.

    A file that had to be written for the video is deleted at the end, unless there is an error.
    """
    for folder in (result.unfinished, result.finished):
        folder.mkdir(parents=True, exist_ok=True)
    source, copied = source_file(video, result.unfinished)
    suffix = sound_suffix(source)
    if result.codec != H264:  # as all runs were written before there was a choice
        about = {**about, "codec": result.codec}
    key = fingerprint(repr(settings), [source.name] if copied else file_identity(source), about)
    target = result.finished / f"flashvideo-{key}{suffix}"
    if suffix != SAVED_AS_IT_IS:
        warn(
            f"The sound of {source.name} fits no {SAVED_AS_IT_IS} file, so the refined video will be {target}. Save "
            "Video fails with it unless its format is mp4, and compresses it a second time then. Copy the file from "
            "there instead, or stop here and give the clip another kind of sound, such as AAC."
        )
    yield source, target, key
    if copied:
        source.unlink(missing_ok=True)


def vae_budget(vae: FlashVideoVAE) -> float | None:
    """Bytes that the VAE may hold on its device; None for no limit."""
    chosen, device = vae.first_stage_model.budget, vae.device
    if comfy.model_management.is_device_cpu(device):
        return chosen
    most = VAE_SHARE * comfy.model_management.get_total_memory(device)
    return most if chosen is None else min(chosen, most)


def vae_store(vae: FlashVideoVAE) -> float | None:
    """Bytes that the VAE's tiles may store in main memory; None where the VAE runs there."""
    if comfy.model_management.is_device_cpu(vae.device):
        return None
    return STORE_SHARE * comfy.model_management.get_total_memory(torch.device("cpu"))


def _vae_bytes(vae: FlashVideoVAE, video: Any, settings: RefineSettings, budget: float | None) -> float:
    """Bytes that the VAE needs besides its weights."""
    width, height = video.get_dimensions()
    _, *padded = padded_shape(1, *settings.size.resolve(height, width))
    frames, latents = CHUNKS
    grid = [side // SPATIAL_FACTOR for side in padded]
    needed = max(
        vae.memory_used_encode((1, vae.output_channels, frames, *padded), vae.vae_dtype),
        vae.memory_used_decode((1, vae.latent_channels, latents, *grid), vae.vae_dtype),
    )
    return needed if budget is None else min(needed, budget)


def report_progress() -> PhaseProgress:
    """A callback over all phases: moves ComfyUI's progress bar, and cancels."""
    bar = comfy.utils.ProgressBar(_BAR_STEPS)
    phases = list(_SHARES)

    def report(phase: str, done: float, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        before = sum(_SHARES[each] for each in phases[: phases.index(phase)])
        share = (before + _SHARES[phase] * done / total) / sum(_SHARES.values())
        bar.update_absolute(round(_BAR_STEPS * share))

    return report
