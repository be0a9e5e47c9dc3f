"""Find the tissue on the glass of a slide in colour, before its first block, from a low level of its pyramid.

Glass is bright, and stains take more of some colours than of others.  Each pixel is divided by the colour of the glass,
which gives the share of light that passes in each channel.  Where these shares differ there is a stain; dust, hairs,
shadows and bubbles darken all channels alike.  What is black is padding of the scanner.  Neutral darkness counts as
tissue only over an area that no grain of dust covers.  JPEG takes the colour of small things in a low level, so specks
that are dark there are looked at again in the processed level.

Slides on a dark ground, without stains or without glass are not judged: all of them may be tissue.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.geometry import Box, Lattice, count_in_spans
from cellseg_batch.engine.inference.normalise import sample_slide
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Slide

CELL = 32
"""Side in px of the processed level of the squares that are tissue or glass."""

# Side in px of the processed level of the smallest squares that are judged: a nucleus fills a good part of one.
_SPECK = 8
# Specks along a cell's side.
_SPECKS = CELL // _SPECK
# Side in cells of the squares whose darkness counts, and of the ring that is added around what is found.
_AREA, _RING = 4, 2
# Differences between the shares of light of two channels: of a speck, and of a cell.  On glass with JPEG noise they
# reach 0.02 and 0.01, beside dust 0.07 and 0.01; a nucleus of 8 px that two specks share has 0.1, pale stroma 0.05.
_STAINED, _PALE = 0.08, 0.025
# Share of light that an area of neutral darkness takes, and that a speck takes of some colour if it may be a nucleus.
_DARK, _DIM = 0.2, 0.08
# Largest share of white that is black.
_BLACK = 0.04
# Glass: smallest share of white, largest difference between two channels, smallest share of a slide's pixels.
_BRIGHT, _NEUTRAL, _SEEN = 0.7, 0.12, 0.01
# Share of white that half of a bright slide's pixels have at least, but for black ones.
_GROUND = 0.4
# Share of pixels darker than glass that may be dust; of more, half at least are stained, in which the channels
# differ by this share of the light that is taken.
_DUST, _STAIN = 0.002, 0.2
# Number of pixels of which about as many or more show the colour of the glass.
_ENOUGH_PIXELS = 1 << 18
# A plane of up to this many pixels is looked at as it is.
_FEW_PIXELS = 1 << 24
# Side in px of the windows of the level that are read at a time.
_WINDOW = 2048
# Dtype that holds the sum of a speck of unsigned values of that many bytes.
_SUMS: dict[int, DTypeLike] = {1: np.uint16, 2: np.uint32}
# Side in cells of the windows of the processed level that are read beside a low level.
_DETAIL = 16
# Number of them, on each axis, by which the two levels are compared.
_CHECKS = 8

Cells = NDArray[np.bool_]


@dataclass(frozen=True)
class Tissue:
    """The tissue of a slide, the same for all of its planes.

    Attributes:
        level: level that was looked at.
        cells: (rows, columns) of cells of the processed level, laid from its corner; the last may stick out of it.
    """

    level: int
    cells: Cells

    def tiles(self, lattice: Lattice) -> Cells:
        """Whether the core of each tile, (rows, columns), shares pixels with tissue."""
        spans = []
        for axis, (count, core) in enumerate(zip(lattice.grid, lattice.core, strict=True)):
            starts = np.arange(count) * core
            stops = np.minimum(starts + core, lattice.shape[axis])
            spans.append((starts // CELL, -(-stops // CELL)))
        return count_in_spans(self.cells, *spans) > 0

    def cost(self, lattice: Lattice) -> float:
        """Number of pixels that the network computes for the tissue of a plane; of one tile where there is none."""
        return max(1, int(self.tiles(lattice).sum())) * math.prod(lattice.tile)

    def area(self, shape: tuple[int, int]) -> int:
        """Number of px of tissue in a plane of ``shape`` (height, width)."""
        heights, widths = (np.diff(np.minimum(np.arange(0, side + CELL, CELL), side)) for side in shape)
        return int(heights @ self.cells @ widths)


def may_have_glass(slide: Slide) -> bool:
    """Whether a slide is one in colour, by its metadata."""
    return slide.rgb and slide.extent("c", 0) >= 3


def look_level(slide: Slide, level: int) -> int:
    """The level from which tissue is found in ``level``: the lowest that shows nuclei, or ``level`` itself.

    A pixel of it is at most a speck, and it has the proportions and planes of ``level``.
    """
    shape = slide.plane_shape(level)
    found = level
    if shape[0] * shape[1] <= _FEW_PIXELS:
        return found
    for lower in range(level + 1, len(slide.levels)):
        factors = [long / short for long, short in zip(shape, slide.plane_shape(lower), strict=True)]
        fits = abs(factors[0] / factors[1] - 1) * max(slide.plane_shape(lower)) <= 2
        if max(factors) <= _SPECK and fits and slide.planes(lower) == slide.planes(level):
            found = lower
    return found


def find_tissue(reader: SlideReader) -> Tissue | None:
    """Find the tissue in the level of a reader; None if all of the slide may be tissue.

    A low level that shows something else than the level itself is not believed.
    """
    slide, level = reader.slide, reader.level
    if not may_have_glass(slide):
        return None
    coloured = reader.of_channels((0, 1, 2))
    try:
        glass = settle_glass(sample_slide(coloured))
    except ReadError:  # whose pixels cannot be read: so say its blocks
        return None
    if glass is None:
        return None
    lower = look_level(slide, level)
    if lower != level:
        with suppress(ReadError), SlideReader(slide, lower, coloured.channels) as low:
            cells, dim = _look(low, slide.plane_shape(level), glass)
            _look_again(coloured, cells, dim & ~_grown(cells), glass)
            if _agrees(coloured, cells, glass):
                return Tissue(lower, _grown(cells))
    cells, _ = _look(coloured, slide.plane_shape(level), glass)
    return Tissue(level, _grown(cells))


def settle_glass(sample: list[NDArray[Any]]) -> NDArray[np.float32] | None:
    """The colour (3,) of the glass of a slide, of which ``sample`` has parts (3, h, w).

    Returns:
        None if no glass shows, the ground is dark, or what lies on it is not stained.
    """
    parts = [part.reshape(3, -1) for part in sample]
    step = sum(part.shape[1] for part in parts) // _ENOUGH_PIXELS | 1
    values = np.concatenate([part[:, ::step] for part in parts], axis=1).astype(np.float32)
    values = values[:, np.isfinite(values).all(axis=0)]
    white = float(np.percentile(values, 99.9)) if values.size else 0.0
    if not white > 0:
        return None
    shades = values / white
    lightest, darkest = shades.max(axis=0), shades.min(axis=0)
    is_lit = lightest > _BLACK
    is_glass = (darkest > _BRIGHT) & (lightest - darkest < _NEUTRAL)
    if is_glass[is_lit].mean() < _SEEN or np.median(shades[:, is_lit].mean(axis=0)) < _GROUND:
        return None
    glass = np.array([_commonest(channel[is_glass]) for channel in values], np.float32)
    passed = np.minimum(values[:, is_lit] / glass[:, None], 1)
    taken = 1 - passed.min(axis=0)
    is_dim = taken > _DIM
    if is_dim.mean() > _DUST and np.median(_colour(passed[:, is_dim]) / taken[is_dim]) < _STAIN:
        return None
    return glass


def _commonest(values: NDArray[np.float32]) -> float:
    """The mean of the values in the fullest bin of a histogram, whose bins are as wide as a step of a byte."""
    counts, edges = np.histogram(values, bins=128)
    fullest = int(np.argmax(counts))
    return float(values[(values >= edges[fullest]) & (values <= edges[fullest + 1])].mean())


def _colour(passed: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest difference between the shares of light of two channels, along the first axis."""
    difference: NDArray[np.float32] = passed.max(axis=0) - passed.min(axis=0)
    return difference


