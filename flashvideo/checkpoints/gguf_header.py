"""The header of a GGUF file: what tensors it holds, of what kind, and where.

Everything is little-endian: "GGUF", a version, the counts of tensors and of facts, the facts (name, type, value), the
tensors (name, axes from the fastest, kind, place), then their bytes (github.com/ggml-org/ggml, docs/gguf.md). The
numbers are read with limits, so that a damaged or malicious file is refused within moments.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .packed import PACKINGS, Packing

MAGIC, SUFFIX = b"GGUF", ".gguf"
VERSIONS = (2, 3)
MAX_HEADER = 64 * 2**20  # bytes; a vocabulary of 256,000 words takes 7 MB
MAX_FACTS, MAX_TENSORS, MAX_TEXT, MAX_AXES = 2**14, 2**14, 512, 4  # text: of a fact that is kept, and of a name
_PLAIN = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
_NUMBERS = dict(zip(range(8), "BbHhIif?", strict=True)) | {10: "Q", 11: "q", 12: "d"}  # types of facts, for struct
_STRING, _ARRAY = 8, 9
_SHAPE = "comfy.gguf.orig_shape."  # before a tensor's name: its shape, where the file's is another


class DamagedError(ValueError):
    """Not a GGUF file that can be read; the message says why, without the file's name."""


@dataclass(frozen=True)
class Entry:
    """A tensor: its shape, its kind, and where its bytes are in the file."""

    shape: tuple[int, ...]
    kind: torch.dtype | Packing
    start: int
    nbytes: int


class _Header:
    """The bytes of a header, read from the first on."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def bytes(self, length: int) -> bytes:
        """The next ones. Raises DamagedError if there are fewer."""
        if length > len(self.content) - self.at:
            raise DamagedError("it is damaged or incomplete, and ends within its header")
        self.at += length
        return self.content[self.at - length : self.at]

    def number(self, form: str) -> Any:
        """The next number, of a kind that struct knows."""
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        """The next text, of any length."""
        return self.bytes(self.number("Q")).decode("utf-8", "replace")

    def name(self) -> str:
        """The next text, of a name's length."""
        text = self.text()
        if len(text) > MAX_TEXT:
            raise DamagedError(f"it holds a name of {len(text):,} letters")
        return text

    def value(self) -> Any:
        """The next fact's value: a number, a text, a short list of numbers, or None for lists that nobody needs."""
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(self._form(kind))
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            for _ in range(min(count, len(self.content))):
                self.bytes(self.number("Q"))
            return None
        form = self._form(inner)
        content = self.bytes(count * struct.calcsize(f"<{form}"))
        return list(struct.unpack(f"<{count}{form}", content)) if count <= MAX_AXES + 1 else None

    def _form(self, kind: int) -> str:
        if kind not in _NUMBERS:
            raise DamagedError(f"it holds a fact of an unknown type ({kind})")
        return _NUMBERS[kind]


def read_header(path: Path, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a GGUF file by name, and its facts that are short texts or numbers.

    Raises DamagedError.
    """
    with path.open("rb") as file:
        header = _Header(file.read(min(size, MAX_HEADER)))
    header.bytes(len(MAGIC))
    if (version := header.number("I")) not in VERSIONS:
        raise DamagedError(f"its version is {version}, and versions {' and '.join(map(str, VERSIONS))} are read")
    tensors, facts = header.number("Q"), header.number("Q")
    if tensors > MAX_TENSORS or facts > MAX_FACTS:
        raise DamagedError(f"it claims {tensors:,} tensors and {facts:,} facts, which no model has")
    values = {header.name(): header.value() for _ in range(facts)}
    found = [(header.name(), *_tensor(header)) for _ in range(tensors)]
    if len({name for name, *_ in found}) < tensors:
        raise DamagedError("two of its tensors have one name")
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**16 or alignment % 8:
        raise DamagedError(f"its alignment is {str(alignment)[:20]}")
    start = -(-header.at // alignment) * alignment
    entries = {name: _entry(name, start, *rest, values.get(_SHAPE + name)) for name, *rest in found}
    end = max((entry.start + entry.nbytes for entry in entries.values()), default=0)
    if end > size:
        raise DamagedError(f"it is damaged or incomplete: {size:,} bytes long, and its header says {end:,}")
    return entries, {name: str(value) for name, value in values.items() if _is_told(name, value)}


def _is_told(name: str, value: object) -> bool:
    """Whether a fact is kept: not the long ones, such as a vocabulary."""
    return isinstance(value, str | int | float) and len(str(value)) <= MAX_TEXT and not name.startswith("tokenizer.")


def _tensor(header: _Header) -> tuple[tuple[int, ...], int, int]:
    """A tensor's shape, kind and place, after its name."""
    axes = header.number("I")
    if axes > MAX_AXES:
        raise DamagedError(f"it holds a tensor of {axes} axes")
    shape = tuple(header.number("Q") for _ in range(axes))[::-1]
    return shape, header.number("I"), header.number("Q")


def _entry(name: str, data: int, shape: tuple[int, ...], kind: int, place: int, original: object) -> Entry:
    form = _PLAIN.get(kind) or PACKINGS.get(kind)
    if form is None:
        known = ", ".join(packing.name for packing in PACKINGS.values())
        raise DamagedError(f"{name[:80]} is of ggml's kind {kind}, and of the packed kinds {known} are read")
    total = math.prod(shape)
    if isinstance(form, torch.dtype):
        nbytes = total * form.itemsize
    elif not shape or shape[-1] % form.numbers:
        raise DamagedError(f"the rows of {name[:80]} are no whole number of blocks")
    else:
        nbytes = total // form.numbers * form.nbytes
    if isinstance(original, list):
        if math.prod(original) != total or any(type(each) is not int or each < 0 for each in original):
            raise DamagedError(f"{name[:80]} has two shapes that contradict each other")
        shape = tuple(original)
    return Entry(shape, form, data + place, nbytes)
