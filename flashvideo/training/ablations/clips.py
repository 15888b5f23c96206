"""The clips that are measured on: procedural scenes that no training saw, and real ones, each with its draft.

What a clip needs in every measurement (the draft's latent, the truth's optical flow) is made once and kept on disk.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...atomic_files import sha256
from ...errors import CommandError
from ...frames import TargetSize, prepare, resize, to_frames, to_video
from ...video_files import open_clip
from ..data.decoding import PICTURE_ENDINGS, UndecodableError, picture_count, picture_frames
from ..data.degradations import StrongDegradation
from ..data.folder import UnusableVideo, read_clip
from ..data.frozen_vae import FrozenVAE
from ..data.latents import ClipSettings, cache_folder, coded_draft
from ..errors import TrainingError
from ..loop.checkpointing import whole_file
from ..randomness import generator_for
from ..scenes.rendering import FRAME_RATE
from ..tasks.networks import FrozenText
from .measures import optical_flow

FACTOR = 4  # a draft's sides are so much smaller
DRAFTS = ("shrunk", "area", "coded", "strong")
LIBRARY_FRAMES = ".npy"  # of a clip library's files
TEST_SPLIT, TEST_SEED = "test", 4


@dataclass(frozen=True)
class RealClip:
    """A piece of a real video or animation, which is scaled to whatever size is measured."""

    path: Path
    when: float = 0.0  # from 0, the beginning, to 1, the end
    caption: str = ""
    rate: float | None = FRAME_RATE  # frames a second; None: every frame that the file has
    label: str = ""

    @property
    def name(self) -> str:
        """What results are called by."""
        return self.label or self.path.stem

    def frames(self, count: int, height: int, width: int) -> Tensor:
        """[count, height, width, 3] in [0, 1] from the middle of the picture. Raises TrainingError if it can't be."""
        try:
            if self.rate is None:
                frames = _consecutive(self.path, count, self.when)
            else:
                frames = read_clip(self.path, count, self.rate, self.when)
        except (UnusableVideo, UndecodableError, CommandError) as problem:
            raise TrainingError(f"{self.path}: {str(problem).removeprefix(f'{self.path}: ').rstrip('.')}.") from problem
        rows, columns = frames[0].shape[:2]
        if rows < height or columns < width:
            raise TrainingError(f"{self.path}: {columns}x{rows} is smaller than what is measured, {width}x{height}.")
        pictures = torch.from_numpy(np.stack(frames)).float() / 255
        scale = min(rows / height, columns / width)
        tall, wide = round(height * scale), round(width * scale)
        top, left = (rows - tall) // 2, (columns - wide) // 2
        return resize(pictures[:, top : top + tall, left : left + wide], height, width, "bicubic")


def _consecutive(path: Path, count: int, when: float) -> list[np.ndarray]:
    """`count` frames in a row, uint8 [H, W, 3]; `when` from 0, the first ones, to 1, the last ones.

    Raises UnusableVideo for too few, UndecodableError or CommandError for what can't be read.
    """
    pictures: Iterator[np.ndarray]
    if path.suffix == LIBRARY_FRAMES:
        kept = np.load(path, mmap_mode="r")
        total, pictures = len(kept), iter(kept)
    elif path.suffix.lower() in PICTURE_ENDINGS:
        total, pictures = picture_count(path), (pixels for pixels, _ in picture_frames(path))
    else:
        clip = open_clip(path)
        total, pictures = clip.count, (frame.numpy() for frame in clip.frames())
    if total < count:
        raise UnusableVideo(f"it has {total} of {count} frames")
    first = round(when * (total - count))
    frames = list(islice(pictures, first, first + count))
    if len(frames) < count:
        raise UnusableVideo(f"it ends after {len(frames)} of {count} frames")
    return frames


def usable(clips: Sequence[RealClip], source: ClipSettings) -> tuple[RealClip, ...]:
    """Those clips that are long and large enough; prints why each of the others isn't."""
    kept = []
    for clip in clips:
        try:
            clip.frames(source.frames, source.height, source.width)
        except TrainingError as error:
            sys.stdout.write(f"  Left out: {error}\n")
        else:
            kept.append(clip)
    return tuple(kept)


@dataclass(frozen=True)
class Suite:
    """Clips of one size with one kind of draft."""

    source: ClipSettings
    count: int  # of procedural clips
    draft: str  # one of DRAFTS
    real: tuple[RealClip, ...] = ()

    @property
    def names(self) -> list[str]:
        """The clips' names: scenes by number, and the real clips' files."""
        return [f"scene {index + 1}" for index in range(self.count)] + [clip.name for clip in self.real]

    def real_clip(self, index: int) -> RealClip | None:
        """The real clip that clip `index` is, or None for a scene."""
        return self.real[index - self.count] if index >= self.count else None

    @property
    def size(self) -> str:
        """Width, height and length in words."""
        return f"{self.source.width}x{self.source.height}, {self.source.frames} frames"


