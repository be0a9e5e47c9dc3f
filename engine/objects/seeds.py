"""Number the seeds of a block, and record what the merge over blocks needs.

A side of a block is open if the slide goes on beyond it.  A seed that touches no open side is complete: outside its
block only the number of such seeds matters.  This module knows pixels and geometry; it does not know files, models or
other blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block, BlockGrid
from cellseg_batch.kernels.instances import label_seeds
from cellseg_batch.trainer.card import Hover, Instances

TOP, LEFT, BOTTOM, RIGHT = "top", "left", "bottom", "right"


@dataclass(frozen=True)
class InstanceRule:
    """Numbers by which logits become instances on a slide.

    Attributes:
        card: the model's rule, in px of its input image; None if its decoder is ``hover``.
        downscale: factor by which the slide is downscaled for the model.
        hover: the model's rule if its decoder is ``hover``.
    """

    card: Instances | None
    downscale: int = 1
    hover: Hover | None = None

    @property
    def numbers(self) -> Instances | Hover:
        """The one rule that there is."""
        numbers = self.card or self.hover
        assert numbers is not None
        return numbers

    @property
    def smallest_seed(self) -> int:
        """Area of the smallest seed, in px of the slide."""
        return self.numbers.smallest_seed * self.downscale**2

    @property
    def steps(self) -> int:
        """Number of growth steps in each of the two rounds."""
        return self.numbers.growth * self.downscale


@dataclass(frozen=True)
class EdgeSeeds:
    """The seeds of a block that touch an open side, in ascending order of ids.

    Attributes:
        ids: ids in the block.
        areas: areas in the block, in px.
        first_pixels: index of each seed's first pixel in its plane of the slide, in raster order.
    """

    ids: list[int]
    areas: list[int]
    first_pixels: list[int]


@dataclass(frozen=True)
class SideRuns:
    """Runs of seed pixels along one side of a block; each run belongs to one seed.

    Attributes:
        ids: id in the block of each run's seed.
        starts: where each run begins, in px from the block's corner.
        stops: where each run ends, not included.
    """

    ids: list[int]
    starts: list[int]
    stops: list[int]


@dataclass(frozen=True)
class SeedRecord:
    """Record of a block's seeds for the merge.

    Attributes:
        cells: number of seeds that begin in each lattice core of the block, in raster order.
        edges: the seeds that touch an open side.
        sides: open side (`TOP`, `LEFT`, `BOTTOM`, `RIGHT`) -> the runs along it.
    """

    cells: list[int]
    edges: EdgeSeeds
    sides: dict[str, SideRuns]


def number_seeds(
    pixel_codes: NDArray[np.uint8], block: Block, grid: BlockGrid, smallest: int
) -> tuple[NDArray[np.uint32], SeedRecord]:
    """Number the seeds of a block.

    Args:
        pixel_codes: (h, w) pixel codes of the block.
        block: a block of ``grid``.
        grid: block grid of the slide.
        smallest: components of fewer px are no seeds, unless they touch an open side.

    Returns:
        Numbered codes (h, w) of the block, as defined in `cellseg_batch.kernels.instances`, and its record.
    """
    box, lattice = block.box, grid.lattice
    height, width = lattice.shape
    is_open = {TOP: box.y0 > 0, LEFT: box.x0 > 0, BOTTOM: box.y1 < height, RIGHT: box.x1 < width}
    codes = np.empty(box.shape, np.uint32)
    open_sides = is_open[TOP], is_open[LEFT], is_open[BOTTOM], is_open[RIGHT]
    seeds = label_seeds(pixel_codes, lattice.core, smallest, open_sides, codes)
    y, x = np.divmod(seeds.first, box.shape[1])
    rows, columns = (-(-length // core) for length, core in zip(box.shape, lattice.core, strict=True))
    cells = np.bincount(y // lattice.core[0] * columns + x // lattice.core[1], minlength=rows * columns)
    lines = {TOP: codes[0], LEFT: codes[:, 0], BOTTOM: codes[-1], RIGHT: codes[:, -1]}
    sides = {side: _runs(line) for side, line in lines.items() if is_open[side]}
    ids = np.array(sorted({seed for runs in sides.values() for seed in runs.ids}), np.int64)
    first_pixels = (box.y0 + y[ids - 1]) * width + box.x0 + x[ids - 1]
    edges = EdgeSeeds(ids.tolist(), seeds.area[ids - 1].tolist(), first_pixels.tolist())
    return codes, SeedRecord(cells.tolist(), edges, sides)


def _runs(line: NDArray[np.uint32]) -> SideRuns:
    """Find the runs of seeds in the numbered codes along one side of a block."""
    starts = np.concatenate(([0], np.flatnonzero(np.diff(line.astype(np.int64))) + 1))
    stops = np.append(starts[1:], len(line))
    is_seed = line[starts] > 2
    ids = line[starts][is_seed].astype(np.int64) - 2
    return SideRuns(ids.tolist(), starts[is_seed].tolist(), stops[is_seed].tolist())
