"""Numbered pictures, such as shot.0001.exr and on, as a clip; and refined frames as such pictures."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from ..errors import CommandError
from .alpha import is_transparent, split_alpha
from .hdr import light_to_sdr, sdr_to_light
from .opening import VIDEO_ENDINGS
from .orientation import orientation_of
from .picture_metadata import EXR_HALF, exr_depth, is_premultiplied
from .pixels import DEEP_RGB, colour_matrix, upright_pixels
from .reading import VideoClip

PICTURE_RATE = Fraction(24)  # frames a second, where nobody says
LINEAR = "linear"  # the curve of OpenEXR: light itself
_NUMBER = re.compile(r"%(?:0\d+)?d")
_DECODERS = {
    ".png": "png", ".tif": "tiff", ".tiff": "tiff", ".exr": "exr", ".dpx": "dpx", ".jpg": "mjpeg", ".jpeg": "mjpeg",
    ".bmp": "bmp", ".webp": "webp", ".tga": "targa",
}  # fmt: skip
_PADDING = bytes(64)  # FFmpeg's decoders read ahead
_NAMED = 3  # pictures in a sentence
_EIGHT_BITS, _FLOAT_BITS = 8, 32
_FLOATS = {"f16le": "<f2", "f16be": ">f2", "f32le": "<f4", "f32be": ">f4"}  # by the ends of FFmpeg's names
_PLANES = 2, 0, 1  # of red, green and blue in FFmpeg's planar formats


@dataclass(frozen=True)
class _Kind:
    """How pictures of an ending are written: FFmpeg's encoder, and its pixel formats by bits a colour."""

    encoder: str
    pixels: Mapping[int, str]
    with_alpha: Mapping[int, str]


_PNG = _Kind("png", {8: "rgb24", 16: "rgb48be"}, {8: "rgba", 16: "rgba64be"})
_TIFF = _Kind("tiff", {8: "rgb24", 16: "rgb48le"}, {8: "rgba", 16: "rgba64le"})
_EXR = _Kind("exr", dict.fromkeys((16, 32), "gbrpf32le"), dict.fromkeys((16, 32), "gbrapf32le"))
SEQUENCES = {".png": _PNG, ".tif": _TIFF, ".tiff": _TIFF, ".exr": _EXR}


def is_pattern(path: Path) -> bool:
    """Whether a path names numbered pictures: one number in the name, as in shot.%04d.png, and no video's ending."""
    return len(_NUMBER.findall(path.name)) == 1 and path.suffix.lower() not in VIDEO_ENDINGS


def picture_name(pattern: Path, number: int) -> Path:
    """The path of one of the pictures."""
    return pattern.with_name(_NUMBER.sub(lambda found: found[0] % number, pattern.name))


@dataclass(frozen=True)
class PictureSequence(VideoClip):
    """Numbered pictures. `numbers` are theirs; a missing one is a longer time. `peak`: OpenEXR's brightest light.

    `premultiplied`: TIFF's stored colours are multiplied by alpha.
    """

    numbers: tuple[int, ...] = ()
    peak: float = 1.0
    premultiplied: bool = False

    def beginning(self, count: int) -> PictureSequence:
        """See `VideoClip`."""
        return replace(super().beginning(count), numbers=self.numbers[:count])

    def source(self) -> AbstractContextManager[None]:
        """There are no other tracks."""
        return nullcontext()

    def frames(self, start: int = 0) -> Iterator[Tensor]:
        """See `VideoClip`. OpenEXR's light is brought to an ordinary screen's brightness, see `hdr`."""
        deep = self.bits > _EIGHT_BITS or self.transparent
        for frame in self._pictures(start):
            if self.curve == LINEAR:
                yield light_to_sdr(torch.from_numpy(_light(frame)), self.peak).float()
            else:
                orientation, kind = orientation_of(frame, _codec(self.path)), {"premultiplied": self.premultiplied}
                yield torch.from_numpy(upright_pixels(frame, colour_matrix(frame), orientation, deep=deep, **kind))

    def _pictures(self, start: int) -> Iterator[av.VideoFrame]:
        return (decode_picture(picture_name(self.path, number)) for number in self.numbers[start:])


