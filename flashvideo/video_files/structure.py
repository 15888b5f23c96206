"""Whether the parts of a media file follow each other without a break, from its first byte to its last.

FFmpeg passes over what it doesn't understand without a word. This shows whether a gap in the times of the pictures is
damage, or was recorded that way. Layouts: RFC 8794 and 9559 (Matroska), ISO 14496-12 (MP4), ISO 13818-1 (transport
streams), Adobe's Video File Format Specification 10.1 (FLV), and OpenDML (AVI).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

_HEADER, _SEGMENT = 0x1A45DFA3, 0x18538067  # of Matroska
_ENTERED = {_SEGMENT, 0x1F43B675, 0xA0}  # with clusters and block groups: what is in them is checked
_BLOCKS = {0xA3, 0xA1}
_TRACKS, _TRACK, _TRACK_NUMBER = 0x1654AE6B, 0xAE, 0xD7
_SKIPPED = {
    _HEADER, 0x114D9B74, 0x1549A966, _TRACKS, 0x1C53BB6B, 0x1043A770, 0x1254C367, 0x1941A469, 0xEC, 0xBF,  # segment
    0xE7, 0x5854, 0xA7, 0xAB, 0xAF,  # cluster
    0x75A1, 0x9B, 0xFA, 0xFB, 0xFD, 0xA4, 0x75A2, 0x8E, 0xA2, 0xC8,  # block group
}  # fmt: skip
_LARGEST_TRACKS = 2**20  # bytes of Matroska's table of tracks
_LONGEST = 8  # bytes of a number in Matroska; a damaged size may say more than there is memory
_UNKNOWN = -1  # size of a part that lasts until the next one of its kind
_FLV_TAGS = 8, 9, 18  # sound, pictures, data
_PACKET, _SYNC = 188, 0x47  # of transport streams
_STAMPED = _PACKET + 4  # of those from cameras: each packet has a time before it
_READ = 8192  # packets at a time
_PAYLOAD, _EXTENDED, _NULL_PID = 0x10, 0x20, 0x1FFF
_STARTS = 0x40  # flag of a packet in which a picture or sound begins, or a table


def is_broken(path: Path, format_name: str) -> bool:
    """Whether a file's parts don't follow each other, or its end is missing; False for kinds not known here.

    `format_name` is FFmpeg's. Reads headers only, of transport streams the whole file. Raises OSError.
    """
    for name, check in _CHECKS.items():
        if name in format_name.split(","):
            with path.open("rb") as file:
                return check(file, file.seek(0, os.SEEK_END))
    return False


def is_cut_off(path: Path, format_name: str) -> bool:
    """Whether a file is shorter than its header, or a transport stream than its packets. Raises OSError."""
    end = path.stat().st_size
    with path.open("rb") as file:
        if "mpegts" in format_name:
            return end % _packet_length(file) > 0
        if "matroska" not in format_name:
            return False
        element, at = _element(file, 0)
        while element == _HEADER:
            size, at = _size(file, at)
            element, at = _element(file, at + size)
        size, at = _size(file, at)
        return element == _SEGMENT and size != _UNKNOWN and end < at + size


def _matroska(file: BinaryIO, end: int) -> bool:
    numbers: set[int] = set()
    at = 0
    while at < end:
        element, at = _element(file, at)
        size, at = _size(file, at)
        if element in _ENTERED:
            continue
        if size == _UNKNOWN or element not in _SKIPPED | _BLOCKS:
            return True
        if element == _TRACKS:
            numbers = _track_numbers(file, at, min(size, _LARGEST_TRACKS, end - at))
        if element in _BLOCKS and _size(file, at)[0] not in numbers:
            return True
        at += size
    return at != end


def _track_numbers(file: BinaryIO, at: int, length: int) -> set[int]:
    numbers, end = set(), at + length
    while at < end:
        element, at = _element(file, at)
        size, at = _size(file, at)
        if element == _TRACK:
            continue
        if not element:
            break
        if element == _TRACK_NUMBER:
            file.seek(at)
            numbers.add(int.from_bytes(file.read(min(max(size, 0), _LONGEST)), "big"))
        at += max(size, 0)
    return numbers


def _element(file: BinaryIO, at: int) -> tuple[int, int]:
    """An element's identity at a place, 0 where none is; and where its size is."""
    file.seek(at)
    first = file.read(1)
    length = 9 - first[0].bit_length() if first else 0
    if not 1 <= length <= 4:
        return 0, at + 1
    return int.from_bytes(first + file.read(length - 1), "big"), at + length


