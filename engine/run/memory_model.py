"""Estimate the most host memory that a block needs, and have blocks wait until they fit into the memory budget."""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import numpy as np

from cellseg_batch.engine.geometry import BlockGrid
from cellseg_batch.engine.machine import cores
from cellseg_batch.engine.objects.stars import StarRule
from cellseg_batch.engine.slides.slide import Slide

# zarr decodes ten chunks of one read at a time (zarr.config async.concurrency), zarrs one a core.
_CHUNKS_IN_FLIGHT = max(10, cores())
# Memory that zarr's event loop, dask, thread stacks and the allocator's slack need beside the blocks.
RUN_OVERHEAD_BYTES = 96 << 20


def block_memory(
    slide: Slide,
    level: int,
    channels: int,
    grid: BlockGrid,
    images: int,
    on_gpu: bool,
    frame: int | None = None,
    spread: int = 0,
) -> int:
    """Host memory in bytes that a block of ``grid`` holds at most while it is read, computed and written.

    Args:
        slide: the image.
        level: level that is processed.
        channels: number of channels that are read.
        grid: blocks of the slide.
        images: number of uint8 images that are computed.
        on_gpu: whether a GPU computes the block.
        frame: width in px of the frame around a block that growth needs; None where nothing grows.
        spread: width in px of the surroundings of a block whose instances its cells need; 0 without cells.
    """
    itemsize = np.dtype(slide.dtype).itemsize
    sides = {"c": channels}
    lattice = grid.lattice
    for axis, length, block, core in zip("yx", lattice.shape, grid.block_shape, lattice.core, strict=True):
        sides[axis] = min(block + 2 * (grid.ring * core + grid.lattice.margin), length)
    touched = 1
    for axis, length, chunk in zip(slide.axes, slide.levels[level].shape, slide.levels[level].chunks, strict=True):
        touched *= min(1 + math.ceil((sides.get(axis, 1) - 1) / chunk), math.ceil(length / chunk))
    decoding = min(_CHUNKS_IN_FLIGHT, touched) * math.prod(slide.levels[level].chunks) * itemsize
    written = math.prod(grid.block_shape) * images
    read = math.prod(sides.values()) * itemsize
    # Data to and from a GPU pass through pinned memory, which torch allocates in powers of two.
    computing = 2 * (read + written) if on_gpu else _blended_logits(grid)
    # The encoder holds its input, the chunks that it cuts from it and the shard that it builds.
    return read + decoding + computing + 3 * written + _ids(grid, frame, spread)


def _ids(grid: BlockGrid, frame: int | None, spread: int) -> int:
    """Bytes of a block's codes, ids and cells while they are made.

    Seeds are numbered or grown with codes, ids, and the encoder's copies of them; cells are made with the ids around
    the block, the places of the nearest ones, and themselves, which stay with the ids of the block until both are
    measured and written.
    """
    sides = [min(side + 2 * spread, length) for side, length in zip(grid.block_shape, grid.lattice.shape, strict=True)]
    grown = 0 if frame is None else 4 * 4 * math.prod(side + 2 * frame for side in sides)
    expanded = 4 * (3 * math.prod(sides) + 2 * math.prod(grid.block_shape)) if spread else 0
    return max(grown, expanded)


def star_memory(grid: BlockGrid, rule: StarRule, threshold: float, on_gpu: bool) -> int:
    """Host memory in bytes that stars take beside `block_memory`, while a block is decided, merged or drawn.

    The probability of StarDist is the distance from an object's outline over the largest one, so in an object of any
    size a share of (1 - threshold) ** 2 of the points are candidates; the slide is taken to be full of objects.

    Args:
        grid: blocks of the slide.
        rule: rule of the slide.
        threshold: probability above which a point is a candidate.
        on_gpu: whether the logits come from a GPU as a whole.
    """
    block = math.prod(grid.block_shape)
    window = math.prod(side + 4 * rule.longest for side in grid.block_shape)
    candidates = window / rule.grid**2 * (1 - threshold) ** 2
    # As they are read or found, joined, and in the order of their ranks; the runs of pixels take as much again.
    stars = 4 * (13 + 4 * rule.rays) * candidates
    tiles = math.prod(grid.cores) * math.prod(grid.lattice.tile)
    logits = 3 * 2 * (1 + rule.rays) * tiles / rule.grid**2 if on_gpu else 0  # in float16 and in float32
    # What is drawn, with its halo, and the encoder's copies.
    return round(max(stars + logits, stars / 4 + 4 * 4 * block))


def _blended_logits(grid: BlockGrid) -> int:
    """Bytes of the logits of a block that are held until all of its tiles are blended."""
    tiles = math.prod(cores + 2 for cores in grid.cores)
    return 4 * tiles * math.prod(core + grid.lattice.overlap for core in grid.lattice.core) if grid.ring else 0


class MemoryBudget:
    """Host memory that the blocks in flight of one process share, so that slides with large blocks take turns."""

    def __init__(self) -> None:
        self.taken = 0
        self._network: Hashable = None
        self._changed = threading.Condition()
        self._entrance = threading.RLock()

    @contextmanager
    def take(self, nbytes: int, limit: int | None, network: Hashable = None) -> Iterator[None]:
        """Wait until ``nbytes`` fit below ``limit`` bytes with those of other blocks, and hold them in the context.

        If no other block holds memory, ``nbytes`` always fit; a limit of None never makes a block wait.  Below a limit,
        only blocks that name the same ``network`` are in flight at a time.
        """

        def fits() -> bool:
            return limit is None or not self.taken or (network == self._network and self.taken + nbytes <= limit)

        with self._entrance, self._changed:
            self._changed.wait_for(fits)
            self.taken += nbytes
            self._network = network
        try:
            yield
        finally:
            with self._changed:
                self.taken -= nbytes
                self._changed.notify_all()

    @contextmanager
    def untaken(self) -> Iterator[None]:
        """Wait until no block holds memory, and let none take any in the context."""
        with self._entrance:
            with self._changed:
                self._changed.wait_for(lambda: not self.taken)
            yield
