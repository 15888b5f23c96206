"""A trial: a tenth of the picture in the first window, refined as it would be within the whole result, and timed.

Frames are upscaled whole and then cut, the whole picture's noise is cut at the same place, and the strength follows
from the whole result's size. Two things differ from the whole run: the networks see nothing outside the crop, and no
later window. Only the trial's own file is written, at the end; unfinished work of the whole run is not looked at.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..atomic_files import check_target, remove_abandoned
from ..config import PIXEL_MULTIPLE, SPATIAL_FACTOR
from ..errors import CommandError
from ..frames import PictureSize, clean, enlarge, odd_size_notice, padded_shape
from ..progress import PhaseProgress, no_phase_progress
from ..video_files import SequenceFormat, VideoFormat, is_pattern, picture_name
from .alpha import enlarge_alpha
from .file_options import FileOptions
from .files import READ, check_paths, is_picture, note_automatic
from .outputs import open_source, output_of
from .pictures import keeps_alpha, note_picture_losses, read_picture, write_picture
from .run import DECODE, ENCODE, Networks, RefineRun, RefineSettings, TensorClip
from .tiles import SMALLEST_TILE_PIXELS
from .windows import frame_noise
from .work_folder import MemoryWork

CUT = "cut"  # the phase before the others: frames are upscaled and cut
AREA = 0.1  # of the picture
MIDDLE = (50.0, 50.0)  # percent of width and height
TRIAL_ENDING = ".try"  # before the result's suffix

Layers = Iterator[tuple[Tensor, Tensor]]  # frames on black, and how opaque they are


class Crop(NamedTuple):
    """A part of the result, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def size(self) -> PictureSize:
        """Its size as a picture's."""
        return PictureSize(self.height, self.width)

    def of(self, picture: Tensor) -> Tensor:
        """The part of a picture [H, W, ...], a view."""
        return picture[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class Trial:
    """What was tried: `crop` of a result of `size`, `frames` of its `count`.

    `settings` are those of the whole run, with its strength and detail size as numbers. `seconds` are those of each
    phase (CUT and `run.PHASES`), `total` of everything. `peak`: bytes of the card at the most; None without one.
    """

    size: PictureSize
    count: int
    crop: Crop
    frames: int
    settings: RefineSettings
    seconds: Mapping[str, float]
    total: float
    peak: int | None = None
    damage: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The crop's share of the picture's area."""
        return self.crop.height * self.crop.width / math.prod(self.size)


@dataclass
class _Stopwatch:
    """A `PhaseProgress` that notes when each phase begins and ends. The device finishes its work first."""

    device: torch.device
    report: PhaseProgress
    clock: Callable[[], float]
    begun: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)

    def __call__(self, phase: str, done: float, total: int) -> None:
        self.mark(phase)
        self.report(phase, done, total)

    def mark(self, phase: str) -> None:
        self.ended[phase] = self.now()
        self.begun.setdefault(phase, self.ended[phase])

    def now(self) -> float:
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()
        return self.clock()

    @property
    def seconds(self) -> dict[str, float]:
        return {phase: self.ended[phase] - begun for phase, begun in self.begun.items()}


@dataclass(frozen=True)
class _Plan:
    """A trial before its work."""

    networks: Networks
    settings: RefineSettings
    size: PictureSize
    crop: Crop
    watch: _Stopwatch

    def run(self, frames: Iterable[Tensor], count: int, deliver: Callable[[Iterator[Tensor]], None]) -> None:
        """Refine the first `count` of the source's frames; `deliver` gets [t, h, w, 3] in [0, 1] segment by segment."""
        clip = TensorClip(torch.stack(list(self._cut(islice(frames, count), count))))
        work, watch = MemoryWork(ENCODE), self.watch
        run = RefineRun(self.networks, clip, self.crop.size, self.settings, work, watch, noise=self._noise)

        def timed(_number: int, chunks: Iterator[Tensor]) -> None:
            deliver(chunks)
            watch.mark(DECODE)

        run.run(timed)

    def with_alpha(self, chunks: Iterable[Tensor], layers: Layers) -> Iterator[Tensor]:
        """Chunks [t, h, w, 3] with their alpha as within the whole picture, premultiplied [t, h, w, 4]."""
        for chunk in chunks:
            yield torch.stack([self._with_alpha(refined, *next(layers)) for refined in chunk])

    def _with_alpha(self, refined: Tensor, source: Tensor, alpha: Tensor) -> Tensor:
        picture = self._enlarged(source)
        self.crop.of(picture).copy_(refined)
        larger = self.crop.of(enlarge_alpha(alpha, source, picture))
        return torch.cat([refined, larger[..., None].to(refined.dtype)], dim=2)

    def _cut(self, frames: Iterable[Tensor], count: int) -> Iterator[Tensor]:
        self.watch(CUT, 0, count)
        for index, frame in enumerate(frames, start=1):
            yield self.crop.of(self._enlarged(frame.to(self.networks.device))).cpu().clone()
            self.watch(CUT, index, count)

    def _enlarged(self, frame: Tensor) -> Tensor:
        source, _ = clean(frame[None])
        height, width = self.size
        return enlarge(source, height, width, 1, self.settings.resample)[0, :height, :width]

    def _noise(self, shape: tuple[int, ...], seed: int, index: int) -> Tensor:
        rows, columns = (side // SPATIAL_FACTOR for side in padded_shape(1, *self.size)[1:])
        top, left = self.crop.top // SPATIAL_FACTOR, self.crop.left // SPATIAL_FACTOR
        whole = frame_noise((shape[0], rows, columns), seed, index)
        return whole[:, top : top + shape[1], left : left + shape[2]]


def plan_crop(size: PictureSize, place: tuple[float, float] = MIDDLE, tile: int = 0) -> Crop:
    """A tenth of a picture's area in its shape, with its middle at `place`, percent of width and height.

    Sides and position are multiples of 16 pixels. No side is shorter than one of stage II's tiles (`tile`, or the
    smallest there can be), nor longer than the picture, in which the crop always lies.
    """
    height, width = (_side(side, tile or SMALLEST_TILE_PIXELS) for side in size)
    across, down = place
    return Crop(_start(size.height, height, down), _start(size.width, width, across), height, width)


def _side(length: int, least: int) -> int:
    side = max(least, PIXEL_MULTIPLE * round(length * math.sqrt(AREA) / PIXEL_MULTIPLE))
    return side if side + PIXEL_MULTIPLE <= length else length


def _start(length: int, side: int, percent: float) -> int:
    start = PIXEL_MULTIPLE * round((length * percent / 100 - side / 2) / PIXEL_MULTIPLE)
    return max(0, min(start, (length - side) // PIXEL_MULTIPLE * PIXEL_MULTIPLE))


def trial_path(target: Path) -> Path:
    """The file of a result's trial: out.mp4 has out.try.mp4."""
    return target.with_name(f"{target.stem}{TRIAL_ENDING}{target.suffix}")


def check_trial(source: Path, target: Path) -> None:
    """Raise CommandError unless a trial of `source` for the result `target` can be written; results may be there."""
    if source.is_dir():
        raise CommandError(f"--try takes one video or picture: name one of those in {source}.")
    check_paths(source, target, force=True)
    if not is_pattern(target):
        check_target(trial_path(target), force=True, source=None if is_pattern(source) else source)


def try_file(
    networks: Networks,
    source: Path,
    target: Path,
    settings: RefineSettings,
    options: FileOptions,
    place: tuple[float, float] = MIDDLE,
    *,
    on_progress: PhaseProgress = no_phase_progress,
    clock: Callable[[], float] = time.perf_counter,
) -> Trial:
    """Refine a part of a video or a picture into `trial_path(target)`, which is replaced if it exists.

    The sound and other tracks of a video are left out. Nothing is left of a trial that ends with an error. Raises
    CommandError for invalid input, and ValueError for an invalid size.
    """
    check_trial(source, target)
    watch = _Stopwatch(networks.device, on_progress, clock)
    on_card = networks.device.type == "cuda"
    if on_card:
        torch.cuda.reset_peak_memory_stats(networks.device)
    begun = watch.now()
    task = _Task(networks, source, target, settings, replace(options, force=True), place, watch)
    trial = _try_picture(task) if is_picture(source) else _try_video(task)
    peak = torch.cuda.max_memory_allocated(networks.device) if on_card else None
    return replace(trial, seconds=watch.seconds, total=watch.now() - begun, peak=peak)


@dataclass(frozen=True)
class _Task:
    """What `try_file` was given."""

    networks: Networks
    source: Path
    target: Path
    settings: RefineSettings
    options: FileOptions
    place: tuple[float, float]
    watch: _Stopwatch

    @property
    def path(self) -> Path:
        return trial_path(self.target)

    def plan(self, height: int, width: int) -> _Plan:
        """For a source of this size."""
        networks, settings = self.networks, self.settings
        size = settings.size.resolve(height, width)
        note_automatic(networks, settings, size, self.options.note)
        settings = replace(settings, strength=settings.strength_for(size, networks.dit.config))
        crop = plan_crop(size, self.place, settings.tile)
        return _Plan(networks, settings, size, crop, self.watch)


def _try_video(task: _Task) -> Trial:
    options, watch = task.options, task.watch
    clip = open_source(task.source, options, lambda done, total: watch.report(READ, done, max(done, total)))
    plan = task.plan(clip.height, clip.width)
    output_of(clip, plan.size, task.target, options)  # refuses what the whole run would refuse
    part = clip.beginning(min(clip.count, plan.settings.window))
    output = output_of(part, plan.crop.size, task.path, options)
    remove_abandoned(task.path)
    with _folder_of(task.path):
        damage = (*clip.damage, *output.check(options, resumes=False))
        for text in (odd_size_notice(plan.size), *clip.notes, *output.form.losses(), *damage):
            if text:
                options.warn(text)
        layers, segments = zip(part.frames(), part.alpha(), strict=True), []

        def deliver(chunks: Iterator[Tensor]) -> None:
            segments.append(output.encode(plan.with_alpha(chunks, layers) if output.form.keeps_alpha else chunks))

        plan.run(part.frames(), part.count, deliver)
        with _all_or_none(task.path, output.form):
            output.write(segments, lambda _part: None, force=True)
    return Trial(plan.size, clip.count, plan.crop, part.count, plan.settings, {}, 0.0, damage=damage)


def _try_picture(task: _Task) -> Trial:
    picture = read_picture(task.source)
    plan = task.plan(*picture.pixels.shape[:2])
    remove_abandoned(task.path)
    note_picture_losses(picture, task.path, task.options.note)
    refined: list[Tensor] = []
    plan.run([picture.pixels], 1, refined.extend)
    if keeps_alpha(picture, task.path):
        refined = list(plan.with_alpha(refined, iter([(picture.pixels, picture.alpha)])))
    write_picture(task.path, refined[0][0], picture, force=True)
    return Trial(plan.size, 1, plan.crop, 1, plan.settings, {}, 0.0)


@contextmanager
def _folder_of(path: Path) -> Iterator[None]:
    """Delete the folder of numbered pictures after an error, if it is new. Other files need one that is there."""
    is_new = not path.parent.exists()
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):
                path.parent.rmdir()
        raise


@contextmanager
def _all_or_none(path: Path, form: VideoFormat | SequenceFormat) -> Iterator[None]:
    """Delete all numbered pictures after an error. A video is written whole or not at all."""
    try:
        yield
    except BaseException:
        for number in form.numbers if is_pattern(path) else ():
            picture_name(path, number).unlink(missing_ok=True)
        raise
