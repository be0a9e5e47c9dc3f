"""Decide the open stars of a slide, give every star that is an object its final id, and draw the objects.

Open stars are decided block by block, each with a frame that holds all stars which may reach those of the block.  Of
all open stars the one of the highest rank is decided in any case, since only higher ranks could keep it open; so
rounds over the blocks with open stars come to an end, with the states of greedy non-maximum suppression over the whole
slide.  Every other round goes backwards, so that a chain of stars, each of which awaits the one before, takes two
rounds and not as many as it crosses blocks.  In memory there are a byte for each star that its own block did not
suppress, and the stars of one block and its frame.

An object is a survivor of which a pixel is seen: all of one may lie below several others.  Ids count from 1, plane by
plane: objects are ordered by the lattice core that holds their centre, and within a core by that centre, both in raster
order.  So ids depend on the lattice alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block, BlockGrid, Box
from cellseg_batch.engine.objects.merge import Ids, cells_of
from cellseg_batch.engine.objects.stars import StarRule, StarScratch, States, decide, inside
from cellseg_batch.engine.storage.atomic_files import whole_file
from cellseg_batch.kernels.stardist import OPEN, SUPPRESSED, SURVIVOR, Stars, draw, join


@dataclass(frozen=True)
class StarIds:
    """Final ids of the objects of a slide.

    Attributes:
        starts: (cells + 1,) id of the first object of each cell, which is a lattice core, numbered plane by plane in
            raster order; at the end one more than the highest id.
    """

    starts: Ids

    @property
    def objects(self) -> int:
        """Number of objects, which is also the highest id."""
        return int(self.starts[-1]) - 1

    @property
    def dtype(self) -> str:
        """Type of ids: uint32, or uint64 if that is too small."""
        return "uint32" if self.objects < 2**32 else "uint64"

    def of_block(self, block: Block, grid: BlockGrid) -> Ids:
        """The ids of a block's objects, in the order of their file."""
        cells = cells_of(block, grid)
        return np.concatenate([np.arange(self.starts[cell], self.starts[cell + 1]) for cell in cells])

    def save(self, folder: Path) -> None:
        """Write the ids to ``folder``.

        Raises:
            OutputError: the file cannot be written.
        """
        with whole_file(folder / "starts.npy") as stream:
            np.save(stream, self.starts)

    @classmethod
    def load(cls, folder: Path) -> StarIds:
        """Read the file of `save`."""
        return cls(np.load(BytesIO((folder / "starts.npy").read_bytes())))


def merge_stars(scratch: StarScratch, survivors: StarScratch, grid: BlockGrid, rule: StarRule) -> tuple[StarIds, int]:
    """Decide all open stars and number the objects.

    Args:
        scratch: the stars of every block, as `cellseg_batch.engine.objects.stars.decide` left them.
        survivors: receives the objects of every block, in the order of their ids.
        grid: blocks of the slide.
        rule: rule of the slide.

    Returns:
        The ids, and the number of objects with a ray that was cut to the longest one allowed.

    Raises:
        OutputError: stars cannot be read or written.
    """
    states = _settle(scratch, grid, rule)
    counts, cut = np.zeros(grid.planes * int(np.prod(grid.lattice.grid)), np.int64), 0
    for block in grid:
        objects, own_counts = _objects_of(block, scratch, states, grid, rule)
        counts[cells_of(block, grid)] = own_counts
        cut += int(np.count_nonzero(objects.rays.max(axis=1, initial=0) >= rule.longest))
        survivors.write(block, objects, np.full(len(objects.y), SURVIVOR, np.uint8))
    return StarIds(1 + np.concatenate([[0], np.cumsum(counts)])), cut


def _settle(scratch: StarScratch, grid: BlockGrid, rule: StarRule) -> list[States]:
    """Decide the open stars of all blocks; the states of each block's stars, none of which is open."""
    states = [scratch.states(block) for block in grid]
    waiting = [block for block in grid if (states[block.index] == OPEN).any()]
    while waiting:
        for block in waiting:
            if (states[block.index] == OPEN).any():
                _settle_block(block, scratch, states, grid, rule)
        waiting = [block for block in reversed(waiting) if (states[block.index] == OPEN).any()]
    return states