def _size(file: BinaryIO, at: int) -> tuple[int, int]:
    """A number of variable length at a place, `_UNKNOWN` for the one that says so; and where it ends."""
    file.seek(at)
    first = file.read(1)
    length = 9 - first[0].bit_length() if first else 9
    if length > 8:
        return _UNKNOWN, at + 1
    most = (1 << 7 * length) - 1
    size = int.from_bytes(first + file.read(length - 1), "big") & most
    return _UNKNOWN if size == most else size, at + length


def _boxes(file: BinaryIO, end: int) -> bool:
    """MP4: boxes of the uppermost level."""
    at = 0
    while at < end:
        file.seek(at)
        head = file.read(16)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if size == 1:
            size = int.from_bytes(head[8:], "big")
        elif size == 0:  # to the end
            size = end - at
        if size < 8 or not kind.isascii():
            return True
        at += size
    return at != end


def _flv(file: BinaryIO, end: int) -> bool:
    """Tags, each with its length before and after it."""
    file.seek(5)
    at = int.from_bytes(file.read(4), "big") + 4
    while at < end:
        file.seek(at)
        head = file.read(11)
        size = int.from_bytes(head[1:4], "big") + 11
        file.seek(at + size)
        if head[0] & 31 not in _FLV_TAGS or any(head[8:]) or int.from_bytes(file.read(4), "big") != size:
            return True
        at += size + 4
    return at != end


def _avi(file: BinaryIO, end: int) -> bool:
    """Chunks, those in lists included."""
    at = 0
    while at + 8 <= end:
        file.seek(at)
        head = file.read(12)
        if not head[:4].isalnum() and not head[:4].strip().isascii():
            return True
        inside = head[:4] in (b"RIFF", b"LIST") and head[8:] in (b"AVI ", b"AVIX", b"movi", b"rec ")
        size = int.from_bytes(head[4:8], "little")
        at += 12 if inside else 8 + size + size % 2
    return at > end + 1


def _transport(file: BinaryIO, end: int) -> bool:
    """Packets, numbered by 0 to 15 for each of the streams in them."""
    length, before = _packet_length(file), {}
    if end % length:
        return True
    file.seek(0)
    while data := file.read(_READ * length):
        packets = np.frombuffer(data, np.uint8).reshape(-1, length)[:, length - _PACKET :]
        if (packets[:, 0] != _SYNC).any() or (packets[:, 1] & 0x80).any():
            return True
        streams = (packets[:, 1].astype(int) & 0x1F) << 8 | packets[:, 2]
        for stream in np.unique(streams[streams != _NULL_PID]):
            mine = packets[(streams == stream) & (packets[:, 3] & _PAYLOAD > 0)]
            if _has_gap(before.get(stream, mine[:1]), mine) or _has_odd_start(mine):
                return True
            before[stream] = mine[-1:]
    return False


def _has_gap(before: np.ndarray, packets: np.ndarray) -> bool:
    """Whether packets [n, 188] of one stream, which follow `before`, aren't numbered one after the other."""
    counted = np.concatenate([before, packets])[:, 3].astype(int) & 15
    restarts = (packets[:, 3] & _EXTENDED > 0) & (packets[:, 4] > 0) & (packets[:, 5] & 0x80 > 0)
    return bool((np.diff(counted) % 16 > 1)[~restarts[: len(counted) - 1]].any())  # 0: the same packet once more


def _has_odd_start(packets: np.ndarray) -> bool:
    """Whether some pictures or sounds of a stream begin as such, and some don't."""
    starts = packets[packets[:, 1] & _STARTS > 0]
    begin = 4 + np.where(starts[:, 3] & _EXTENDED, starts[:, 4].astype(int) + 1, 0)
    places = np.minimum(begin[:, None] + np.arange(3), _PACKET - 1)
    known = (np.take_along_axis(starts, places, 1) == (0, 0, 1)).all(1)
    return bool(known.any() and not known.all())


def _packet_length(file: BinaryIO) -> int:
    file.seek(0)
    return _PACKET if file.read(1) == bytes([_SYNC]) else _STAMPED


_CHECKS: dict[str, Callable[[BinaryIO, int], bool]] = {
    "matroska": _matroska,
    "mov": _boxes,
    "flv": _flv,
    "avi": _avi,
    "mpegts": _transport,
}
