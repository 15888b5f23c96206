"""Stills with 16 bits a colour stay so: PNG and TIFF, read and written by others than the pack's own library."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms

from flashvideo.frames import TargetSize
from flashvideo.refiner import files
from flashvideo.refiner.files import refine_picture
from flashvideo.refiner.pictures import Picture, read_picture, write_picture
from flashvideo.refiner.run import RefineSettings

HEIGHT, WIDTH = 18, 34
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 65536, (HEIGHT, WIDTH, 3), np.uint16)
ALPHA = RNG.integers(1, 65536, (HEIGHT, WIDTH, 1), np.uint16)
KINDS = {3: 2, 4: 6, 2: 4}  # PNG's colour types by channels


def save(path: Path, pixels: np.ndarray) -> Path:
    """Write 16 bits a channel: TIFF by tifffile, PNG by hand, after its specification."""
    if path.suffix == ".tif":
        extra = {"extrasamples": ["unassalpha"]} if pixels.shape[2] == 4 else {}
        tifffile.imwrite(path, pixels, photometric="rgb", **extra)
        return path
    header = struct.pack(">2I5B", pixels.shape[1], pixels.shape[0], 16, KINDS[pixels.shape[2]], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ))  # fmt: skip
    return path


def load(path: Path) -> np.ndarray:
    """Read 16 bits a channel: TIFF by tifffile, PNG by hand with its five filters."""
    if path.suffix == ".tif":
        return tifffile.imread(path)
    data, at, packed, channels = path.read_bytes(), 8, b"", 3
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack_from(">2I2B", body)
            channels = {number: count for count, number in KINDS.items()}[colour]
            assert depth == 16
        packed += body if kind == b"IDAT" else b""
        at += 12 + length
    raw, step = zlib.decompress(packed), 2 * channels
    size, above, rows = width * step, np.zeros(width * step, int), []
    for y in range(height):
        kind, row = raw[y * (size + 1)], np.frombuffer(raw, np.uint8, size, y * (size + 1) + 1).astype(int)
        for x in range(size):
            left, corner = (row[x - step], above[x - step]) if x >= step else (0, 0)
            guess = left + above[x] - corner
            near = min((left, above[x], corner), key=lambda value: abs(guess - value))
            row[x] = (row[x] + (0, left, above[x], (left + above[x]) // 2, near)[kind]) % 256
        rows.append(row.astype(np.uint8))
        above = row
    return np.stack(rows).view(">u2").reshape(height, width, channels).astype(np.uint16)


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_every_level_comes_in_and_goes_out(ending: str, tmp_path: Path) -> None:
    picture = read_picture(save(tmp_path / f"in{ending}", COLOURS))
    assert picture.deep and picture.alpha is None
    write_picture(tmp_path / f"out{ending}", picture.pixels, picture, force=False)
    assert np.array_equal(load(tmp_path / f"out{ending}"), COLOURS)


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_transparency_keeps_its_levels_too(ending: str, tmp_path: Path) -> None:
    picture = read_picture(save(tmp_path / f"in{ending}", np.dstack([COLOURS, ALPHA])))
    whole = torch.cat([picture.pixels, picture.alpha[..., None]], dim=2)
    write_picture(tmp_path / f"out{ending}", whole, picture, force=False)
    stored = load(tmp_path / f"out{ending}")
    assert np.array_equal(stored[..., 3:], ALPHA)
    shown = stored[..., :3].astype(float) * ALPHA / 65535
    assert np.abs(shown - COLOURS.astype(float) * ALPHA / 65535).max() <= 1


def test_grey_with_alpha_becomes_colours(tmp_path: Path) -> None:
    picture = read_picture(save(tmp_path / "in.png", np.dstack([COLOURS[..., :1], ALPHA])))
    expected = COLOURS[..., :1].astype(float) * ALPHA / 65535**2
    assert np.allclose(picture.pixels.numpy(), expected.repeat(3, 2), atol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_lying_picture_stands_upright(orientation: int, tmp_path: Path) -> None:
    tag = (274, "H", 1, orientation, True)
    tifffile.imwrite(tmp_path / "in.tif", COLOURS, photometric="rgb", extratags=[tag])
    small = Image.fromarray((COLOURS >> 8).astype(np.uint8))
    exif = Image.Exif()
    exif[274] = orientation
    small.save(tmp_path / "small.png", exif=exif)  # Pillow says what upright is
    deep, eight = read_picture(tmp_path / "in.tif"), read_picture(tmp_path / "small.png")
    assert deep.deep and not eight.deep
    assert np.array_equal((deep.pixels.numpy() * 65535).round().astype(int) >> 8, eight.pixels.numpy())


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_the_colour_profile_goes_along(ending: str, tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes() + b"odd"
    picture = Picture(torch.from_numpy(COLOURS / np.float32(65535)), None, profile, deep=True)
    write_picture(tmp_path / f"out{ending}", picture.pixels, picture, force=False)
    assert np.array_equal(load(tmp_path / f"out{ending}"), COLOURS)
    with Image.open(tmp_path / f"out{ending}") as image:
        assert image.info["icc_profile"] == profile


def test_refine_keeps_the_depth_and_says_where_it_can_t(
    tiny_networks: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With frames that come back as they went in, so that what files do is seen alone."""
    monkeypatch.setattr(files, "refine_frames", lambda networks, frames, *_, **__: frames)
    source, notes = save(tmp_path / "in.png", COLOURS), []
    settings = RefineSettings(TargetSize("keep"), steps=1)
    for ending in (".tif", ".jpg"):
        refine_picture(tiny_networks, source, tmp_path / f"out{ending}", settings, note=notes.append)
    assert np.array_equal(load(tmp_path / "out.tif"), COLOURS)
    assert [note for note in notes if "16 bits" in note] == ["Its 16 bits a colour become 8: .png and .tif keep them."]
