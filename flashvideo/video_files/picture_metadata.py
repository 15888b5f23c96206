"""What PNG, TIFF and OpenEXR files say of themselves beside their pixels; of two kinds it is carried to new files.

Layouts: the PNG Specification (W3C), and "OpenEXR File Layout" (Academy Software Foundation).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

_PNG, _EXR = b"\x89PNG\r\n\x1a\n", b"v/1\x01"
# Texts, colour, size of a pixel, camera: what holds for any pixels. Others hold for the old ones.
_COLOUR = {b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"cICP", b"pHYs"}  # of which the encoder may have written its own
_CARRIED = _COLOUR | {b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tIME", b"mDCV", b"cLLI"}
_LONGEST_HEADER = 2**24  # bytes of attributes that are searched
_SINGLE_PART = 0x1A00  # flags of files that aren't: tiles, deep data, several parts
# How the new pixels are stored: the encoder's own words.
_STORED = {
    "channels", "compression", "dataWindow", "displayWindow", "lineOrder", "screenWindowCenter", "screenWindowWidth",
    "tiles", "type", "version", "chunkCount", "preview", "dwaCompressionLevel", "pixelAspectRatio",
}  # fmt: skip
_BLOCK_ROWS = {0: 1, 1: 1, 2: 1, 3: 16}  # rows that are compressed together: none, RLE, ZIP of one, ZIP of 16
EXR_HALF, EXR_FLOAT = 16, 32  # bits a colour
_FLOAT = 2  # OpenEXR's number of this kind of pixels
_TIFF, _EXTRA_SAMPLES, _ASSOCIATED = (".tif", ".tiff"), 338, 1  # TIFF 6.0
_ICC_PROFILE, _UNDEFINED = 34675, 7  # TIFF's tag and type


def with_metadata(content: bytes, source: Path) -> bytes:
    """A picture file's bytes with what `source`, of the same kind, says of itself; unchanged for other kinds."""
    if content.startswith(_PNG):
        return _with_chunks(content, source)
    return _with_attributes(content, source) if content.startswith(_EXR) else content


def with_profile(content: bytes, profile: bytes) -> bytes:
    """The bytes of a PNG or little-endian TIFF with an ICC profile; one that is there already is replaced in a PNG."""
    if content.startswith(_PNG):
        chunks = [(kind, body) for kind, body in _chunks(content) if kind not in (b"iCCP", b"sRGB")]
        named = (b"iCCP", b"ICC Profile\0\0" + zlib.compress(profile))
        return _PNG + b"".join(_chunk(*each) for each in [chunks[0], named, *chunks[1:]])
    (at,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, at)
    entries = [content[at + 2 + 12 * index : at + 14 + 12 * index] for index in range(count)]
    even = content + bytes(len(content) % 2)  # directories begin at even places
    entries.append(struct.pack("<HHII", _ICC_PROFILE, _UNDEFINED, len(profile), len(even)))
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry))
    body = profile + bytes(len(profile) % 2)
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return even[:4] + struct.pack("<I", len(even) + len(body)) + even[8:] + body + directory


def is_premultiplied(path: Path) -> bool:
    """Whether the colours of a TIFF are multiplied by its alpha: what it calls associated. FFmpeg doesn't ask."""
    if path.suffix.lower() not in _TIFF:
        return False
    try:
        with Image.open(path) as image:
            return _ASSOCIATED in getattr(image, "tag_v2", {}).get(_EXTRA_SAMPLES, ())
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return False


def exr_depth(path: Path) -> int:
    """Bits of a colour in an OpenEXR file: 32 if a channel has them, else 16."""
    with path.open("rb") as file:
        data = file.read(_LONGEST_HEADER)
    channels = next((value for name, _, value in _attributes(data) if name == "channels"), b"")
    at = 0
    while at < len(channels) and channels[at]:
        at = channels.index(b"\0", at) + 1
        if struct.unpack_from("<i", channels, at)[0] == _FLOAT:
            return EXR_FLOAT
        at += 16
    return EXR_HALF


def _with_chunks(content: bytes, source: Path) -> bytes:
    with source.open("rb") as file:
        data = file.read()
    if not data.startswith(_PNG):
        return content
    theirs = [(kind, body) for kind, body in _chunks(data) if kind in _CARRIED]
    replaced = {kind for kind, _ in theirs} & _COLOUR
    if replaced & {b"iCCP", b"sRGB"}:
        replaced |= {b"iCCP", b"sRGB"}  # one of the two at most
    mine = [(kind, body) for kind, body in _chunks(content) if kind not in replaced]
    return _PNG + b"".join(_chunk(*each) for each in [mine[0], *theirs, *mine[1:]])  # the header comes first


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = len(_PNG)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        if len(body) == length:
            yield kind, body
        at += 12 + length


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _attributes(data: bytes) -> Iterator[tuple[str, str, bytes]]:
    """Names, types and values of an OpenEXR header; nothing of one that is damaged or has several parts."""
    if len(data) < 8 or struct.unpack_from("<I", data, 4)[0] & _SINGLE_PART:
        return
    at = 8
    while at < len(data) and data[at]:
        ends = data.find(b"\0", at), data.find(b"\0", data.find(b"\0", at) + 1)
        if min(ends) < 0 or ends[1] + 5 > len(data):
            return
        size = struct.unpack_from("<I", data, ends[1] + 1)[0]
        begin = ends[1] + 5
        name, kind = (part.decode("latin-1") for part in data[at : ends[1]].split(b"\0"))
        yield name, kind, data[begin : begin + size]
        at = begin + size


def _with_attributes(content: bytes, source: Path) -> bytes:
    with source.open("rb") as file:
        data = file.read(_LONGEST_HEADER)
    mine = list(_attributes(content))
    known = {name for name, _, _ in mine} | _STORED
    added = b"".join(
        name.encode("latin-1") + b"\0" + kind.encode("latin-1") + b"\0" + struct.pack("<I", len(value)) + value
        for name, kind, value in _attributes(data)
        if name not in known and len(name) < 32  # longer names need a flag that the encoder hasn't set
    )
    if not added:
        return content
    end = 8 + sum(len(name) + len(kind) + 2 + 4 + len(value) for name, kind, value in mine)
    values = {name: value for name, _, value in mine}
    _, top, _, bottom = struct.unpack("<4i", values["dataWindow"])
    blocks = -(-(bottom - top + 1) // _BLOCK_ROWS[values["compression"][0]])
    table = struct.unpack_from(f"<{blocks}Q", content, end + 1)  # the blocks' places in the file
    moved = struct.pack(f"<{blocks}Q", *(place + len(added) for place in table))
    return content[:end] + added + b"\0" + moved + content[end + 1 + len(moved) :]
