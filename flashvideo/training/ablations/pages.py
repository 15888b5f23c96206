"""Pictures of a measured table: the same piece of the same frame by every row, and whole frames of the acceptance."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..loop.checkpointing import write_whole
from .results import Row, TableResult

CELL = 224  # width of a piece on the page, in pixels
WHOLE = 448  # width of a whole frame
PIECE = 112  # width of a piece in the frame
COLUMNS = 5
WHOLE_COLUMNS = 3
LABEL, GAP = 14, 4
INK, PAPER = (30, 30, 30), (255, 255, 255)
JPEG_QUALITY = 88

Box = tuple[float, float, float, float]  # left, top, right, bottom, as parts of the picture


def save_page(table: TableResult, path: Path, *, whole: bool) -> bool:
    """Draw the rows that are to be shown; returns False if there is nothing to see."""
    rows = [row for label in table.shown for row in table.rows if row.label == label]
    blocks = [block for clip in shown_clips(table, rows) for block in _blocks(clip, rows, whole=whole)]
    if not blocks:
        return False
    page = _grid(blocks, 1)
    write_whole(path, lambda file: page.save(file, "JPEG", quality=JPEG_QUALITY))
    return True


def save_sheets(table: TableResult, folder: Path) -> None:
    """Write a page for each real clip: its middle frame by every shown row, whole and at the busiest piece."""
    rows = [row for label in table.shown for row in table.rows if row.label == label]
    for clip in table.real:
        page = _grid(_blocks(clip, rows, whole=True), 1)
        path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', clip)}.jpg"
        write_whole(path, lambda file, page=page: page.save(file, "JPEG", quality=JPEG_QUALITY))


def _blocks(clip: str, rows: Sequence[Row], *, whole: bool) -> list[Image.Image]:
    """What a page shows of one clip."""
    pictures = [(row.label, Image.open(row.pictures[clip]).convert("RGB")) for row in rows]
    blocks = []
    if whole:
        cells = [_cell(label, picture, WHOLE) for label, picture in pictures]
        blocks.append(_titled(f"{clip}: whole frames", _grid(cells, WHOLE_COLUMNS)))
    box = busiest(pictures[0][1])
    cells = [_cell(label, _piece(picture, box), CELL) for label, picture in pictures]
    return [*blocks, _titled(f"{clip}: the piece with the most detail", _grid(cells, COLUMNS))]


def shown_clips(table: TableResult, rows: Sequence[Row]) -> list[str]:
    """The first two procedural clips that all rows have a picture of; real footage is not ours to show."""
    return [name for name in table.procedural if rows and all(name in row.pictures for row in rows)][:2]


def busiest(picture: Image.Image) -> Box:
    """The piece with the most detail, PIECE wide and of the picture's shape; a small picture whole."""
    width, height = picture.size
    if width <= PIECE:
        return 0.0, 0.0, 1.0, 1.0
    wide, tall = PIECE, round(PIECE * height / width)
    luma = np.asarray(picture.convert("L"), dtype=np.float64)
    energy = np.square(np.diff(luma, axis=0))[:, :-1] + np.square(np.diff(luma, axis=1))[:-1]
    sums = np.pad(energy.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    tall_in, wide_in = min(tall, energy.shape[0]), min(wide, energy.shape[1])
    columns = sums[:, wide_in:] - sums[:, :-wide_in]
    inside = columns[tall_in:] - columns[:-tall_in]
    top, left = np.unravel_index(inside.argmax(), inside.shape)
    return left / width, top / height, (left + wide) / width, (top + tall) / height


def _piece(picture: Image.Image, box: Box) -> Image.Image:
    width, height = picture.size
    left, top, right, bottom = box
    return picture.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))


def _cell(label: str, picture: Image.Image, width: int) -> Image.Image:
    """A picture at a width, below its label; a whole multiple shows the pixels as they are."""
    whole = width % picture.width == 0
    size = width, round(width * picture.height / picture.width)
    return _titled(label, picture.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.BICUBIC))


def _titled(title: str, picture: Image.Image) -> Image.Image:
    page = Image.new("RGB", (picture.width, picture.height + LABEL), PAPER)
    ImageDraw.Draw(page).text((2, 1), title, fill=INK)
    page.paste(picture, (0, LABEL))
    return page


def _grid(cells: Sequence[Image.Image], columns: int) -> Image.Image:
    width = max(cell.width for cell in cells) + GAP
    height = max(cell.height for cell in cells) + GAP
    if columns == 1:  # cells of any height, one below the other
        tops = np.cumsum([0, *(cell.height + GAP for cell in cells)]).tolist()
        page = Image.new("RGB", (width, tops[-1]), PAPER)
        for cell, top in zip(cells, tops, strict=False):
            page.paste(cell, (0, top))
        return page
    rows = -(-len(cells) // columns)
    page = Image.new("RGB", (width * min(columns, len(cells)), height * rows), PAPER)
    for index, cell in enumerate(cells):
        page.paste(cell, (index % columns * width, index // columns * height))
    return page
