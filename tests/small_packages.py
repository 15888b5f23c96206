"""Small packages of pictures that pip takes, and the command that fetches them."""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from flashvideo.commands.main import main

NAME, VERSION = "small-clips", "1.2"
SOURCE = f"pypi:{NAME}=={VERSION}"


def noise(seed: int, height: int = 120, width: int = 150) -> np.ndarray:
    """A picture [height, width, 3] that compression doesn't change: 30-pixel squares of random colours."""
    squares = np.random.default_rng(seed).integers(0, 256, (-(-height // 30), -(-width // 30), 3), dtype=np.uint8)
    return squares.repeat(30, 0).repeat(30, 1)[:height, :width]


def animation(frames: int, seed: int = 0, milliseconds: int = 66) -> bytes:
    """An animated WebP without loss."""
    pictures = [Image.fromarray(np.roll(noise(seed), 3 * index, axis=1)) for index in range(frames)]
    with io.BytesIO() as file:
        pictures[0].save(
            file, format="WEBP", save_all=True, append_images=pictures[1:], duration=milliseconds, lossless=True
        )
        return file.getvalue()


def still(seed: int, height: int = 120, width: int = 150) -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(noise(seed, height, width)).save(file, format="PNG")
        return file.getvalue()


def write_wheel(
    folder: Path, files: dict[str, bytes], name: str = NAME, metadata: str = "License-Expression: MIT"
) -> Path:
    """A wheel that pip takes."""
    folder.mkdir(parents=True, exist_ok=True)
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{VERSION}.dist-info"
    contents = {f"{module}/{path}": content for path, content in files.items()}
    contents[f"{info}/METADATA"] = f"Metadata-Version: 2.4\nName: {name}\nVersion: {VERSION}\n{metadata}\n".encode()
    contents[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    rows = [f"{path},sha256={_record_hash(content)},{len(content)}" for path, content in contents.items()]
    contents[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    path = folder / f"{module}-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, content in contents.items():
            wheel.writestr(member, content)
    return path


def _record_hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def fetch(*sources: str, to: Path, more: tuple[str, ...] = ()) -> int:
    words = [word for source in sources for word in ("--source", source)]
    return main(["train", "fetch", *words, "--to", str(to), *more])
