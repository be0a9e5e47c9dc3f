"""Seeds of all blocks become objects of the slide: what touches across blocks is one, and ids are final.

Ids count from 1, by the lattice core that holds an object's first pixel and within it by that pixel, both in raster
order, plane by plane: so they depend on the lattice alone.  Of the seeds that no other block knows, only their number
in each core is kept; the others are joined by a sparse graph (SciPy's connected components).  A joined seed that is
still too small is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block, BlockGrid
from cellseg_batch.engine.objects.seeds import BOTTOM, LEFT, RIGHT, TOP
from cellseg_batch.engine.storage.atomic_files import whole_file
from cellseg_batch.engine.storage.paths import RemotePath
from cellseg_batch.kernels.instances import INNER

Ids = NDArray[np.int64]
Record = dict[str, Any]


@dataclass(frozen=True)
class Merged:
    """Final ids of every seed of a slide.

    Attributes:
        counts: (cells,) seeds of each lattice core, all planes, as its block counted them.
        firsts: (cells,) id of the first object of each.
        blocks: (blocks + 1,) where each block's entries begin in the next two.
        moved: block's own ids, ascending, of seeds that are no object of their own.
        targets: the final ids of these, 0 for a seed that is dropped.
    """

    counts: Ids
    firsts: Ids
    blocks: Ids
    moved: Ids
    targets: Ids

    @property
    def objects(self) -> int:
        """Number of objects, which is the highest id."""
        return int(self.counts.sum()) - len(self.moved)

    @property
    def dtype(self) -> str:
        """The type of codes, which are ids and 2 more, and of ids: uint32, or uint64 where that is too small."""
        return "uint32" if self.objects + 2 < 2**32 else "uint64"

    def codes_of(self, block: Block, grid: BlockGrid) -> NDArray[Any]:
        """The final code of each code of a block."""
        cells = cells_of(block, grid)
        counts = self.counts[cells]
        own = np.arange(counts.sum() + 1)
        entries = slice(self.blocks[block.index], self.blocks[block.index + 1])
        gone = np.zeros(len(own), np.int64)
        gone[self.moved[entries]] = 1
        before = np.cumsum(gone) - gone
        first_own = 1 + np.cumsum(counts) - counts
        shift = self.firsts[cells] - first_own + before[np.minimum(first_own, len(own) - 1)]
        final = own - before
        final[1:] += np.repeat(shift, counts)
        final[self.moved[entries]] = self.targets[entries]
        codes = np.arange(3 + len(own) - 1).astype(self.dtype)
        codes[3:] = np.where(final[1:] > 0, final[1:] + 2, INNER)
        return codes

    def save(self, folder: Path) -> None:
        """Write to ``folder``, one file for each attribute.

        Raises:
            OutputError: it cannot be written.
        """
        for name, values in vars(self).items():
            with whole_file(folder / f"{name}.npy") as stream:
                np.save(stream, values)

    @classmethod
    def load(cls, folder: Path) -> Merged:
        """What `save` wrote, mapped rather than read where it lies on this machine."""
        if isinstance(folder, RemotePath):
            return cls(*(np.load(BytesIO((folder / f"{name}.npy").read_bytes())) for name in cls.__dataclass_fields__))
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls.__dataclass_fields__))


def cells_of(block: Block, grid: BlockGrid) -> Ids:
    """Numbers of a block's lattice cores, in its own raster order."""
    (core_h, core_w), (rows, columns) = grid.lattice.core, grid.lattice.grid
    y = np.arange(block.box.y0 // core_h, -(-block.box.y1 // core_h))
    x = np.arange(block.box.x0 // core_w, -(-block.box.x1 // core_w))
    cells: Ids = ((block.plane * rows + y[:, None]) * columns + x).ravel()
    return cells


def merge_seeds(records: Iterable[tuple[Block, Record]], grid: BlockGrid, smallest: int) -> Merged:
    """Join the seeds of all blocks and number the objects.

    Args:
        records: every block in order, with its record as `cellseg_batch.engine.objects.seeds.number_seeds` makes it.
        grid: of the slide.
        smallest: objects with a seed of fewer px are dropped.
    """
    edges = _Edges(grid)
    counts = np.zeros(grid.planes * int(np.prod(grid.lattice.grid)), np.int64)
    for block, record in records:
        counts[cells_of(block, grid)] = record["cells"]
        edges.add(block, record)
    return edges.number(counts, smallest)


class _Edges:
    """The seeds that touch other blocks, collected block by block: a node each, in order."""

    def __init__(self, grid: BlockGrid) -> None:
        self._grid = grid
        self._ends = [0]
        self._ids: list[Ids] = []
        self._areas: list[Ids] = []
        self._firsts: list[Ids] = []
        self._cells: list[Ids] = []
        self._pairs: list[Ids] = []
        # Nodes along the lower side of each block of the last row, and along the right side of the last block.
        self._above: dict[int, Ids] = {}
        self._before: Ids | None = None

    def add(self, block: Block, record: Record) -> None:
        """Take over a block's seeds and what they touch in the blocks before it."""
        lattice, base = self._grid.lattice, self._ends[-1]
        ids, areas, firsts = (np.array(record["edges"][name], np.int64) for name in ("ids", "areas", "firsts"))
        y, x = np.divmod(firsts, lattice.shape[1])
        rows, columns = lattice.grid
        self._cells.append((block.plane * rows + y // lattice.core[0]) * columns + x // lattice.core[1])
        self._ids.append(ids)
        self._areas.append(areas)
        self._firsts.append(firsts)
        self._ends.append(base + len(ids))

        def line(side: str) -> Ids:
            """The node at each pixel of a side, -1 where there is none."""
            nodes = np.full(block.box.shape[side in (TOP, BOTTOM)], -1)
            for seed, start, stop in zip(*record["sides"][side], strict=True):
                nodes[start:stop] = base + np.searchsorted(ids, seed)
            return nodes

        sides, column = record["sides"], block.box.x0
        if TOP in sides:
            self._join(self._above[column], line(TOP))
        if LEFT in sides and self._before is not None:
            self._join(self._before, line(LEFT))
        if BOTTOM in sides:
            self._above[column] = line(BOTTOM)
        self._before = line(RIGHT) if RIGHT in sides else None

    def _join(self, one: Ids, other: Ids) -> None:
        both = (one >= 0) & (other >= 0)
        self._pairs.append(np.unique(np.stack([one[both], other[both]]), axis=1))

    def number(self, counts: Ids, smallest: int) -> Merged:
        """The final ids, given the number of seeds in each core."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        nothing = [np.zeros(0, np.int64)]
        ids, areas, cells, first_pixels = (
            np.concatenate(parts + nothing) for parts in (self._ids, self._areas, self._cells, self._firsts)
        )
        pairs = np.concatenate([*self._pairs, np.zeros((2, 0), np.int64)], axis=1)
        graph = coo_array((np.ones(pairs.shape[1], bool), (pairs[0], pairs[1])), shape=(len(ids), len(ids)))
        component = connected_components(graph, directed=False)[1] if len(ids) else ids
        area = np.zeros(len(ids), np.int64)
        np.add.at(area, component, areas)
        # Nodes of one component lie in one plane, so the lowest first pixel is the component's own.
        order = np.lexsort((first_pixels, component))
        leads = np.ones(len(ids), bool)
        leads[1:] = component[order][1:] != component[order][:-1]
        leader = order[leads][component]
        dropped = area[component] < smallest
        moved = dropped | (leader != np.arange(len(ids)))
        counted = counts - np.bincount(cells[moved], minlength=len(counts))
        firsts = 1 + np.cumsum(counted) - counted
        final = np.where(dropped, 0, self._final_ids(ids, cells, moved, counts, firsts)[leader])
        ends = np.concatenate([[0], np.cumsum(moved)])[np.array(self._ends)]
        return Merged(counts, firsts, ends, ids[moved], final[moved])

    def _final_ids(self, ids: Ids, cells: Ids, moved: NDArray[np.bool_], counts: Ids, firsts: Ids) -> Ids:
        """The final id of every node that is an object of its own."""
        own_firsts = np.empty_like(counts)
        for block in self._grid:
            inside = cells_of(block, self._grid)
            own_firsts[inside] = 1 + np.cumsum(counts[inside]) - counts[inside]
        order = np.lexsort((ids, cells))
        gone: Ids = np.cumsum(moved[order]) - moved[order]
        starts = np.searchsorted(cells[order], cells[order])
        before = np.empty_like(ids)
        before[order] = gone - gone[starts]
        final: Ids = firsts[cells] + ids - own_firsts[cells] - before
        return final
