"""Lay the lattice of tiles over a slide and group its cores into blocks: pure integer arithmetic, all in pixels.

Coordinates are (y, x) in px of the processed level, half-open.  Along one axis of a slide:

    slide       |.......................................|
    cores       |---------|---------|---------|---------|--     laid from 0, the last may stick out
    tile     <==|---------|==>                                  a core and a margin on either side
    block       |-------------------|                           k cores, what one task computes and writes
    read box |..|-------------------|..|                        what the task reads, clipped to the slide

Pixels outside the slide are its own pixels, mirrored at its edges as often as needed (numpy's ``reflect``).  The
lattice depends on the slide's shape, the tile target, the margin, the network's stride and whether tiles are squares,
never on blocks, batches or workers; so results do not depend on these either.  This module must not know files or
models.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.errors import UsageError

# A lattice may compute this many times the least number of pixels, for squarer tiles or for larger ones.
_SLACK = 1.025
# Target side of an output's chunks in px.
_CHUNK = 512


@dataclass(frozen=True)
class Box:
    """Half-open rectangle: rows ``y0 <= y < y1``, columns ``x0 <= x < x1``."""

    y0: int
    x0: int
    y1: int
    x1: int

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)."""
        return self.y1 - self.y0, self.x1 - self.x0

    @property
    def area(self) -> int:
        """Number of pixels."""
        return (self.y1 - self.y0) * (self.x1 - self.x0)

    def shifted(self, by: tuple[int, int]) -> Box:
        """The box moved by (y, x) px."""
        return Box(self.y0 + by[0], self.x0 + by[1], self.y1 + by[0], self.x1 + by[1])

    def grown(self, margin: int) -> Box:
        """The box with ``margin`` px more on every side."""
        return Box(self.y0 - margin, self.x0 - margin, self.y1 + margin, self.x1 + margin)

    def within(self, other: Box) -> Box:
        """The part of the box that lies in ``other``; empty where they do not meet."""
        y0, x0 = max(self.y0, other.y0), max(self.x0, other.x0)
        return Box(y0, x0, max(y0, min(self.y1, other.y1)), max(x0, min(self.x1, other.x1)))

    def seen_from(self, other: Box) -> Box:
        """The box in coordinates of ``other``, whose first corner becomes (0, 0)."""
        return Box(self.y0 - other.y0, self.x0 - other.x0, self.y1 - other.y0, self.x1 - other.x0)

    def slices(self) -> tuple[slice[int, int, None], slice[int, int, None]]:
        """The box as an index into an array with axes (y, x)."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)


def reflect(start: int, stop: int, length: int) -> NDArray[np.int64]:
    """Source index of each position in [start, stop) of an axis of ``length`` px that is mirrored at its edges.

    The indices are those of ``numpy.pad(..., mode="reflect")``, mirrored as often as needed; an axis of one pixel
    repeats that pixel.

    Returns:
        (stop - start,) int64.
    """
    if length == 1:
        return np.zeros(stop - start, np.int64)
    period = 2 * (length - 1)
    position = np.arange(start, stop, dtype=np.int64) % period
    return np.minimum(position, period - position)


def source_box(frame: Box, shape: tuple[int, int]) -> Box:
    """The smallest box of a slide of ``shape`` (height, width) that holds all pixels of ``frame``, mirrored or not."""
    rows, columns = reflect(frame.y0, frame.y1, shape[0]), reflect(frame.x0, frame.x1, shape[1])
    return Box(int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1)


@dataclass(frozen=True)
class Tile:
    """One tile of a lattice.

    Attributes:
        frame: the box that the network sees; it may lie partly outside the slide.
        core: the box whose pixels the tile decides, clipped to the slide.
    """

    frame: Box
    core: Box


@dataclass(frozen=True)
class Lattice:
    """Tile cores laid over a slide from its origin.

    Attributes:
        shape: (height, width) of the slide's level.
        core: (height, width) of a core in px, multiples of the network's total stride.
        margin: px of context cut from each side of a tile, a multiple of the total stride.
    """

    shape: tuple[int, int]
    core: tuple[int, int]
    margin: int

    @property
    def tile(self) -> tuple[int, int]:
        """(height, width) of a whole tile."""
        return self.core[0] + 2 * self.margin, self.core[1] + 2 * self.margin

    @property
    def grid(self) -> tuple[int, int]:
        """Number of cores along y and x."""
        return -(-self.shape[0] // self.core[0]), -(-self.shape[1] // self.core[1])

    @property
    def overlap(self) -> int:
        """Width in px of the blended strip between neighbouring tiles: a power of two up to 64; 0 for no margin."""
        return 1 << min(2 * self.margin, *self.core, 64).bit_length() - 1 if self.margin else 0

    def tile_at(self, row: int, column: int) -> Tile:
        """The tile of core (row, column) of the grid."""
        y, x = row * self.core[0], column * self.core[1]
        height, width = self.shape
        return Tile(
            frame=Box(y - self.margin, x - self.margin, y - self.margin + self.tile[0], x - self.margin + self.tile[1]),
            core=Box(y, x, min(y + self.core[0], height), min(x + self.core[1], width)),
        )

    @property
    def cost(self) -> float:
        """Number of pixels that the network computes per pixel of the slide."""
        computed = self.grid[0] * self.grid[1] * self.tile[0] * self.tile[1]
        return computed / (self.shape[0] * self.shape[1])


def fit_lattice(shape: tuple[int, int], tile: int, margin: int, total_stride: int, least: int = 0) -> Lattice:
    """Choose a lattice of equal tiles of at most ``tile`` x ``tile`` px in area, with little waste on margins.

    The network's memory grows with a tile's area and not with its sides, so tiles of 1216 x 2288 px are taken where
    squares would waste more on margins.  Of all lattices with nearly the least cost, the one with the shortest longer
    side is chosen: fewer of its tiles lie across the edge of empty regions.

    Args:
        shape: (height, width) of the slide's level in px.
        tile: side in px of the square that no tile exceeds in area.
        margin: px of context cut from each side of a tile.
        total_stride: px; the network takes multiples of it.
        least: side in px of the smallest tile that the network takes.

    Raises:
        UsageError: margin is no multiple of the stride, or leaves no core in the tile.
    """
    smallest = _smallest_core(tile, margin, total_stride, least)

    def fit(length: int, count: int) -> int:
        """Side in px of the smallest core of which ``count`` cover ``length`` px."""
        return max(smallest, -(-length // (count * total_stride)) * total_stride)

    height, width = shape
    fitted = []
    # The tile's area bounds the number of cores to try, however long the slide is.
    tallest = min(fit(height, 1), tile**2 // (2 * margin + smallest))
    for core in range(smallest, tallest + 1, total_stride):
        if core != fit(height, -(-height // core)):
            continue  # a smaller core makes as many rows
        widest = (tile**2 // (core + 2 * margin) - 2 * margin) // total_stride * total_stride
        if widest >= smallest:
            fewest = -(-width // widest)
            fitted += [Lattice(shape, (core, fit(width, columns)), margin) for columns in (fewest, fewest + 1)]
    good = nearly_cheapest(fitted)
    # Of two equally good lattices take the one with wider cores: their rows are longer runs of memory.
    return min(good, key=lambda lattice: (max(lattice.tile), lattice.cost, lattice.core[0]))


def fit_squares(shape: tuple[int, int], tile: int, margin: int, total_stride: int, least: int = 0) -> Lattice:
    """Choose one of `square_lattices`: of those with nearly the least cost, the one of the largest tiles.

    Arguments and errors as `fit_lattice`.
    """
    return nearly_cheapest(square_lattices(shape, tile, margin, total_stride, least))[0]


def square_lattices(shape: tuple[int, int], tile: int, margin: int, total_stride: int, least: int = 0) -> list[Lattice]:
    """The lattices of square tiles whose side is four, three, two quarters or a quarter of ``tile`` px, if they fit.

    So slides of any shapes need four networks at most.  Cores may stick out of the slide, which is mirrored there.

    Arguments and errors as `fit_lattice`.
    """
    smallest = _smallest_core(tile, margin, total_stride, least)
    cores = (tile * quarters // 4 // total_stride * total_stride - 2 * margin for quarters in (4, 3, 2, 1))
    return [Lattice(shape, (core, core), margin) for core in cores if core >= smallest]


def lay_fixed(shape: tuple[int, int], tile: int, side: int, margin: int, total_stride: int) -> Lattice:
    """Lay the only lattice of a network that takes square tiles of ``side`` px alone.

    Args:
        shape: (height, width) of the slide's level in px.
        tile: side in px of a square whose area no tile may exceed.
        side: side of every tile in px.
        margin: px of context cut from each side of a tile.
        total_stride: px; margins are multiples of it.

    Raises:
        UsageError: margin is no multiple of the stride, or leaves no core in the tile; or tiles may not be as large.
    """
    _demand_whole_strides(margin, total_stride)
    core = side - 2 * margin
    if tile < side:
        raise UsageError(
            "`tile`",
            expected=f"at least {side} px, as the model takes tiles of {side} px alone",
            found=f"{tile}",
            remedy="leave it out",
        )
    if core < 1:
        raise UsageError(
            "`margin`",
            expected=f"less than {side // 2} px, as the model takes tiles of {side} px alone",
            found=f"{margin}",
            remedy="leave it out for the model's own",
        )
    return Lattice(shape, (core, core), margin)


def _smallest_core(tile: int, margin: int, total_stride: int, least: int) -> int:
    """Side in px of the smallest core that tiles of at least ``least`` px have between margins of whole strides.

    Raises:
        UsageError: margin is no multiple of the stride, or leaves no core in the tile.
    """
    _demand_whole_strides(margin, total_stride)
    smallest = max(1, -(-(least - 2 * margin) // total_stride)) * total_stride
    if tile < 2 * margin + smallest:
        raise UsageError(
            "`tile`",
            expected=f"at least {2 * margin + smallest} px for margins of {margin} px",
            found=f"{tile}",
            remedy="use a larger tile or a smaller margin",
        )
    return smallest


def _demand_whole_strides(margin: int, total_stride: int) -> None:
    """Refuse a margin in px that is no multiple of the stride; raises UsageError."""
    if margin % total_stride:
        nearest = -(-margin // total_stride) * total_stride
        raise UsageError(
            "`margin`",
            expected=f"a multiple of the network's total stride, {total_stride} px",
            found=f"{margin}",
            remedy=f"use `margin={nearest}`",
        )


def count_in_spans(
    values: NDArray[np.bool_], rows: tuple[NDArray[Any], NDArray[Any]], columns: tuple[NDArray[Any], NDArray[Any]]
) -> NDArray[np.int64]:
    """How many values are true in each span of rows and each span of columns, (n, m).

    Source: summed-area tables (Crow 1984, doi 10.1145/800031.808600).

    Args:
        values: (h, w).
        rows: first row of each of n spans, and the row behind its last.
        columns: likewise for m spans of columns.
    """
    sums = np.pad(np.cumsum(np.cumsum(values, axis=0), axis=1), ((1, 0), (1, 0)))
    (top, bottom), (left, right) = rows, columns
    counts: NDArray[np.int64] = (
        sums[bottom][:, right] - sums[top][:, right] - sums[bottom][:, left] + sums[top][:, left]
    )
    return counts


def nearly_cheapest(
    lattices: Sequence[Lattice], cost: Callable[[Lattice], float] = operator.attrgetter("cost")
) -> list[Lattice]:
    """The lattices with nearly the least cost, in the order given."""
    costs = [cost(lattice) for lattice in lattices]
    return [lattice for lattice, own in zip(lattices, costs, strict=True) if own <= _SLACK * min(costs)]


@dataclass(frozen=True)
class Block:
    """A box of whole cores, computed and written by exactly one task.

    Attributes:
        index: number of the block in the slide, plane by plane in raster order.
        plane: index of the t/z plane; 0 if there is only one.
        box: the box that the task writes, clipped to the slide.
        read_box: the box that the task reads, clipped to the slide; every mirrored pixel comes from inside it.
        tiles: its tiles in raster order; for blending, also the tiles around the block.
        tile_rows_columns: number of tiles along y and x.
    """

    index: int
    plane: int
    box: Box
    read_box: Box
    tiles: tuple[Tile, ...]
    tile_rows_columns: tuple[int, int]

    def with_tiles(self, chosen: NDArray[np.bool_], lattice: Lattice) -> Block:
        """The block with those of its tiles alone that are ``chosen`` among all of the plane, (rows, columns)."""
        height, width = lattice.core
        tiles = (tile for tile in self.tiles if chosen[tile.core.y0 // height, tile.core.x0 // width])
        return replace(self, tiles=tuple(tiles))


@dataclass(frozen=True)
class BlockGrid:
    """The blocks of a slide, made when they are asked for: memory does not grow with the slide.

    Attributes:
        lattice: lattice of every plane.
        cores: number of cores along y and x of a block.
        planes: number of t/z planes.
        ring: number of cores around a block whose tiles it also needs: 1 for blending, so that the blocks on both sides
            of a seam use the same tiles.
    """

    lattice: Lattice
    cores: tuple[int, int]
    planes: int
    ring: int = 0

    @property
    def block_shape(self) -> tuple[int, int]:
        """(height, width) of a full block in px."""
        return self.cores[0] * self.lattice.core[0], self.cores[1] * self.lattice.core[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Number of blocks along y and x of a plane."""
        rows, columns = self.lattice.grid
        return -(-rows // self.cores[0]), -(-columns // self.cores[1])

    def __len__(self) -> int:
        """Number of blocks in all planes."""
        return self.planes * self.grid[0] * self.grid[1]

    def __iter__(self) -> Iterator[Block]:
        """Every block, in order."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Block:
        """Block number ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows, columns = self.grid
        plane, position = divmod(index, rows * columns)
        row, column = divmod(position, columns)
        own_rows, own_columns = self._cores_of(row, axis=0), self._cores_of(column, axis=1)
        first = self.lattice.tile_at(own_rows[0], own_columns[0]).core
        last = self.lattice.tile_at(own_rows[-1], own_columns[-1]).core
        core_rows, core_columns = self._with_ring(own_rows, axis=0), self._with_ring(own_columns, axis=1)
        tiles = tuple(self.lattice.tile_at(y, x) for y in core_rows for x in core_columns)
        frame = Box(tiles[0].frame.y0, tiles[0].frame.x0, tiles[-1].frame.y1, tiles[-1].frame.x1)
        return Block(
            index=index,
            plane=plane,
            box=Box(first.y0, first.x0, last.y1, last.x1),
            read_box=source_box(frame, self.lattice.shape),
            tiles=tiles,
            tile_rows_columns=(len(core_rows), len(core_columns)),
        )

    def touching(self, plane: int, box: Box) -> Iterator[Block]:
        """The blocks of a plane that share pixels with ``box``, which may stick out of the slide."""
        inside = box.within(Box(0, 0, *self.lattice.shape))
        height, width = self.block_shape
        for row in range(inside.y0 // height, -(-inside.y1 // height)):
            for column in range(inside.x0 // width, -(-inside.x1 // width)):
                yield self[(plane * self.grid[0] + row) * self.grid[1] + column]

    def _cores_of(self, block: int, axis: int) -> range:
        first = block * self.cores[axis]
        return range(first, min(first + self.cores[axis], self.lattice.grid[axis]))

    def _with_ring(self, cores: range, axis: int) -> range:
        return range(max(0, cores.start - self.ring), min(cores.stop + self.ring, self.lattice.grid[axis]))


def lay_blocks(lattice: Lattice, block: int, planes: int = 1, ring: int = 0) -> BlockGrid:
    """Lay blocks of about ``block`` px a side: whole cores, at least one and at most all of the plane, along each axis.

    Args:
        lattice: lattice of every plane.
        block: target side of a block in px.
        planes: number of t/z planes.
        ring: number of cores around a block whose tiles it also needs.
    """

    def rounded(axis: int) -> int:
        return max(1, min(round(block / lattice.core[axis]), lattice.grid[axis]))

    return BlockGrid(lattice, (rounded(0), rounded(1)), planes, ring)


def chunk_side(core: int) -> int:
    """Side of a chunk in px: the divisor of the core's side in px that is nearest to 512."""
    divisors = [core // parts for parts in range(1, core + 1) if core % parts == 0]
    return min(divisors, key=lambda side: (abs(side - _CHUNK), side))