def open_sequence(
    pattern: Path, rate: Fraction = PICTURE_RATE, on_frame: Callable[[int, int], None] = lambda done, total: None
) -> PictureSequence:
    """Read numbered pictures once, to see which can be decoded. `on_frame(done, expected)` runs after each.

    Raises CommandError if there are none, or their sizes differ.
    """
    numbers = sequence_numbers(pattern)
    if not numbers:
        raise CommandError(f"There are no pictures {pattern}.")
    good, bad, first, size, peak, transparent, negative = [], [], None, (0, 0), 0.0, False, False
    for number in numbers:
        try:
            frame = decode_picture(picture_name(pattern, number))
        except CommandError:
            bad.append(number)
            continue
        shape = _upright_size(frame, _codec(pattern))
        if first is None:
            first, size = frame, shape
        elif shape != size or frame.format.name != first.format.name:
            raise CommandError(f"{picture_name(pattern, number)} has another size or kind of pixels than those before.")
        if _is_light(frame):
            light = _light(frame)
            peak, negative = max(peak, float(light.max())), negative or light.min() < 0
        transparent = transparent or is_transparent(frame)
        good.append(number)
        on_frame(len(good), len(numbers))
    if first is None:
        raise CommandError(f"None of the {len(numbers)} pictures {pattern} can be decoded.")
    notes = []
    if negative:
        notes.append("Its light has numbers below 0, of colours outside its primaries; they become 0.")
    return PictureSequence(
        path=pattern,
        height=size[0],
        width=size[1],
        rate=rate,
        time_base=1 / rate,
        times=tuple(number - good[0] for number in good),
        matrix=1,
        tags=(1, 1),
        bits=_FLOAT_BITS if _is_light(first) else max(component.bits for component in first.format.components),
        curve=LINEAR if _is_light(first) else "",
        orientation=orientation_of(first, _codec(pattern)),
        transparent=transparent,
        notes=tuple(notes),
        damage=tuple(_damage(pattern, numbers, good, bad)),
        numbers=tuple(good),
        peak=peak,
        premultiplied=transparent and is_premultiplied(picture_name(pattern, good[0])),
    )


def sequence_numbers(pattern: Path) -> list[int]:
    """The numbers of the pictures that are there, in order. Raises CommandError for a kind that isn't read."""
    if pattern.suffix.lower() not in _DECODERS:
        raise CommandError(f"{pattern.name}: numbered pictures end in {', '.join(_DECODERS)}.")
    before, after = (re.escape(part) for part in _NUMBER.split(pattern.name))
    name = re.compile(f"{before}([0-9]+){after}")
    if not pattern.parent.is_dir():
        raise CommandError(f"There is no folder {pattern.parent}.")
    found = (name.fullmatch(path.name) for path in pattern.parent.iterdir())
    # %d is also 0007's pattern for a person; only names that it makes can be found again.
    return sorted(int(each[1]) for each in found if each and picture_name(pattern, int(each[1])).name == each[0])


def sequence_identity(pattern: Path) -> list[str | int]:
    """What recognises the pictures: their pattern, how many there are, and a digest of sizes and times."""
    digest, numbers = hashlib.blake2b(digest_size=16), sequence_numbers(pattern)
    for number in numbers:
        facts = picture_name(pattern, number).stat()
        digest.update(repr((number, facts.st_size, facts.st_mtime_ns)).encode())
    return [pattern.name, len(numbers), digest.hexdigest()]


def _damage(pattern: Path, numbers: list[int], good: list[int], bad: list[int]) -> Iterator[str]:
    if bad:
        names = ", ".join(picture_name(pattern, number).name for number in bad[:_NAMED])
        yield f"{len(bad)} of {len(numbers)} pictures can't be decoded ({names}{', …' if len(bad) > _NAMED else ''})."
    missing = sorted({*range(numbers[0], numbers[-1] + 1)}.difference(numbers))
    if missing:
        names = ", ".join(map(str, missing[:_NAMED]))
        more = ", …" if len(missing) > _NAMED else ""
        yield f"{len(missing)} numbers are missing ({names}{more}); the others keep theirs."


def _codec(path: Path) -> str:
    return _DECODERS[path.suffix.lower()]


def decode_picture(path: Path, codec: str | None = None) -> av.VideoFrame:
    """The first picture of a file, by FFmpeg's decoder of that name or of the file's ending. Raises CommandError."""
    try:
        context = av.CodecContext.create(codec or _codec(path), "r")
        context.thread_count = 1
        return [*context.decode(av.Packet(path.read_bytes() + _PADDING)), *context.decode(None)][0]
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:
        raise CommandError(f"{path} can't be read as a picture.") from error


def _is_light(frame: av.VideoFrame) -> bool:
    return frame.format.name.endswith(tuple(_FLOATS))


def _light(frame: av.VideoFrame) -> np.ndarray:
    """Light of an OpenEXR picture, float32 [H, W, 3], on black; what isn't a number is 0."""
    dtype = np.dtype(next(kind for ending, kind in _FLOATS.items() if frame.format.name.endswith(ending)))
    planes = [
        np.frombuffer(bytes(plane), dtype).reshape(frame.height, -1)[:, : frame.width].astype(np.float32)
        for plane in frame.planes
    ]
    colours = [planes[0]] * 3 if len(planes) == 1 else [planes[index] for index in _PLANES]
    light = np.nan_to_num(np.stack(colours, axis=2), nan=0.0, posinf=np.finfo(np.float16).max, neginf=0.0)
    return light  # OpenEXR's colours are premultiplied


