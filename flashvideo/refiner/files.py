"""Refine files: a video with its sound, or a picture. Invalid input is reported before the work starts."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import av
import torch
from torch import Tensor

from ..atomic_files import InUseError, check_space, check_target, remove_abandoned
from ..color import COLORS_ONLY
from ..config import latent_frames
from ..degradation import AutoStrength, strength_in_words, suited_strength
from ..devices import GIB, main_memory
from ..errors import CommandError
from ..frames import PictureSize, odd_size_notice, padded_shape
from ..progress import PhaseProgress, no_phase_progress
from ..video_files import (
    CONTAINERS,
    VIDEO_ENDINGS,
    is_animated,
    is_pattern,
    open_container,
    picture_name,
    picture_track,
    sequence_identity,
    sequence_numbers,
)
from .alpha import AlphaLayer, enlarge_alpha
from .file_options import FileOptions
from .outputs import check_patterns, open_source, output_of
from .pictures import keeps_alpha, note_picture_losses, read_picture, write_picture
from .ranks import SharedWork, following, leading
from .run import ENCODE, Networks, RefineRun, RefineSettings, refine_frames
from .windows import plan_windows
from .work_folder import WorkFolder, discard, is_result_of

READ = "read"  # the phase before the others: the video is read to its end once
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
WORK_ENDING = ".unfinished"  # of the folder beside the result
FORMAT = 8  # of the work folder; a run of another format can't be resumed. 8: alpha
_BYTES_A_PIXEL = 0.4  # of a refined video, a generous guess: once as segments, once as the result
_SEGMENTS = "segments"
_USABLE = 0.9  # of main memory

log = logging.getLogger(__name__)


def is_picture(path: Path) -> bool:
    """Whether a file is a picture by its name, neither animated nor one of several that are numbered."""
    return not is_pattern(path) and path.suffix.lower() in PICTURE_ENDINGS and not is_animated(path)


def videos_in(folder: Path) -> list[Path]:
    """The videos and animated pictures of a folder, sorted by name; without subfolders."""
    return sorted(path for path in folder.iterdir() if path.is_file() and _is_video(path))


def _is_video(path: Path) -> bool:
    ending = path.suffix.lower()
    return ending in VIDEO_ENDINGS or (ending in PICTURE_ENDINGS and is_animated(path))


def expected_work(source: Path, settings: RefineSettings) -> tuple[float, int]:
    """Pixels of a video's result and its windows, roughly, from its header alone; 0 and 1 without a readable one."""
    try:
        frames, height, width = _header(source)
        height, width = settings.size.resolve(height, width)
        latents = latent_frames(padded_shape(frames, height, width)[0])
        windows = plan_windows(latents, settings.window, settings.overlap).starts
        return float(frames * height * width), len(windows)
    except (CommandError, ValueError, OSError, av.FFmpegError):
        return 0.0, 1


def _header(source: Path) -> tuple[int, int, int]:
    """Frames, height and width of a video or of numbered pictures, as far as its header tells."""
    numbers = sequence_numbers(source) if is_pattern(source) else None
    with open_container(source if numbers is None else picture_name(source, numbers[0])) as container:
        track = picture_track(container)
        if track is None or track.codec_context is None:
            raise ValueError
        frames = track.frames
        if not frames and container.duration:
            frames = int(container.duration / av.time_base * (track.average_rate or 0))
        if numbers is not None:
            frames = len(numbers)
        return max(1, frames), track.codec_context.height, track.codec_context.width


def check_paths(source: Path, target: Path, *, force: bool = False) -> None:
    """Raise CommandError unless `source` is a file and `target` a valid result for it; `force` allows to replace."""
    if not is_pattern(source) and not source.is_file():
        raise CommandError(f"There is no file {source}.")
    if is_pattern(source) or is_pattern(target):
        check_patterns(source, target)
        if not is_pattern(target):
            check_target(target, force=force)
        return
    picture = is_picture(source)
    endings = PICTURE_ENDINGS if picture else tuple(CONTAINERS)
    if target.suffix.lower() not in endings:
        kind = "picture" if picture else "video, or an animated picture"
        raise CommandError(f"{target.name} should end in {', '.join(endings)}: {source.name} is a {kind}.")
    check_target(target, force=force, source=source)


