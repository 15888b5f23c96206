"""A PyTorch file's table of contents, which is a pickle: read within limits, searched for code, never run."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

MAX_PICKLE, MAX_READS = 2**20, 400_000  # of a PyTorch file's table of contents: bytes, or calls in an old file
MAX_SCANNED = 2**19  # bytes of a refused pickle that are searched for the names of code
# What a damaged PyTorch file makes torch.load raise, depending on where the damage is.
DAMAGE = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    NotImplementedError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
)


class CountedFile:
    """A file with a limited number of reads, since a damaged pickle may be read byte by byte without end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, MAX_READS
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """See BinaryIO. Raises UnpicklingError after MAX_READS."""
        self._count()
        return self._file.read(size)

    def readline(self) -> bytes:
        """See `read`."""
        self._count()
        return self._file.readline(MAX_PICKLE)

    def readinto(self, buffer: memoryview) -> int:
        """See `read`."""
        self._count()
        return self._file.readinto(buffer)

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise pickle.UnpicklingError("the table of contents is too long")


def code_in_pickle(path: Path, archive: bool) -> set[str]:
    """Names outside PyTorch's own that a pickle would import. It is disassembled, not run."""
    if not archive:
        with path.open("rb") as file:
            return set(_imports(io.BytesIO(file.read(MAX_SCANNED))))
    with suppress(*DAMAGE), zipfile.ZipFile(path) as content:
        for name in content.namelist():
            if name.endswith("data.pkl"):
                with content.open(name) as file:
                    return set(_imports(io.BytesIO(file.read(MAX_SCANNED))))
    return set()


def _imports(file: BinaryIO) -> Iterator[str]:
    strings: list[str] = []  # what STACK_GLOBAL takes its two names from
    with suppress(*DAMAGE):
        while True:  # a file of the old kind is several pickles in a row
            for opcode, argument, _ in pickletools.genops(file):
                name = ""
                if opcode.name in ("GLOBAL", "INST"):
                    name = str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    name = ".".join(strings[-2:])
                elif isinstance(argument, str):
                    strings.append(argument)
                if name and not name.startswith(("torch.", "collections.")):
                    yield name