def _look(reader: SlideReader, shape: tuple[int, int], glass: NDArray[np.float32]) -> tuple[Cells, Cells]:
    """Where any plane of the reader's level shows tissue, and where something dark that may be a nucleus.

    A window that cannot be read counts as tissue.

    Args:
        reader: reader of the level.
        shape: (height, width) of the processed level in px, whose cells are judged.
        glass: colour of the glass.
    """
    rows, columns = (-(-side // CELL) for side in shape)
    cells, dim = np.zeros((2, rows, columns), np.bool_)
    factor = shape[0] / reader.slide.plane_shape(reader.level)[0]
    side = max(1, int(_WINDOW * factor) // (CELL * _AREA)) * _AREA
    corners = product(range(0, rows, side), range(0, columns, side))
    windows = [Box(y, x, min(y + side, rows), min(x + side, columns)) for y, x in corners]
    for plane in range(reader.slide.planes(reader.level)):
        for window in windows:
            seen, seen_dim = _judge(reader, plane, window, shape, glass)
            cells[window.slices()] |= seen
            dim[window.slices()] |= seen_dim
    return cells, dim


def _look_again(reader: SlideReader, cells: Cells, doubtful: Cells, glass: NDArray[np.float32]) -> None:
    """Add to ``cells`` what windows of the processed level with doubtful cells show."""
    corners = np.argwhere(doubtful) // _DETAIL * _DETAIL
    for y, x in np.unique(corners, axis=0).tolist():
        window = Box(y, x, min(y + _DETAIL, cells.shape[0]), min(x + _DETAIL, cells.shape[1]))
        for plane in range(reader.slide.planes(reader.level)):
            cells[window.slices()] |= _judge(reader, plane, window, reader.slide.plane_shape(reader.level), glass)[0]


def _judge(
    reader: SlideReader, plane: int, window: Box, shape: tuple[int, int], glass: NDArray[np.float32]
) -> tuple[Cells, Cells]:
    """Where a window of cells shows tissue, and where something dark, in one plane; as `_look`."""
    height, width = reader.slide.plane_shape(reader.level)
    rows = _starts(window.y0, window.y1, shape[0], height)
    columns = _starts(window.x0, window.x1, shape[1], width)
    box = Box(int(rows[0]), int(columns[0]), int(rows[-1]), int(columns[-1]))
    try:
        pixels = reader.decode(plane, box)
    except ReadError:
        return np.ones(window.shape, np.bool_), np.zeros(window.shape, np.bool_)
    specks = _means(pixels, rows - rows[0], columns - columns[0])
    passed = np.minimum(specks / glass[:, None, None], 1)
    passed[:, specks.max(axis=0) < _BLACK * glass.max()] = 1
    in_cells, in_areas = (_means(passed, *_groups(passed.shape[1:], count)) for count in (_SPECKS, _SPECKS * _AREA))
    # A pixel that is no number is in no order, so it counts as tissue.
    dark = ~(in_areas.max(axis=0) >= 1 - _DARK)
    dark = dark.repeat(_AREA, axis=0).repeat(_AREA, axis=1)[: window.shape[0], : window.shape[1]]
    tissue = _any_in_cells(~(_colour(passed) <= _STAINED)) | ~(_colour(in_cells) <= _PALE) | dark
    return tissue, _any_in_cells(passed.min(axis=0) < 1 - _DIM)


def _any_in_cells(specks: Cells) -> Cells:
    """Whether any speck of each cell is true."""
    for axis in (0, 1):
        specks = np.logical_or.reduceat(specks, np.arange(0, specks.shape[axis], _SPECKS), axis=axis)
    return specks


def _starts(first: int, last: int, side: int, low: int) -> NDArray[np.int64]:
    """The first pixel of every speck of some cells along an axis, and where the last one ends.

    Args:
        first, last: the cells, half-open.
        side: length of the axis in the processed level, in px.
        low: its length in the level that is looked at.
    """
    count = -(-min(last * CELL, side) // _SPECK) - first * _SPECKS
    edges = np.minimum((first * _SPECKS + np.arange(count + 1)) * _SPECK, side)
    # A pixel belongs to the speck that holds its centre.
    return np.ceil(edges * (low / side) - 0.5).astype(np.int64)


def _groups(shape: tuple[int, int], count: int) -> Iterator[NDArray[np.int64]]:
    """Where groups of ``count`` start along each axis, and where the last one ends."""
    return (np.append(np.arange(0, length, count), length) for length in shape)


def _means(values: NDArray[Any], rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
    """Means of groups of values (C, h, w): from each start to the next one; a group of none has the value there."""
    dtype = _SUMS.get(values.itemsize, np.float32) if values.dtype.kind == "u" else np.float32
    sums = values
    for axis, starts in ((1, rows), (2, columns)):
        sums = _sums(sums.swapaxes(0, axis), starts, dtype).swapaxes(0, axis)
    counts = np.maximum(np.diff(rows), 1)[:, None] * np.maximum(np.diff(columns), 1)
    means: NDArray[np.float32] = np.divide(sums, counts, dtype=np.float32)
    return means


def _sums(values: NDArray[Any], starts: NDArray[np.int64], dtype: DTypeLike) -> NDArray[Any]:
    """Sums of groups along the first axis, as `_means`."""
    length, count = int(starts[1] - starts[0]), len(starts) - 1
    is_other = np.diff(starts) != length
    whole = int(is_other.argmax()) if is_other.any() else count
    sums = values[: whole * length : length].astype(dtype)  # numpy adds slices many times as fast as it sums groups
    for offset in range(1, length):
        np.add(sums, values[offset : whole * length : length], out=sums)
    if whole < count:
        first = min(int(starts[whole]), len(values) - 1)
        others = np.minimum(starts[whole:-1] - first, len(values) - 1 - first)
        sums = np.concatenate([sums, np.add.reduceat(values[first:], others, axis=0, dtype=dtype)])
    return sums


def _grown(cells: Cells) -> Cells:
    """The cells with a ring around them: an object may reach beyond what shows it."""
    for axis in (0, 1):
        length = cells.shape[axis]
        wide = np.pad(cells, [(_RING, _RING) if axis == along else (0, 0) for along in (0, 1)])
        shifted = [wide.take(range(start, start + length), axis) for start in range(2 * _RING + 1)]
        cells = np.logical_or.reduce(shifted)
    return cells


def _agrees(reader: SlideReader, cells: Cells, glass: NDArray[np.float32]) -> bool:
    """Whether windows of the processed level show tissue where, and only where, a low level does.

    Some are spread over the slide, others lie where the low level shows tissue.
    """
    shown = np.argwhere(cells)
    if not len(shown):
        return False
    shape, plane = reader.slide.plane_shape(reader.level), reader.slide.planes(reader.level) // 2
    grown, found, missed, confirmed = _grown(cells), 0, 0, 0
    rows, columns = (np.linspace(0, length, _CHECKS, endpoint=False).astype(int).tolist() for length in cells.shape)
    chosen = shown[np.linspace(0, len(shown) - 1, 2 * _CHECKS).astype(int)].tolist()
    for number, (y, x) in enumerate([*chosen, *product(rows, columns)]):
        window = Box(y, x, min(y + _DETAIL, cells.shape[0]), min(x + _DETAIL, cells.shape[1]))
        seen, _ = _judge(reader, plane, window, shape, glass)
        found += int(seen.sum())
        missed += int((seen & ~grown[window.slices()]).sum())
        confirmed += number < len(chosen) and bool(seen[0, 0])
    return missed <= _DETAIL + found // 50 and 2 * confirmed >= len(chosen)