def was_finished(target: Path, work: Path | None = None) -> bool:
    """Whether an earlier run finished `target` but was killed before deleting its work folder; then deletes it.

    Also deletes what a killed run has left beside `target`.
    """
    remove_abandoned(target)
    folder = work or work_folder_of(target)
    if not is_result_of(target, folder):
        return False
    discard(folder)
    return True


def work_folder_of(target: Path, parent: Path | None = None) -> Path:
    """The folder for a result's unfinished work: beside it, or in `parent`."""
    return (parent or target.parent) / (target.name + WORK_ENDING)


def refine_video(
    networks: Networks,
    source: Path,
    target: Path,
    settings: RefineSettings,
    options: FileOptions | None = None,
    on_progress: PhaseProgress | None = None,
) -> tuple[str, ...]:
    """Refine a video file: the same frames at the same times with the same sound, in the wanted size.

    The readable part of a damaged file is refined; returns sentences about the damage, none for an intact file.

    Finished parts are stored in a work folder until `target` is complete, and a call with the same arguments resumes
    there. Raises CommandError for invalid input, InUseError while another program refines to `target`, and ValueError
    for an invalid size.

    With `networks.ranks` rank 0 does this, and the others compute with it: they give the same arguments and write
    nothing. Then an error after the work has begun ends all of them.
    """
    options, ranks = options or FileOptions(), networks.ranks
    if ranks is not None and not ranks.leads:
        _assist(networks, source, settings, options)
        return ()
    with leading(ranks) as begin:
        return _lead(networks, source, target, settings, options, on_progress or no_phase_progress, begin)


def _assist(networks: Networks, source: Path, settings: RefineSettings, options: FileOptions) -> None:
    """The other ranks' part of `refine_video`."""
    with following(networks.ranks):
        clip = open_source(source, options)
        size = settings.size.resolve(clip.height, clip.width)
        if settings.color_match == "wavelet":  # the same phases, and rank 0 matches the colours
            settings = replace(settings, color_match="none")
        work = SharedWork(None, networks.ranks)
        run = RefineRun(networks, clip, size, settings, work, segment_chunks=options.segment_chunks)
        run.run(lambda _, chunks: deque(chunks, maxlen=0))


def _lead(
    networks: Networks,
    source: Path,
    target: Path,
    settings: RefineSettings,
    options: FileOptions,
    report: PhaseProgress,
    begin: Callable[[], None],
) -> tuple[str, ...]:
    ranks = networks.ranks
    if was_finished(target, options.work) and not options.force:
        options.note(f"{target} is complete: an earlier run was stopped during its clean-up.")
        return ()
    check_paths(source, target, force=options.force)
    clip = open_source(source, options, lambda done, total: report(READ, done, max(done, total)))
    if options.sound == "none":
        clip = clip.alone()
    size = settings.size.resolve(clip.height, clip.width)
    output = output_of(clip, size, target, options)
    resumes = (options.work or work_folder_of(target)).is_dir() and not options.anew
    damage = (*clip.damage, *output.check(options, resumes=resumes))
    for text in (odd_size_notice(size), *clip.notes, *output.form.losses(), *damage):
        if text:
            options.warn(text)
    suited = replace(settings, strength=suited_strength(settings.strength, networks.dit.config))
    with closing(_work_folder(source, target, size, suited, options)) as folder:
        if target.exists() and not options.force:
            folder.remove()
            raise InUseError(f"Another program has made {target} in the meantime.")
        work = folder if ranks is None else SharedWork(folder, ranks)
        run = RefineRun(networks, clip, size, settings, work, report, options.segment_chunks)
        note_automatic(networks, settings, size, options.note)
        if folder.fresh:
            needed = run.disk_bytes() + round(_BYTES_A_PIXEL * clip.count * size[0] * size[1])
            _check_space(folder, needed)
        _warn_of_memory(run.main_bytes(), size, options.warn)
        begin()
        layer = AlphaLayer(clip)

        def deliver(number: int, chunks: Iterator[Tensor]) -> None:
            if output.form.keeps_alpha:
                chunks = layer.add(run.first_frame(number), chunks)
            folder.put(_SEGMENTS, number, output.encode(chunks))

        run.run(deliver)
        segments = (folder.get(_SEGMENTS, number) for number in range(run.segments))
        output.write(segments, folder.note_result, force=options.force)
        folder.remove()
    return damage