def _upright_size(frame: av.VideoFrame, codec: str) -> tuple[int, int]:
    size = frame.height, frame.width
    return size[::-1] if orientation_of(frame, codec).transposed else size


@dataclass(frozen=True)
class SequenceFormat:
    """How refined frames are written as numbered pictures: PNG, TIFF or OpenEXR, by the ending of `pattern`.

    `bits` a colour: 8, or 10 for all that the kind has (16; OpenEXR 16 or 32 as its source); None is as deep as the
    source. `first`: the number of the first picture; None is the source's, or 1. OpenEXR is written from OpenEXR only.

    Raises CommandError for an ending or a source that doesn't go.
    """

    clip: VideoClip
    height: int
    width: int
    pattern: Path
    bits: int | None = None
    first: int | None = None

    def __post_init__(self) -> None:
        if self.kind is None:
            raise CommandError(f"{self.pattern.name}: numbered pictures are written as {', '.join(SEQUENCES)}.")
        if self.kind is _EXR and self.clip.curve != LINEAR:
            raise CommandError("OpenEXR holds light, which only OpenEXR sources have: write .png or .tif instead.")

    @property
    def kind(self) -> _Kind | None:
        """How this ending is written."""
        return SEQUENCES.get(self.pattern.suffix.lower())

    @property
    def keeps_alpha(self) -> bool:
        """Whether the pictures are transparent as their source is."""
        return self.clip.transparent

    @property
    def depth(self) -> int:
        """Bits a colour."""
        deep = self.clip.bits > _EIGHT_BITS if self.bits is None else self.bits > _EIGHT_BITS
        if self.kind is _EXR:
            source = self.clip.path
            return exr_depth(picture_name(source, self.clip.numbers[0]))
        return 16 if deep else _EIGHT_BITS

    @property
    def numbers(self) -> list[int]:
        """The pictures' numbers."""
        own = getattr(self.clip, "numbers", None) or range(1, self.clip.count + 1)
        shift = 0 if self.first is None else self.first - own[0]
        return [number + shift for number in own]

    def losses(self) -> Iterator[str]:
        """A sentence on each thing that pictures have no room for."""
        if self.clip.curve == LINEAR and self.kind is not _EXR:
            yield "Its light becomes ordinary pictures, as the networks see it: write .exr to keep it."
        elif self.clip.curve and self.clip.curve != LINEAR:
            yield f"It is HDR ({self.clip.curve}): the pictures hold what an ordinary screen shows of it."
        if self.clip.bits > self.depth and self.kind is not _EXR and self.clip.curve != LINEAR:
            yield f"Its {self.clip.bits} bits a colour become {self.depth}."


def encode_pictures(frames: Iterable[Tensor], form: SequenceFormat) -> dict[str, Tensor]:
    """Encode frames, [t, H, W, 3 or premultiplied 4] at a time, in [0, 1] or uint8, as files.

    Returns `data`, the files one after the other, and `packets` [n, 1], their sizes.
    """
    files = [_encoded(picture, form) for chunk in frames for picture in chunk]
    data = np.frombuffer(b"".join(files), dtype=np.uint8)
    return {"data": torch.from_numpy(data.copy()), "packets": torch.tensor([[len(file)] for file in files])}


def _encoded(picture: Tensor, form: SequenceFormat) -> bytes:
    frame = _frame(_fractions(picture), form)
    context = av.CodecContext.create(form.kind.encoder, "w")
    context.height, context.width, context.pix_fmt = form.height, form.width, frame.format.name
    context.time_base = 1 / PICTURE_RATE
    if form.kind is _EXR:
        context.options = {"compression": "zip16", "format": "half" if form.depth == EXR_HALF else "float"}
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def _frame(picture: Tensor, form: SequenceFormat) -> av.VideoFrame:
    """A picture [H, W, 3 or premultiplied 4] in [0, 1] as the kind of file stores it."""
    formats = form.kind.pixels if picture.shape[2] == len("RGB") else form.kind.with_alpha
    if form.kind is _EXR:
        light = sdr_to_light(picture[..., :3], form.clip.peak).float()
        light = torch.cat([light, picture[..., 3:].float()], dim=2).numpy()
        return av.VideoFrame.from_ndarray(np.ascontiguousarray(light), format=formats[form.depth])
    steps = 255 if form.depth == _EIGHT_BITS else DEEP_RGB
    kind, name = (np.uint8, "rgb24") if form.depth == _EIGHT_BITS else (np.uint16, "rgb48le")
    if formats is form.kind.pixels:
        stored = (picture * steps).round().numpy()
    else:
        colours, alpha = split_alpha(picture, steps)
        stored = np.dstack([(colours * steps).round().numpy(), alpha])
        name = "rgba" if form.depth == _EIGHT_BITS else "rgba64le"
    return av.VideoFrame.from_ndarray(stored.astype(kind), format=name).reformat(format=formats[form.depth])


def _fractions(pixels: Tensor) -> Tensor:
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