def _settle_block(block: Block, scratch: StarScratch, states: list[States], grid: BlockGrid, rule: StarRule) -> None:
    """Decide what the stars of a block and its frame decide, and note it in ``states``."""
    window = block.box.grown(2 * rule.longest)
    parts = list(_standing(block.plane, window, scratch, states, grid))
    stars = join([stars for _, _, stars in parts], rule.rays)
    known = np.concatenate([states[number][places] for number, places, _ in parts])
    decided = decide(stars, known, window, grid.lattice.shape, rule)
    ends = np.cumsum([len(places) for _, places, _ in parts])
    for (number, places, _), own in zip(parts, np.split(decided, ends[:-1]), strict=True):
        states[number][places] = own


def _standing(
    plane: int, window: Box, scratch: StarScratch, states: list[States], grid: BlockGrid
) -> Iterator[tuple[int, NDArray[np.int64], Stars]]:
    """The stars of a window that are not suppressed: number of their block, places in its file, the stars."""
    for block in grid.touching(plane, window):
        places, stars = scratch.read(block, window)
        standing = states[block.index][places] != SUPPRESSED
        yield block.index, places[standing], stars.take(standing)


def _objects_of(
    block: Block, scratch: StarScratch, states: list[States], grid: BlockGrid, rule: StarRule
) -> tuple[Stars, Ids]:
    """The objects of a block in the order of their ids, and their number in each of its cells."""
    parts = _standing(block.plane, block.box.grown(2 * rule.longest), scratch, states, grid)
    stars = join([part for _, _, part in parts], rule.rays)
    stars = stars.take(stars.ranking())
    canvas = block.box.grown(rule.longest).within(Box(0, 0, *grid.lattice.shape))
    numbers = np.arange(1, 1 + len(stars.y), dtype=np.uint32)
    seen = np.zeros(canvas.shape, np.uint32)
    draw(stars.shifted(-canvas.y0, -canvas.x0), numbers, seen)
    is_seen = np.bincount(seen.ravel(), minlength=1 + len(numbers))[1:] > 0
    objects = stars.take(inside(stars.y, stars.x, block.box) & is_seen)
    core, cells = grid.lattice.core, cells_of(block, grid)
    columns = -(-block.box.shape[1] // core[1])
    cell = (objects.y - block.box.y0) // core[0] * columns + (objects.x - block.box.x0) // core[1]
    counts: Ids = np.bincount(cell, minlength=len(cells))
    return objects.take(np.lexsort((objects.x, objects.y, cell))), counts


def draw_objects(
    plane: int, target: Box, survivors: StarScratch, ids: StarIds, grid: BlockGrid, rule: StarRule
) -> NDArray[Any]:
    """Draw the labels of a box of a plane.

    Args:
        plane: index of the plane.
        target: the box; it may stick out of the slide.
        survivors: the objects of every block, from `merge_stars`.
        ids: their ids.
        grid: blocks of the slide.
        rule: rule of the slide.

    Returns:
        (h, w) uint32 or uint64, 0 in the background and outside the slide.

    Raises:
        OutputError: the objects cannot be read.
    """
    canvas = target.within(Box(0, 0, *grid.lattice.shape))
    window = canvas.grown(rule.longest)
    parts, own_ids = [], []
    for touching in grid.touching(plane, window):
        places, objects = survivors.read(touching, window)
        parts.append(objects)
        own_ids.append(ids.of_block(touching, grid)[places].astype(ids.dtype))
    objects = join(parts, rule.rays)
    ranking = objects.ranking()
    drawn = np.zeros(canvas.shape, ids.dtype)
    draw(objects.take(ranking).shifted(-canvas.y0, -canvas.x0), np.concatenate(own_ids)[ranking], drawn)
    labels = np.zeros(target.shape, ids.dtype)
    labels[canvas.seen_from(target).slices()] = drawn
    return labels