@dataclass(frozen=True)
class HeldOutClip:
    """A clip and all that its measurements share."""

    name: str
    digest: str
    truth: Tensor  # [T, H, W, 3] in [0, 1]
    draft: Tensor  # [T, H/4, W/4, 3]
    latent: Tensor  # [1, 16, T', h, w] of the enlarged draft, raw scale
    context: Tensor  # [1, 226, width]
    flow: Tensor  # [T - 1, 2, H, W] of the truth

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        return tuple(self.truth.shape[:3])

    @property
    def enlarged(self) -> Tensor:
        """The draft as Prepare Frames enlarges it, [T, H, W, 3]."""
        return prepare(self.draft, TargetSize("scale", scale=float(FACTOR))).reference


def held_out_clip(vae: FrozenVAE, name: str, draft: Tensor, context: Tensor) -> HeldOutClip:
    """A clip of a draft [T, h, w, 3] that has no truth: the enlarged draft stands in its place."""
    enlarged = prepare(draft, TargetSize("scale", scale=float(FACTOR)))
    latent = vae.encode(to_video(enlarged.frames)[0], TEST_SEED, "latent", name)[None]
    still = torch.zeros(len(draft) - 1, 2, *enlarged.reference.shape[1:3])
    return HeldOutClip(name, name, enlarged.reference, draft, latent, context, still)


class ClipStore:
    """Makes held-out clips, and keeps them in a folder."""

    def __init__(self, folder: Path, vae: Path, text: FrozenText, device: torch.device) -> None:
        self.folder, self.vae_path, self.text, self.device = folder, vae, text, device
        self.vae = FrozenVAE(vae, device)

    def clip(self, suite: Suite, index: int) -> HeldOutClip:
        """Clip `index` of a suite, from the disk if it is there."""
        path = self._path(suite, index)
        if not path.is_file():
            tensors = self._make(suite, index)
            with whole_file(path) as part:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
        stored = load_file(path)
        truth, draft = (stored[name].float() / 255 for name in ("truth", "draft"))
        return HeldOutClip(
            suite.names[index], path.stem, truth, draft,
            stored["latent"].to(self.device), stored["context"].to(self.device), stored["flow"].float(),
        )  # fmt: skip

    def _path(self, suite: Suite, index: int) -> Path:
        scene = dataclasses.replace(suite.source, clips=1, validation_clips=1)  # how many there are doesn't matter
        source: object = (scene, index)
        if real := suite.real_clip(index):
            source = (scene, sha256(real.path, lambda *_: None), real.when, real.caption, real.rate)
        parts = (repr(source), suite.draft, self.text.digest)
        parts += (self.vae.digest,) if suite.draft == "coded" else ()
        return cache_folder(self.folder, self.vae_path, "held out", *parts).with_suffix(".safetensors")

    @torch.no_grad()
    def _make(self, suite: Suite, index: int) -> dict[str, Tensor]:
        source = suite.source
        if real := suite.real_clip(index):
            truth, caption = real.frames(source.frames, source.height, source.width), real.caption
        else:
            video, caption = source.open(TEST_SPLIT, TEST_SEED).sample(index)
            truth = to_frames(video[None])
        truth = _eight_bit(truth)
        draft = _eight_bit(self._draft(truth, suite.draft, index))
        enlarged = prepare(draft, TargetSize("scale", scale=float(FACTOR))).frames
        return {
            "truth": (truth * 255).round().byte(),
            "draft": (draft * 255).round().byte(),
            "latent": self.vae.encode(to_video(enlarged)[0], TEST_SEED, "latent", index)[None].cpu(),
            "context": self.text([caption]),
            "flow": optical_flow(truth).half(),
        }

    def _draft(self, truth: Tensor, kind: str, index: int) -> Tensor:
        """A draft of [T, H, W, 3], a quarter as high and wide.

        "shrunk": bilinear and antialiased, as the official training shrinks. "area": the mean of 4x4 pixels. "coded":
        shrunk, and through the VAE as the drafts of stage I come. "strong": the training's strong degradation first.
        """
        if kind == "coded":
            return coded_draft(self.vae, truth, FACTOR, TEST_SEED, "draft", index)
        if kind == "strong":
            degraded = StrongDegradation()(to_video(truth)[0], generator_for(TEST_SEED, "strong", index))
            truth = to_frames(degraded[None])
        resample = "area" if kind == "area" else "bilinear"
        return resize(truth, truth.shape[1] // FACTOR, truth.shape[2] // FACTOR, resample)


def _eight_bit(frames: Tensor) -> Tensor:
    """Frames as a video file holds them."""
    return (frames * 255).round() / 255
