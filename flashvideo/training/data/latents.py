"""Clips as latents on disk: encoded once, then read by every step. Stored in shards, so that encoding can resume."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ...checkpoints import read_vae
from ...config import PIXEL_MULTIPLE, is_video_length
from ...frames import TargetSize, finish, prepare, resize, to_frames, to_video
from ...parallel import Ranks, agree
from ..errors import TrainingError
from ..loop.checkpointing import whole_file
from ..randomness import generator_for, randint
from ..scenes.stream import VERSION as SCENES_VERSION
from ..scenes.stream import SceneStream
from .folder import VideoFolder
from .frozen_vae import FrozenVAE
from .sources import MIXED, SCENES, Clips, Footage, Mixture, digest_of_source

SHARD = 32  # clips in a file
DTYPE = torch.float16
CAPTIONS = "captions"

# make(i) gives clip i as named tensors and its caption
MakeClip = Callable[[int], tuple[Mapping[str, Tensor], str]]


@dataclass(frozen=True)
class ClipSettings(Footage):
    """Which clips are learnt from: those of the footage's source, or a folder of videos with captions."""

    height: int
    width: int
    frames: int  # 4n + 1
    clips: int
    validation_clips: int = 8
    folder: str = ""  # of videos; empty for the footage's source
    scene: tuple[int, int] = (0, 0)  # height and width that scenes are drawn at; the clip is a piece of it, (0, 0) all

    def __post_init__(self) -> None:
        """Refuse sizes that the networks don't take."""
        super().__post_init__()
        if self.height % PIXEL_MULTIPLE or self.width % PIXEL_MULTIPLE or not is_video_length(self.frames):
            size = f"{self.width}x{self.height}, {self.frames} frames"
            raise TrainingError(f"Clips must have sides of multiples of {PIXEL_MULTIPLE} and 4n+1 frames; got {size}.")
        if min(self.clips, self.validation_clips) < 1:
            raise TrainingError("There must be at least one clip to learn from, and one to validate with.")
        if self.folder and any(self.scene):
            raise TrainingError("`scene` is for drawn scenes; clips from a folder are cut from its videos.")
        if self.folder and self.source != SCENES:
            raise TrainingError(f'`folder` and source = "{self.source}" name different clips: drop one of them.')

    @property
    def has_layouts(self) -> bool:
        """Whether some clips are whole drawn scenes, of which is known where their subjects are."""
        return self.source in (SCENES, MIXED) and not self.folder and not any(self.scene)

    @property
    def identity(self) -> tuple[Any, ...]:
        """The settings that latents of these clips depend on; how real clips are cut only if there are any."""
        values = dataclasses.asdict(self)
        footage = {field.name: values.pop(field.name) for field in dataclasses.fields(Footage)}
        return (*values.values(), *(() if self.source == SCENES else (footage,)))

    def open(self, split: str, seed: int) -> Clips:
        """Return the clips of "train" or "validation"."""
        size = self.height, self.width, self.frames
        if self.folder:
            return VideoFolder(self.folder, *size, seed, split=split)
        scenes: Clips = SceneStream(split, *size, seed)
        if any(self.scene):
            scenes = ScenePieces(SceneStream(split, *self.scene, self.frames, seed), self.height, self.width)
        return self.open_footage(scenes, split, *size, seed)


@dataclass(frozen=True)
class ScenePieces:
    """Clips cut from larger scenes: the detail of full resolution for the work of a small clip."""

    scenes: SceneStream
    height: int
    width: int

    def __post_init__(self) -> None:
        """Refuse pieces larger than the whole."""
        if self.height > self.scenes.height or self.width > self.scenes.width:
            raise TrainingError(
                f"A piece of {self.width}x{self.height} doesn't fit a scene of "
                f"{self.scenes.width}x{self.scenes.height}."
            )

    def sample(self, index: int) -> tuple[Tensor, str]:
        """Piece `index`, [3, T, height, width] in [-1, 1], and the caption of the whole scene."""
        video, caption = self.scenes.sample(index)
        return self.cut(video, index), caption

    def cut(self, video: Tensor, index: int) -> Tensor:
        """Piece `index` of its whole scene [3, T, H, W], or of what was made of that."""
        generator = generator_for(self.scenes.seed, "piece", index)
        top = randint(generator, 0, self.scenes.height - self.height)
        left = randint(generator, 0, self.scenes.width - self.width)
        return video[..., top : top + self.height, left : left + self.width]


def content_of(source: Clips) -> tuple[str, ...]:
    """What clips depend on beside settings: the files that they are cut from."""
    digest = digest_of_source(source)
    return (digest,) if digest else ()


def sample_uncut(source: Clips, index: int) -> tuple[Tensor, str, Callable[[Tensor], Tensor]]:
    """The whole video that clip `index` is of, [3, T, H, W]; its caption; and what cuts the clip from such a video."""
    if isinstance(source, Mixture):
        source = source.of(index)
    if isinstance(source, ScenePieces):
        return *source.scenes.sample(index), lambda video: source.cut(video, index)
    return *source.sample(index), lambda video: video


def layout_of(source: Clips, index: int, cells: int) -> Tensor | None:
    """Where the subjects of clip `index` are, as `SceneStream.layout` says; None if it isn't a whole drawn scene."""
    scenes = scenes_of(source, index)
    return None if scenes is None else scenes.layout(index, cells)


def scenes_of(source: Clips, index: int) -> SceneStream | None:
    """The source of clip `index`, if that is a whole drawn scene."""
    if isinstance(source, Mixture):
        source = source.of(index)
    return source if isinstance(source, SceneStream) else None


