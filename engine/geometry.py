"""Boxes, the lattice of tiles and the blocks made of it: pure integer arithmetic, all in pixels.

Coordinates are those of the level that is processed, (y, x), half-open.  Along one axis of a slide:

    slide       |.......................................|
    cores       |---------|---------|---------|---------|--     laid from 0, the last may stick out
    tile     <==|---------|==>                                  a core and a margin on either side
    block       |-------------------|                           k cores, what one task computes and writes
    read box |..|-------------------|..|                        what it reads, clipped to the slide

Pixels outside the slide are its own, mirrored at the edge again and again (numpy's ``reflect``).  The lattice
depends on the slide's shape, the tile target, the margin and the network's stride, never on blocks, batches
or workers, which is why results do not depend on these either.  Nothing here knows files or models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.errors import UsageError

# How much more than the least a lattice may compute for the sake of squarer tiles.
_SLACK = 1.025
# Side in px that a chunk of an output has nearly.
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
        """The box moved by (y, x)."""
        return Box(self.y0 + by[0], self.x0 + by[1], self.y1 + by[0], self.x1 + by[1])

    def grown(self, margin: int) -> Box:
        """The box with ``margin`` px more on every side."""
        return Box(self.y0 - margin, self.x0 - margin, self.y1 + margin, self.x1 + margin)

    def within(self, other: Box) -> Box:
        """The part of the box that lies in ``other``; empty where they do not meet."""
        y0, x0 = max(self.y0, other.y0), max(self.x0, other.x0)
        return Box(y0, x0, max(y0, min(self.y1, other.y1)), max(x0, min(self.x1, other.x1)))

    def seen_from(self, other: Box) -> Box:
        """The box in px from the first corner of ``other``."""
        return Box(self.y0 - other.y0, self.x0 - other.x0, self.y1 - other.y0, self.x1 - other.x0)

    def slices(self) -> tuple[slice[int, int, None], slice[int, int, None]]:
        """The box as an index into an array with axes (y, x)."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)


def reflect(start: int, stop: int, length: int) -> NDArray[np.int64]:
    """Source index of each position in [start, stop) of an axis of ``length`` px that is mirrored at its edges.

    The same as ``numpy.pad(..., mode="reflect")``, repeated for as long as needed; an axis of one pixel
    repeats it.
    """
    if length == 1:
        return np.zeros(stop - start, np.int64)
    period = 2 * (length - 1)
    position = np.arange(start, stop, dtype=np.int64) % period
    return np.minimum(position, period - position)


def source_box(frame: Box, shape: tuple[int, int]) -> Box:
    """The pixels of a slide of ``shape`` that ``frame`` shows, mirrored ones included."""
    rows, columns = reflect(frame.y0, frame.y1, shape[0]), reflect(frame.x0, frame.x1, shape[1])
    return Box(int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1)


@dataclass(frozen=True)
class Tile:
    """One tile of a lattice, or what is left of it.

    Attributes:
        frame: the pixels that the network sees; it may lie partly outside the slide.
        core: the pixels that it decides, clipped to the slide.
    """

    frame: Box
    core: Box


@dataclass(frozen=True)
class Lattice:
    """Tile cores laid over a slide from its origin.

    Attributes:
        shape: (height, width) of the slide's level.
        core: (height, width) of a core, multiples of the network's total stride.
        margin: context cut from each side of a tile, a multiple of the total stride.
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
        """Pixels over which neighbouring tiles are blended: a power of two of at most 64; 0 without a margin."""
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
        """Pixels that the network computes per pixel of the slide."""
        computed = self.grid[0] * self.grid[1] * self.tile[0] * self.tile[1]
        return computed / (self.shape[0] * self.shape[1])


def fit_lattice(shape: tuple[int, int], tile: int, margin: int, total_stride: int) -> Lattice:
    """Lay equally large cores in tiles within the area of ``tile`` x ``tile`` px that compute hardly more than need be.

    The network's memory grows with a tile's area and not with its sides, so 1216 x 2288 px may do where squares would
    waste more on margins.  Of all that cost about as little, the one with the shortest longer side: fewer of its tiles
    lie across the edge of what is empty.

    Raises:
        UsageError: margin is no multiple of the stride, or leaves no core in the tile.
    """
    if margin % total_stride:
        nearest = -(-margin // total_stride) * total_stride
        raise UsageError(
            "`margin`",
            expected=f"a multiple of the network's total stride, {total_stride} px",
            found=f"{margin}",
            remedy=f"use `margin={nearest}`",
        )
    if tile < 2 * margin + total_stride:
        raise UsageError(
            "`tile`",
            expected=f"at least {2 * margin + total_stride} px for margins of {margin} px",
            found=f"{tile}",
            remedy="use a larger tile or a smaller margin",
        )

    def fit(length: int, count: int) -> int:
        """The smallest core of which ``count`` cover ``length`` px."""
        return -(-length // (count * total_stride)) * total_stride

    height, width = shape
    fitted = []
    for rows in range(1, -(-height // total_stride) + 1):
        core = fit(height, rows)
        widest = (tile**2 // (core + 2 * margin) - 2 * margin) // total_stride * total_stride
        if widest > 0:
            fewest = -(-width // widest)
            fitted += [Lattice(shape, (core, fit(width, columns)), margin) for columns in (fewest, fewest + 1)]
    enough = _SLACK * min(lattice.cost for lattice in fitted)
    good = [lattice for lattice in fitted if lattice.cost <= enough]
    # Of two alike the wider one, whose rows are longer runs of memory.
    return min(good, key=lambda lattice: (max(lattice.tile), lattice.cost, lattice.core[0]))


@dataclass(frozen=True)
class Block:
    """A box of whole cores, computed and written by exactly one task.

    Attributes:
        index: its number in the slide, plane by plane in raster order.
        plane: index of the t/z plane, 0 when there is only one.
        box: what it writes, clipped to the slide.
        read_box: what it reads, clipped to the slide; every mirrored pixel comes from inside it.
        tiles: in raster order; to blend, those around the block too.
        tile_rows_columns: how many there are along y and x.
    """

    index: int
    plane: int
    box: Box
    read_box: Box
    tiles: tuple[Tile, ...]
    tile_rows_columns: tuple[int, int]


@dataclass(frozen=True)
class BlockGrid:
    """The blocks of a slide, made when asked for: nothing here grows with the slide.

    Attributes:
        lattice: of every plane.
        cores: number of cores along y and x of a block.
        planes: number of t/z planes.
        ring: cores beyond a block whose tiles it needs: 1 to blend them, so that both sides of a seam see the same.
    """

    lattice: Lattice
    cores: tuple[int, int]
    planes: int
    ring: int = 0

    @property
    def block_shape(self) -> tuple[int, int]:
        """(height, width) of a full block."""
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
    """Blocks of about ``block`` px a side, rounded to whole cores, at least one and no more than there are."""

    def rounded(axis: int) -> int:
        return max(1, min(round(block / lattice.core[axis]), lattice.grid[axis]))

    return BlockGrid(lattice, (rounded(0), rounded(1)), planes, ring)


def chunk_side(core: int) -> int:
    """Side of a chunk in px: the divisor of a core's side that is nearest to 512."""
    divisors = [core // parts for parts in range(1, core + 1) if core % parts == 0]
    return min(divisors, key=lambda side: (abs(side - _CHUNK), side))