def note_automatic(
    networks: Networks, settings: RefineSettings, size: PictureSize, note: Callable[[str], None]
) -> None:
    """Report what was chosen automatically."""
    config = networks.dit.config
    if not isinstance(settings.strength, int):
        note(strength_in_words(settings.strength_for(size, config), config, size))
    detail = settings.detail_for(config)
    if settings.detail_size is None and settings.color_match == "wavelet" and detail != COLORS_ONLY:
        note(
            f"detail size {detail.size:g} (auto, for FlashVideo-Nano): what is larger than {detail.size:g} pixels "
            "stays as in the source"
        )


def _warn_of_memory(needed: float, size: PictureSize, warn: Callable[[str], None]) -> None:
    there = main_memory()
    if needed > _USABLE * there:
        warn(
            f"For {size} the VAE keeps {needed / GIB:.0f} GiB in main memory and this "
            f"machine has {there / GIB:.0f} GiB: it may become very slow, or be killed. Half as many pixels need "
            "half of it."
        )


def _work_folder(
    source: Path, target: Path, size: PictureSize, settings: RefineSettings, options: FileOptions
) -> WorkFolder:
    facts = {
        "format": FORMAT,
        "file": sequence_identity(source) if is_pattern(source) else file_identity(source),
        "pictures": [options.fps, options.start_number],
        "crf": options.crf,
        "sound": options.sound,
        "codec": [options.codec, options.bits],
        "deinterlace": options.deinterlace,
        "segment": options.segment_chunks,
    }
    facts["pixels"] = str(size)
    chosen = asdict(settings)
    if isinstance(settings.strength, AutoStrength):
        chosen["strength"] = str(settings.strength)
    path = options.work or work_folder_of(target)
    return WorkFolder(path, {**facts, **chosen, **options.about}, ENCODE, anew=options.anew)


def refine_picture(
    networks: Networks,
    source: Path,
    target: Path,
    settings: RefineSettings,
    *,
    force: bool = False,
    on_progress: PhaseProgress | None = None,
    note: Callable[[str], None] = log.info,
) -> None:
    """Refine a picture file; `note` as in `FileOptions`.

    Raises CommandError for invalid input, and ValueError as `refine_frames` does. Ranks: see `refine_video`.
    """
    ranks = networks.ranks
    if ranks is not None and not ranks.leads:
        with following(ranks):
            refine_frames(networks, read_picture(source).pixels[None], settings)
        return
    with leading(ranks) as begin:
        check_paths(source, target, force=force)
        remove_abandoned(target)
        picture = read_picture(source)
        size = settings.size.resolve(*picture.pixels.shape[:2])
        note_picture_losses(picture, target, note)
        note_automatic(networks, settings, size, note)
        begin()
        refined = refine_frames(networks, picture.pixels[None], settings, on_progress, size=size)[0]
        if keeps_alpha(picture, target):
            alpha = enlarge_alpha(picture.alpha, picture.pixels, refined)
            refined = torch.cat([refined, alpha[..., None]], dim=2)
        write_picture(target, refined, picture, force=force)


def file_identity(path: Path) -> list[str | int]:
    """Name, size and modification time of a file, to recognise it."""
    facts = path.stat()
    return [path.name, facts.st_size, facts.st_mtime_ns]


def _check_space(folder: WorkFolder, needed: int) -> None:
    try:
        check_space(folder.path, needed, "this run", hint="--work DIR chooses another folder.")
    except CommandError:
        folder.remove()
        raise
