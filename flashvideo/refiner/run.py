"""The refiner from frames to frames: upscale, encode, degrade, refine in windows, decode, match colours, crop.

Three phases, each over the whole clip: encoding to a latent, stage II, and decoding. A phase processes the clip in
pieces and only one network is on the device, so that memory doesn't grow with the clip's length. Between the phases
`work` stores the latents in half precision, in memory or in a folder. Every piece depends only on the clip and the
settings: a resumed run gives the same result as an uninterrupted one. (To the bit on one device with one number of CPU
threads; elsewhere sums round differently.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import color
from ..config import (
    COLOR_MATCHES,
    DEGRADATION_STEP,
    MAX_SEED,
    OVERLAP_FRAMES,
    RESAMPLERS,
    STAGE2_LATENT_SCALE,
    STAGE2_SCALE,
    STAGE2_SHIFT,
    WINDOW,
    DiTConfig,
    latent_frames,
    latent_shape,
    video_frames,
)
from ..degradation import AutoStrength, degradation_weights, degrade_latent, suited_strength
from ..dit import FlashVideoDiT
from ..frames import PictureSize, TargetSize, clean, enlarge, padded_shape, to_frames, to_video
from ..guidance import MAX_SCALE
from ..parallel import Ranks
from ..parallel.team import Team
from ..progress import PhaseProgress, no_phase_progress
from ..schedule import stage2_times
from ..vae import Decoder, Encoder, VideoVAE, decode_chunks, encode_chunks
from ..vae.stream import VAEStream, latent_of, plan_stream, stream_within
from .helpers import Conditions, window_helpers
from .ranks import SharedWork
from .tiles import plan_tiles
from .windows import Evaluation, Wavefront, flow_evaluations, frame_noise, plan_windows
from .work_folder import MemoryWork, WorkFolder, WorkProgress

PHASES = ENCODE, REFINE, MEASURE, DECODE = "encode", "refine", "measure", "decode"
SEGMENT_CHUNKS = 30  # decoded chunks in one segment: 240 frames, ten seconds of most videos
_ENCODED, _REFINED, _STATISTICS = "encoded", "refined", "statistics"  # kinds of stored tensors


class Clip(Protocol):
    """Frames that can be read more than once."""

    count: int
    height: int
    width: int

    def frames(self, start: int = 0) -> Iterator[Tensor]:
        """Frames from number `start` on: [H, W, 3], uint8 or in [0, 1]."""


@dataclass(frozen=True)
class TensorClip:
    """A clip in memory, [T, H, W, 3] uint8 or in [0, 1]."""

    tensor: Tensor

    @property
    def count(self) -> int:
        """Number of frames."""
        return self.tensor.shape[0]

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return self.tensor.shape[1]

    @property
    def width(self) -> int:
        """Columns of pixels."""
        return self.tensor.shape[2]

    def frames(self, start: int = 0) -> Iterator[Tensor]:
        """Frames from number `start` on."""
        return iter(self.tensor[start:])


@dataclass(frozen=True)
class RefineSettings:
    """What the user can choose. Raises ValueError for invalid values.

    An AutoStrength follows from the result's size and the model (`degradation.suited_strength`), and so does None,
    from the official strength; `detail_size` None follows from the model (`color.auto_detail`). `window` and `overlap`
    are in frames, `tile` and `detail_size` in pixels; with tile 0 stage II sees whole frames.
    """

    size: TargetSize = field(default_factory=TargetSize)
    resample: str = "bilinear"
    strength: int | AutoStrength | None = DEGRADATION_STEP
    steps: int = 4
    cfg: float = STAGE2_SCALE
    shift: float = STAGE2_SHIFT
    solver: str = "euler"
    seed: int = 0
    window: int = WINDOW
    overlap: int = OVERLAP_FRAMES
    tile: int = 0
    color_match: str = "wavelet"
    detail_size: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.strength, int):
            degradation_weights(self.strength)
        flow_evaluations(stage2_times(self.steps, self.shift), self.solver)
        plan_windows(1, self.window, self.overlap)
        if self.tile:
            plan_tiles(2, 2, self.tile)
        if self.detail_size is not None:
            color.check_detail_size(self.detail_size)
        if not 0 <= self.cfg <= MAX_SCALE:
            raise ValueError(f"cfg must be 0 to {MAX_SCALE:g}; got {self.cfg}.")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"a seed must be 0 to {MAX_SEED}; got {self.seed}.")
        for name, options in (("resample", RESAMPLERS), ("color_match", COLOR_MATCHES)):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}; got {getattr(self, name)!r}.")

    def strength_for(self, size: PictureSize, config: DiTConfig) -> int:
        """The strength for a result of this size from a stage II of this form."""
        strength = suited_strength(self.strength, config)
        if isinstance(strength, int):
            return strength
        return (strength or AutoStrength())(*padded_shape(1, *size)[1:])

    def detail_for(self, config: DiTConfig) -> color.Detail:
        """What is taken from a stage II of this form."""
        return color.auto_detail(config) if self.detail_size is None else color.Detail(self.detail_size)


@dataclass(frozen=True)
class Networks:
    """Stage II, the VAE, and the prompt's encoding [1, L, text_dim]; they run on `device`.

    `vae_memory` is the VAE's limit there in bytes: where it would need more, it works in spatial tiles. None sets no
    limit. `vae_store`, bytes, limits what the tiles store in main memory (see `vae.stream.plan_stream`). `ranks`: this
    process and others run the same clip together, each a part of every network. `team`: workers that evaluate some of
    its windows. `stored`: in what precision latents rest between the phases.
    """

    dit: FlashVideoDiT
    vae: VideoVAE
    context: Tensor
    device: torch.device = torch.device("cpu")
    vae_memory: float | None = None
    vae_store: float | None = None
    ranks: Ranks | None = None
    team: Team | None = None
    stored: torch.dtype = torch.float16


def refine_frames(
    networks: Networks,
    frames: Tensor,
    settings: RefineSettings,
    on_progress: PhaseProgress | None = None,
    *,
    size: PictureSize | None = None,
) -> Tensor:
    """Refine frames [T, H, W, 3], uint8 or in [0, 1]: [T, H', W', 3] in [0, 1], on the CPU, in the wanted size.

    `size` is what `settings.size` means for these frames, if the caller has resolved it already. The input is not
    modified. Raises ValueError for frames of another shape or with NaN, and for an invalid size.
    """
    frames, _ = clean(frames)
    parts: list[Tensor] = []
    clip = TensorClip(frames)
    size = size or settings.size.resolve(clip.height, clip.width)
    run = RefineRun(networks, clip, size, settings, MemoryWork(ENCODE), on_progress)
    run.run(lambda _, chunks: parts.extend(chunks))
    return torch.cat(parts)


class RefineRun:
    """One clip through all phases. `work` says where to start, and stores the progress."""

    def __init__(
        self,
        networks: Networks,
        clip: Clip,
        size: PictureSize,
        settings: RefineSettings,
        work: MemoryWork | WorkFolder | SharedWork,
        on_progress: PhaseProgress | None = None,
        segment_chunks: int = SEGMENT_CHUNKS,
        noise: Callable[[tuple[int, ...], int, int], Tensor] = frame_noise,
    ) -> None:
        """`size` is what `settings.size` means for this clip, see `TargetSize.resolve`. `noise`: see `frame_noise`."""
        self.networks, self.clip, self.settings, self.work = networks, clip, settings, work
        self.height, self.width = size
        self.strength = settings.strength_for(size, networks.dit.config)
        self.padded = padded_shape(clip.count, self.height, self.width)
        self.latents = latent_frames(self.padded[0])
        self.plan = plan_windows(self.latents, settings.window, settings.overlap)
        self._report, self._noise = on_progress or no_phase_progress, noise
        chunks = decode_chunks(self.latents)
        self._segments = [chunks[i : i + segment_chunks] for i in range(0, len(chunks), segment_chunks)]

    @property
    def segments(self) -> int:
        """Number of segments."""
        return len(self._segments)

    def first_frame(self, number: int) -> int:
        """The number of a segment's first frame."""
        chunks = list(chain(*self._segments[:number]))
        return sum(video_frames(size, first=index == 0) for index, size in enumerate(chunks))

    @torch.no_grad()
    def run(self, deliver: Callable[[int, Iterator[Tensor]], None]) -> None:
        """Refine the clip, from where `work` stands.

        `deliver(number, chunks)` gets each segment of the result, chunk by chunk, [t, H', W', 3] in [0, 1] on the CPU,
        and must consume all chunks. After an interruption a segment may be delivered a second time.
        """
        phases = [phase for phase in PHASES if phase != MEASURE or self.settings.color_match == "adain"]
        progress = self.work.progress()
        for phase in phases[phases.index(progress.phase) :]:
            if phase != progress.phase:
                self.work.save(phase, 0, dict, always=True)
                progress = WorkProgress(phase, 0, {})
            if phase == ENCODE:
                self._encode(progress)
            elif phase == REFINE:
                self._refine(progress)
            else:
                self._decode(progress, deliver)

    def disk_bytes(self) -> int:
        """About how much a work folder takes at most, without delivered segments; the VAE's states if there is room."""
        rows, columns = self._grid()
        frame = self.networks.dit.config.in_channels * rows * columns
        waiting = len(self._evaluations()) * 2 * self.plan.length * (3 if self.settings.solver == "heun" else 1)
        return self.networks.stored.itemsize * frame * (self.latents + 2 * self.plan.length) + 2 * 4 * frame * waiting

    def main_bytes(self) -> float:
        """Estimated peak of main memory that the VAE's tiles need, beside the frames of a chunk."""
        vae, frames = self.networks.vae, self.padded[0]
        halves = (vae.encoder, encode_chunks(frames)), (vae.decoder, decode_chunks(self.latents))
        plans = [plan_stream(network, len(sizes), *self._limits()) for network, sizes in halves]
        on_card = self.networks.device.type != "cpu"
        return max(plan.stored_bytes + (0 if on_card else plan.device_bytes) if plan else 0.0 for plan in plans)

    def _grid(self) -> tuple[int, int]:
        return latent_shape(self.padded)[1:]

    def _stream(self, network: Encoder | Decoder, sizes: list[int]) -> VAEStream:
        return stream_within(network, sizes, *self._limits())

    def _limits(self) -> tuple[tuple[int, int], float | None, torch.device, float | None, Ranks | None]:
        networks = self.networks
        return self._grid(), networks.vae_memory, networks.device, networks.vae_store, networks.ranks

    def _evaluations(self) -> list[Evaluation]:
        return flow_evaluations(stage2_times(self.settings.steps, self.settings.shift), self.settings.solver)

    def _encode(self, progress: WorkProgress) -> None:
        device, count = self.networks.device, self.clip.count
        with _resident(self.networks.vae, device) as vae:
            stream = self._stream(vae.encoder, encode_chunks(self.padded[0]))
            stream.restore(progress.done, progress.tensors, device)
            self._report(ENCODE, min(sum(stream.sizes[: stream.done]), count), count)
            for chunk, _ in self._prepared(stream.sizes, stream.done):
                first = latent_frames(sum(stream.sizes[: stream.done]))
                latent = latent_of(stream(to_video(chunk).to(_dtype(vae))))
                for index, frame in enumerate(latent[0].unbind(1), start=first):
                    self.work.put(_ENCODED, index, {"latent": frame.to(self.networks.stored)})
                self.work.save(ENCODE, stream.done, stream.state)
                self._report(ENCODE, min(sum(stream.sizes[: stream.done]), count), count)

    def _refine(self, progress: WorkProgress) -> None:
        networks, settings, device = self.networks, self.settings, self.networks.device
        conditions = Conditions(networks.context, settings.cfg, self.strength, settings.tile)
        helped = window_helpers(networks.team, len(self.plan.starts), conditions, device)
        with _resident(networks.dit, device) as dit, helped as helpers:
            front = Wavefront(conditions.velocity(dit, device, networks.ranks), self._evaluations(), self.plan, helpers)
            if progress.tensors:
                front.restore(progress.tensors, device)
            dropped = 0
            self._report(REFINE, front.evaluated, front.total)
            while front.finished < self.latents:
                if not front.ready:
                    front.feed(self._degraded(front.fed).to(device))
                    continue
                first, finished = front.finished, front.step()
                for index, frame in enumerate(() if finished is None else finished[0].unbind(1), start=first):
                    self.work.put(_REFINED, index, {"latent": frame.to(self.networks.stored)})
                if self.work.save(REFINE, front.evaluated, front.state):
                    dropped = self._drop(_ENCODED, dropped, front.fed)
                self._report(REFINE, front.evaluated, front.total)

    def _degraded(self, index: int) -> Tensor:
        """Frame `index` of the latent that stage II starts from, [1, C, 1, h, w] in its scaled space."""
        latent = self.work.get(_ENCODED, index)["latent"].float() * STAGE2_LATENT_SCALE
        noise = self._noise(tuple(latent.shape), self.settings.seed, index).to(latent)
        return degrade_latent(latent, noise, self.strength)[None, :, None]

    def _decode(self, progress: WorkProgress, deliver: Callable[[int, Iterator[Tensor]], None]) -> None:
        phase, device = progress.phase, self.networks.device
        if self.networks.team is not None:
            self.networks.team.wanted = 0
        with _resident(self.networks.vae, device) as vae:
            stream = self._stream(vae.decoder, decode_chunks(self.latents))
            stream.restore(sum(map(len, self._segments[: progress.done])), progress.tensors, device)
            decoded = self._decoded(stream, phase)
            match = None if phase == MEASURE else self._matcher()
            dropped = 0
            for number, chunks in enumerate(self._segments[progress.done :], start=progress.done):
                pairs = islice(decoded, len(chunks))
                if match is None:
                    self.work.put(_STATISTICS, number, _measure(pairs))
                else:
                    deliver(number, (match(*pair).cpu() for pair in pairs))
                if self.work.save(phase, number + 1, stream.state) and phase == DECODE:
                    dropped = self._drop(_REFINED, dropped, sum(stream.sizes[: stream.done]))

    def _decoded(self, stream: VAEStream, phase: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Refined frames and their reference, [t, H', W', 3] both, for each chunk that is left."""
        sizes = [video_frames(size, first=index == 0) for index, size in enumerate(stream.sizes)]
        done = sum(sizes[: stream.done])
        self._report(phase, done, self.clip.count)
        for chunk, length in self._prepared(sizes, stream.done):
            first = sum(stream.sizes[: stream.done])
            frames = range(first, first + stream.sizes[stream.done])
            latent = torch.stack([self.work.get(_REFINED, index)["latent"] for index in frames], dim=1)
            latent = latent.to(self.networks.device).float() / STAGE2_LATENT_SCALE
            video = stream(latent[None].to(_dtype(stream.network))).float()
            done += length
            self._report(phase, done, self.clip.count)
            yield to_frames(video)[:length, : self.height, : self.width], chunk[:length, : self.height, : self.width]

    def _prepared(self, sizes: Sequence[int], done: int) -> Iterator[tuple[Tensor, int]]:
        """The clip's chunks from number `done` on, upscaled and padded, and how many of their frames are the clip's."""
        frames = self.clip.frames(sum(sizes[:done]))
        for size in sizes[done:]:
            source, _ = clean(torch.stack(list(islice(frames, size))).to(self.networks.device))
            yield enlarge(source, self.height, self.width, size, self.settings.resample), len(source)

    def _matcher(self) -> Callable[[Tensor, Tensor], Tensor]:
        """What brings refined frames to their reference's colours, [t, H, W, 3] both."""
        if self.settings.color_match == "none":
            return lambda refined, _: refined
        if self.settings.color_match == "adain":
            parts = [self.work.get(_STATISTICS, number) for number in range(len(self._segments))]
            refined, reference = (
                color.clip_statistics(torch.cat([part[name] for part in parts])) for name in ("refined", "reference")
            )
            match = color.AdainMatch(refined, reference, self.networks.device)
        else:
            detail = self.settings.detail_for(self.networks.dit.config)
            match = color.wavelet_match(self.height, self.width, self.networks.device, detail)
        return lambda *pair: torch.stack([match(*frames) for frames in zip(*pair, strict=True)])

    def _drop(self, kind: str, start: int, stop: int) -> int:
        for index in range(start, stop):
            self.work.drop(kind, index)
        return stop


def _measure(pairs: Iterator[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Statistics of each refined frame and of each reference frame, [t, 2, 3]."""
    numbers = [[torch.stack([color.frame_statistics(frame) for frame in frames]) for frames in pair] for pair in pairs]
    refined, reference = zip(*numbers, strict=True)
    return {"refined": torch.cat(refined), "reference": torch.cat(reference)}


@contextmanager
def _resident(network: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """Move a network to the device, and back afterwards."""
    home = next(network.parameters()).device
    try:
        yield network.to(device)
    finally:
        network.to(home)
        if home != device and device.type == "cuda":
            torch.cuda.empty_cache()


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype
