"""Runs one way from a draft to a finished video on held-out clips, and measures it: each clip once, kept on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...atomic_files import sha256
from ...config import STAGE2_LATENT_SCALE, STAGE2_SHIFT, TRAIN_STEPS
from ...degradation import auto_strength, degrade_latent
from ...frames import TargetSize, finish, resize, to_frames, to_video
from ...refiner.run import Networks, RefineSettings, refine_frames
from ...samplers import sample_stage2
from ..loop.checkpointing import write_whole
from ..loop.metrics import save_picture
from ..randomness import generator_for, normal_like
from ..tasks.losses import Network
from ..tasks.networks import as_called
from .clips import FACTOR, TEST_SEED, ClipStore, HeldOutClip, Suite
from .judges import Judges
from .measures import measure
from .swings import time_measures
from .variants import KINDS, Deadline, beside, load_variant

ENLARGERS = ("bilinear", "bicubic", "lanczos")
TRUTH = "truth"
CODED = "coded"  # the truth, encoded and decoded
LONG = "windows"  # stage II as it runs long videos, in windows of time
AUTO = -1  # strength: the official one, mapped to the size of the clip
FORMAT = 2  # of the kept results; another one when a measure or the chain changes


@dataclass(frozen=True)
class Method:
    """One way to finish a draft: one of ENLARGERS, a network of one of KINDS, or LONG, the shipped refiner in windows.

    TRUTH and CODED are what it should be.
    """

    kind: str
    weights: Path | None = None
    steps: int = 4
    cfg: float = 1.0
    shift: float = STAGE2_SHIFT
    strength: int = AUTO
    color_match: str = "wavelet"

    def strength_at(self, height: int, width: int) -> int:
        """The degradation step for a finished size."""
        return auto_strength(height, width) if self.strength == AUTO else self.strength


@dataclass(frozen=True)
class Measured:
    """What came of a method on one clip."""

    values: dict[str, float]
    picture: Path  # the middle frame


class Evaluator:
    """Measures methods on clips, and keeps numbers and pictures in a folder."""

    def __init__(
        self, store: ClipStore, folder: Path, device: torch.device, deadline: Deadline, judges: Judges | None = None
    ) -> None:
        self.store, self.folder, self.device, self.deadline = store, folder, device, deadline
        self.judges = judges or Judges()
        self._network = lru_cache(maxsize=1)(lambda path, kind: load_variant(path, kind, device))
        self._digest = lru_cache(maxsize=None)(lambda path: sha256(path, lambda *_: None))

    def suite(self, label: str, method: Method, suite: Suite) -> dict[str, Measured]:
        """Measure a method on all clips of a suite, by their names. Raises Paused at the deadline."""
        results = {}
        for index, name in enumerate(suite.names):
            results[name] = self._measured(label, method, suite, index)
        return results

    def _measured(self, label: str, method: Method, suite: Suite, index: int) -> Measured:
        clip = self.store.clip(suite, index)
        path = self.folder / f"{self._name(method, clip)}.json"
        picture = path.with_suffix(".png")
        if path.is_file() and picture.is_file():
            return Measured(json.loads(path.read_text(encoding="utf-8")), picture)
        self.deadline.check()
        started = time.monotonic()
        frames = self.finished(method, clip)
        values = {"seconds": time.monotonic() - started}
        frames = (frames * 255).round() / 255  # as a player shows it
        judged = self.judges(frames, clip.size, real=suite.real_clip(index) is not None)
        measured = {**measure(frames, clip.truth, clip.flow, clip.enlarged), **judged}
        values = {**measured, **time_measures(frames, clip.truth, clip.enlarged), **values}
        save_picture(picture, as_picture(frames[len(frames) // 2]))
        write_whole(path, lambda file: file.write(json.dumps(values).encode()))
        sys.stdout.write(
            f"  {label}, {suite.size}, {clip.name}: PSNR {values['psnr']:.2f}, high band {values['psnr_high']:.2f}, "
            f"gradient error {values['gradient_error']:.1f} %; {time.monotonic() - started:.1f} s\n"
        )
        return Measured(values, picture)

    def _name(self, method: Method, clip: HeldOutClip) -> str:
        weights = None if method.weights is None else self._digest(method.weights)
        parts = (FORMAT, dataclasses.replace(method, weights=None), weights, self.store.vae.digest, clip.digest)
        parts += (self.judges.names,)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]

    def finished(self, method: Method, clip: HeldOutClip) -> Tensor:
        """The whole chain from the draft to frames [T, H, W, 3] in [0, 1] on the CPU."""
        if method.kind == TRUTH:
            return clip.truth
        if method.kind == CODED:
            return self._coded(clip.truth)
        if method.kind in ENLARGERS:
            return enlarge(clip.draft, *clip.truth.shape[1:3], method.kind)
        if method.kind == LONG:
            return self._refined_long(method, clip)
        refined = to_frames(self.store.vae.decode(self._refined(method, clip)))
        return finish(refined, clip.enlarged, method.color_match)

    @torch.no_grad()
    def _coded(self, truth: Tensor) -> Tensor:
        return to_frames(self.store.vae.decode(self.store.vae.posterior(to_video(truth)).mode()))

    @torch.no_grad()
    def _refined(self, method: Method, clip: HeldOutClip) -> Tensor:
        if method.kind not in KINDS:
            raise ValueError(f"there is no method {method.kind!r}")
        network: Network = as_called(self._network(method.weights, method.kind))
        latent, strength = clip.latent * STAGE2_LATENT_SCALE, method.strength_at(*clip.size[1:])
        if method.kind == "cascade":
            network, strength = beside(network, latent), TRAIN_STEPS - 1  # noise alone
        start = degrade_latent(latent, normal_like(latent, generator_for(TEST_SEED, "start", clip.name)), strength)
        refined = sample_stage2(
            network, start, clip.context, torch.zeros_like(clip.context),
            steps=method.steps, cfg=method.cfg, shift=method.shift, degradation_step=strength,
        )  # fmt: skip
        return refined / STAGE2_LATENT_SCALE

    def _refined_long(self, method: Method, clip: HeldOutClip) -> Tensor:
        """The draft through the refiner of long videos, which has the VAE work in chunks and stage II in windows."""
        networks = Networks(
            self._network(method.weights, "rotary"), self.store.vae.network, clip.context, self.device
        )  # fmt: skip
        settings = RefineSettings(
            size=TargetSize("scale", scale=float(FACTOR)), strength=method.strength_at(*clip.size[1:]),
            steps=method.steps, cfg=method.cfg, shift=method.shift, seed=TEST_SEED, color_match=method.color_match,
        )  # fmt: skip
        return refine_frames(networks, clip.draft, settings)


def enlarge(frames: Tensor, height: int, width: int, resampler: str) -> Tensor:
    """Enlarge frames [T, h, w, 3] by one of ENLARGERS to [T, height, width, 3]. Lanczos is Pillow's, of 8 bits."""
    if resampler != "lanczos":
        return resize(frames, height, width, resampler)
    large = [as_picture(frame).resize((width, height), Image.Resampling.LANCZOS) for frame in frames]
    return torch.from_numpy(np.stack([np.asarray(frame) for frame in large])).float() / 255


def as_picture(frame: Tensor) -> Image.Image:
    """A frame [H, W, 3] in [0, 1] as a picture of 8 bits."""
    return Image.fromarray((frame * 255).round().byte().numpy())
