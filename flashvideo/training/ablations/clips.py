"""The clips that are measured on: procedural scenes that no training saw, and a real one, each with its draft.

What a clip needs in every measurement (the draft's latent, the truth's optical flow) is made once and kept on disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...frames import TargetSize, prepare, resize, to_frames, to_video
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
DRAFTS = ("shrunk", "coded", "strong")
TEST_SPLIT, TEST_SEED = "test", 3


@dataclass(frozen=True)
class RealClip:
    """A piece of a real video, which is scaled to whatever size is measured."""

    path: Path
    when: float  # from 0, the beginning, to 1, the end
    caption: str

    def frames(self, count: int, height: int, width: int) -> Tensor:
        """[count, height, width, 3] in [0, 1] from the middle of the picture. Raises TrainingError if it can't be."""
        try:
            pictures = torch.from_numpy(read_clip(self.path, count, FRAME_RATE, self.when)).float() / 255
        except UnusableVideo as problem:
            raise TrainingError(f"{self.path}: {problem}.") from problem
        rows, columns = pictures.shape[1:3]
        scale = min(rows / height, columns / width)
        tall, wide = round(height * scale), round(width * scale)
        top, left = (rows - tall) // 2, (columns - wide) // 2
        return resize(pictures[:, top : top + tall, left : left + wide], height, width, "bicubic")


@dataclass(frozen=True)
class Suite:
    """Clips of one size with one kind of draft."""

    source: ClipSettings
    count: int  # of procedural clips
    draft: str  # one of DRAFTS
    real: RealClip | None = None

    @property
    def names(self) -> list[str]:
        """The clips' names: scenes by number, and the real clip's file."""
        real = [] if self.real is None else [self.real.path.stem]
        return [f"scene {index + 1}" for index in range(self.count)] + real

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
    def enlarged(self) -> Tensor:
        """The draft as Prepare Frames enlarges it, [T, H, W, 3]."""
        return prepare(self.draft, TargetSize("scale", scale=float(FACTOR))).reference


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
        if index >= suite.count:
            content = hashlib.sha256(suite.real.path.read_bytes()).hexdigest()
            source = (scene, content, suite.real.when, suite.real.caption)
        parts = (repr(source), suite.draft, self.text.digest)
        parts += (self.vae.digest,) if suite.draft == "coded" else ()
        return cache_folder(self.folder, self.vae_path, "held out", *parts).with_suffix(".safetensors")

    @torch.no_grad()
    def _make(self, suite: Suite, index: int) -> dict[str, Tensor]:
        source = suite.source
        if index < suite.count:
            video, caption = source.open(TEST_SPLIT, TEST_SEED).sample(index)
            truth = to_frames(video[None])
        else:
            truth, caption = suite.real.frames(source.frames, source.height, source.width), suite.real.caption
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

        "shrunk": bilinear and antialiased, as the official training shrinks. "coded": that, through the VAE as the
        drafts of stage I come. "strong": the training's strong degradation first.
        """
        if kind == "coded":
            return coded_draft(self.vae, truth, FACTOR, TEST_SEED, "draft", index)
        if kind == "strong":
            degraded = StrongDegradation()(to_video(truth)[0], generator_for(TEST_SEED, "strong", index))
            truth = to_frames(degraded[None])
        return resize(truth, truth.shape[1] // FACTOR, truth.shape[2] // FACTOR, "bilinear")


def _eight_bit(frames: Tensor) -> Tensor:
    """Frames as a video file holds them."""
    return (frames * 255).round() / 255