class LatentCache(Dataset):
    """Clips [i] as dicts of tensors, from shards of a folder that `make` fills."""

    def __init__(self, folder: Path, clips: int, make: MakeClip) -> None:
        """Nothing is read or written yet."""
        self.folder, self.clips, self.make = folder, clips, make
        self._open: dict[int, tuple[Any, list[str]]] = {}  # shards in use: the file, and its captions

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes get neither the open files nor `make`."""
        return {**self.__dict__, "_open": {}, "make": None}

    def __len__(self) -> int:
        """Count the clips."""
        return self.clips

    def fill(self, ranks: Ranks | None = None) -> None:
        """Make the shards that aren't there yet, each on one of `ranks`. May be stopped and called again at any time.

        Raises TrainingError if ranks don't see each other's files.
        """
        missing = agree(ranks, self._missing)
        if ranks is None:
            self._make(missing)
            return
        self._make(missing[ranks.rank :: ranks.size])
        ranks.collect(None)  # now all are done
        if self._missing():
            raise TrainingError(f"{self.folder} must be the same folder for all processes, on a disk that they share.")

    def _missing(self) -> list[int]:
        """The first clips of the shards that aren't there."""
        return [start for start in range(0, self.clips, SHARD) if not self._path(start).is_file()]

    def _make(self, starts: Sequence[int]) -> None:
        """Make the shards that begin with these clips."""
        clips = sum(min(SHARD, self.clips - start) for start in starts)
        with torch.inference_mode(), tqdm(total=clips, desc="latents", unit="clip", disable=not starts) as bar:
            for start in starts:
                entries, captions = [], []
                for index in range(start, min(start + SHARD, self.clips)):
                    tensors, caption = self.make(index)
                    entries.append({name: tensor.to("cpu", DTYPE) for name, tensor in tensors.items()})
                    captions.append(caption)
                    bar.update()
                stacked = {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}
                with whole_file(self._path(start)) as part:
                    save_file(stacked, part, metadata={CAPTIONS: json.dumps(captions)})

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Clip `index` as stored, in half precision."""
        (shard, _), row = self._shard(index), index % SHARD
        return {name: shard.get_slice(name)[row] for name in shard.keys()}  # noqa: SIM118

    def caption(self, index: int) -> str:
        """Caption of clip `index`."""
        return self._shard(index)[1][index % SHARD]

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Clips of these indices, stacked, in float32."""
        entries = [self[index] for index in indices]
        return {name: torch.stack([entry[name] for entry in entries]).float() for name in entries[0]}

    def draw(self, batch: int, seed: int, *names: str | int) -> list[int]:
        """Draw `batch` indices, the same for the same seed and names."""
        generator = generator_for(seed, *names)
        return [randint(generator, 0, self.clips - 1) for _ in range(batch)]

    def _shard(self, index: int) -> tuple[Any, list[str]]:
        start = index // SHARD * SHARD
        if start not in self._open:
            file = safe_open(self._path(start), framework="pt")
            self._open[start] = (file, json.loads(file.metadata()[CAPTIONS]))
        return self._open[start]

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:06d}.safetensors"


def check_lengths(lengths: Sequence[int], where: str) -> None:
    """Refuse a length of nothing; `where` names the part of a config file. Raises TrainingError."""
    if any(length < 1 for length in lengths):
        raise TrainingError(f"{where} lengths must be 1 or more; got {list(lengths)}.")


def draw_length(lengths: Sequence[int], whole: int, generator: torch.Generator) -> int:
    """Draw how many of `whole` latent frames are seen: one of `lengths`, or all of them if there are none."""
    if not lengths:
        return whole
    return min(lengths[randint(generator, 0, len(lengths) - 1)], whole)


def cache_folder(root: Path, vae: Path, *settings: Any) -> Path:
    """The folder of latents of this VAE's encoder and these settings; other ones have another folder."""
    if not vae.is_file():
        raise TrainingError(f"{vae}: there is no such VAE. Train it first: python -m flashvideo train vae.")
    plain = [_plain(each) for each in settings]
    key = repr((encoder_digest(vae), SCENES_VERSION, plain))
    return root / hashlib.sha256(key.encode()).hexdigest()[:16]


def _plain(setting: Any) -> Any:
    if isinstance(setting, ClipSettings):
        return setting.identity
    return dataclasses.astuple(setting) if dataclasses.is_dataclass(setting) else setting


def encoder_digest(vae: Path) -> str:
    """A hash of a VAE's encoder: latents depend on it, and not on the decoder."""
    found = vae.stat()
    return _digest_of_version(vae, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=8)
def _digest_of_version(vae: Path, _modified: int, _size: int) -> str:
    """The same for a file as it is now; asked for every clip."""
    _, state = read_vae(vae)
    digest = hashlib.sha256()
    for name in sorted(name for name in state if name.startswith("encoder.")):
        digest.update(name.encode())
        digest.update(state[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def coded_draft(vae: FrozenVAE, frames: Tensor, factor: int, seed: int, *names: str | int) -> Tensor:
    """A draft of frames [T, H, W, 3] in [0, 1], `factor` times smaller, through the VAE as stage I's drafts are."""
    small = resize(frames, frames.shape[1] // factor, frames.shape[2] // factor, "bilinear")
    prepared = prepare(small, TargetSize("keep"))
    latent = vae.encode(to_video(prepared.frames)[0], seed, *names)
    return finish(to_frames(vae.decode(latent[None])), prepared.reference)


def enlarged_draft(vae: FrozenVAE, video: Tensor, factor: int, seed: int, *names: str | int) -> Tensor:
    """Stage II's reference of a video [3, T, H, W] in [-1, 1], had stage I made it: `coded_draft`, enlarged."""
    draft = coded_draft(vae, to_frames(video[None]), factor, seed, *names)
    return to_video(prepare(draft, TargetSize("scale", scale=float(factor))).reference)[0]
