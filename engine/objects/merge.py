"""Join the seeds of all blocks into the objects of the slide and give each its final id.

Seeds of neighbouring blocks that touch are one object.  Ids count from 1, plane by plane: objects are ordered by the
lattice core that holds their first pixel, and within a core by that pixel, both in raster order.  So ids depend on the
lattice alone.  Seeds that touch no other block are only counted, core by core.  The others are nodes of a sparse graph,
whose connected components (SciPy) are the objects.  An object is dropped if its seeds together are still too small.

A *cell* is a lattice core, numbered plane by plane in raster order.  A seed *moves* if it does not begin an object: it
is dropped, or joins an object that begins elsewhere.
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
from cellseg_batch.engine.objects.seeds import BOTTOM, LEFT, RIGHT, TOP, SeedRecord
from cellseg_batch.engine.storage.atomic_files import whole_file
from cellseg_batch.engine.storage.paths import RemotePath
from cellseg_batch.kernels.instances import INNER

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class FinalIds:
    """Final ids of every seed of a slide.

    Attributes:
        seed_counts: (cells,) number of seeds that begin in each cell, as counted by its block.
        first_ids: (cells,) id of the first object of each cell.
        block_starts: (blocks + 1,) index of each block's first entry in ``moved`` and ``targets``.
        moved: ids in their block of the seeds that move, ascending in each block.
        targets: final ids of these seeds; 0 for a seed that is dropped.
    """

    seed_counts: Ids
    first_ids: Ids
    block_starts: Ids
    moved: Ids
    targets: Ids

    @property
    def objects(self) -> int:
        """Number of objects, which is also the highest id."""
        return int(self.seed_counts.sum()) - len(self.moved)

    @property
    def dtype(self) -> str:
        """Type of ids and of numbered codes (up to the highest id + 2): uint32, or uint64 if that is too small."""
        return "uint32" if self.objects + 2 < 2**32 else "uint64"

    def codes_of(self, block: Block, grid: BlockGrid) -> NDArray[Any]:
        """Array that maps each numbered code of a block to the numbered code with the final id."""
        cells = cells_of(block, grid)
        counts = self.seed_counts[cells]
        block_ids = np.arange(counts.sum() + 1)
        entries = slice(self.block_starts[block.index], self.block_starts[block.index + 1])
        is_moved = np.zeros(len(block_ids), np.int64)
        is_moved[self.moved[entries]] = 1
        moved_before = np.cumsum(is_moved) - is_moved
        first_block_ids = 1 + np.cumsum(counts) - counts
        shifts = self.first_ids[cells] - first_block_ids + moved_before[np.minimum(first_block_ids, len(block_ids) - 1)]
        final = block_ids - moved_before
        final[1:] += np.repeat(shifts, counts)
        final[self.moved[entries]] = self.targets[entries]
        codes = np.arange(3 + len(block_ids) - 1).astype(self.dtype)
        codes[3:] = np.where(final[1:] > 0, final[1:] + 2, INNER)
        return codes

    def save(self, folder: Path) -> None:
        """Write a file for each attribute to ``folder``.

        Raises:
            OutputError: a file cannot be written.
        """
        for name, values in vars(self).items():
            with whole_file(folder / f"{name}.npy") as stream:
                np.save(stream, values)

    @classmethod
    def load(cls, folder: Path) -> FinalIds:
        """Open the files of `save`: memory-mapped from a local disk, read from an object store."""
        if isinstance(folder, RemotePath):
            return cls(*(np.load(BytesIO((folder / f"{name}.npy").read_bytes())) for name in cls.__dataclass_fields__))
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls.__dataclass_fields__))


def cells_of(block: Block, grid: BlockGrid) -> Ids:
    """Numbers of a block's cells, in the block's own raster order."""
    (core_h, core_w), (rows, columns) = grid.lattice.core, grid.lattice.grid
    y = np.arange(block.box.y0 // core_h, -(-block.box.y1 // core_h))
    x = np.arange(block.box.x0 // core_w, -(-block.box.x1 // core_w))
    cells: Ids = ((block.plane * rows + y[:, None]) * columns + x).ravel()
    return cells


def merge_seeds(records: Iterable[tuple[Block, SeedRecord]], grid: BlockGrid, smallest: int) -> FinalIds:
    """Join the seeds of all blocks and number the objects.

    Args:
        records: every block in order, with its record from `cellseg_batch.engine.objects.seeds.number_seeds`.
        grid: block grid of the slide.
        smallest: objects whose seeds have fewer px together are dropped.
    """
    graph = _SeedGraph(grid)
    seed_counts = np.zeros(grid.planes * int(np.prod(grid.lattice.grid)), np.int64)
    for block, record in records:
        seed_counts[cells_of(block, grid)] = record.cells
        graph.add(block, record)
    return graph.number(seed_counts, smallest)


class _SeedGraph:
    """Graph of the seeds that touch an open side of their block; an edge joins two seeds that touch each other.

    Nodes are numbered block by block, and within a block by the id of the seed.
    """

    def __init__(self, grid: BlockGrid) -> None:
        self._grid = grid
        self._block_ends = [0]
        self._block_ids: list[Ids] = []
        self._areas: list[Ids] = []
        self._first_pixels: list[Ids] = []
        self._cells: list[Ids] = []
        self._edges: list[Ids] = []
        # Nodes along the lower side of the latest block of each column, by its left edge in px, and along the right
        # side of the latest block; -1 at pixels without a node.
        self._above: dict[int, Ids] = {}
        self._left: Ids | None = None

    def add(self, block: Block, record: SeedRecord) -> None:
        """Add the nodes of a block, and their edges to earlier blocks."""
        lattice, first_node = self._grid.lattice, self._block_ends[-1]
        block_ids = np.array(record.edges.ids, np.int64)
        first_pixels = np.array(record.edges.first_pixels, np.int64)
        y, x = np.divmod(first_pixels, lattice.shape[1])
        rows, columns = lattice.grid
        self._cells.append((block.plane * rows + y // lattice.core[0]) * columns + x // lattice.core[1])
        self._block_ids.append(block_ids)
        self._areas.append(np.array(record.edges.areas, np.int64))
        self._first_pixels.append(first_pixels)
        self._block_ends.append(first_node + len(block_ids))

        def nodes_along(side: str) -> Ids:
            nodes = np.full(block.box.shape[side in (TOP, BOTTOM)], -1)
            runs = record.sides[side]
            for seed, start, stop in zip(runs.ids, runs.starts, runs.stops, strict=True):
                nodes[start:stop] = first_node + np.searchsorted(block_ids, seed)
            return nodes

        column = block.box.x0
        if TOP in record.sides:
            self._connect(self._above[column], nodes_along(TOP))
        if LEFT in record.sides and self._left is not None:
            self._connect(self._left, nodes_along(LEFT))
        if BOTTOM in record.sides:
            self._above[column] = nodes_along(BOTTOM)
        self._left = nodes_along(RIGHT) if RIGHT in record.sides else None

    def _connect(self, nodes: Ids, neighbours: Ids) -> None:
        """Add an edge wherever two nodes lie opposite each other."""
        both = (nodes >= 0) & (neighbours >= 0)
        self._edges.append(np.unique(np.stack([nodes[both], neighbours[both]]), axis=1))

    def number(self, seed_counts: Ids, smallest: int) -> FinalIds:
        """Compute the final ids.

        Args:
            seed_counts: (cells,) number of seeds that begin in each cell.
            smallest: objects whose seeds have fewer px together are dropped.
        """
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        empty = [np.zeros(0, np.int64)]
        block_ids, areas, cells, first_pixels = (
            np.concatenate(parts + empty) for parts in (self._block_ids, self._areas, self._cells, self._first_pixels)
        )
        count = len(block_ids)
        edges = np.concatenate([*self._edges, np.zeros((2, 0), np.int64)], axis=1)
        graph = coo_array((np.ones(edges.shape[1], bool), (edges[0], edges[1])), shape=(count, count))
        component = connected_components(graph, directed=False)[1] if count else block_ids
        component_areas = np.zeros(count, np.int64)
        np.add.at(component_areas, component, areas)
        # A component lies in one plane, so its object begins at the node with the lowest first pixel.
        order = np.lexsort((first_pixels, component))
        is_first = np.ones(count, bool)
        is_first[1:] = component[order][1:] != component[order][:-1]
        leader = order[is_first][component]
        dropped = component_areas[component] < smallest
        moved = dropped | (leader != np.arange(count))
        object_counts = seed_counts - np.bincount(cells[moved], minlength=len(seed_counts))
        first_ids = 1 + np.cumsum(object_counts) - object_counts
        own_ids = self._own_ids(block_ids, cells, moved, seed_counts, first_ids)
        targets = np.where(dropped, 0, own_ids[leader])
        block_starts = np.concatenate([[0], np.cumsum(moved)])[np.array(self._block_ends)]
        return FinalIds(seed_counts, first_ids, block_starts, block_ids[moved], targets[moved])

    def _own_ids(self, block_ids: Ids, cells: Ids, moved: NDArray[np.bool_], seed_counts: Ids, first_ids: Ids) -> Ids:
        """Final id of every node that does not move; the entries of the other nodes are meaningless."""
        first_block_ids = np.empty_like(seed_counts)
        for block in self._grid:
            inside = cells_of(block, self._grid)
            first_block_ids[inside] = 1 + np.cumsum(seed_counts[inside]) - seed_counts[inside]
        order = np.lexsort((block_ids, cells))
        moved_so_far: Ids = np.cumsum(moved[order]) - moved[order]
        cell_starts = np.searchsorted(cells[order], cells[order])
        moved_before = np.empty_like(block_ids)
        moved_before[order] = moved_so_far - moved_so_far[cell_starts]
        own_ids: Ids = first_ids[cells] + block_ids - first_block_ids[cells] - moved_before
        return own_ids
