"""Sum up the table of objects of an image: count, density, and the distribution of their sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cellseg_batch.engine.objects.columns import AREA, CELL_AREA
from cellseg_batch.engine.objects.table import read_batches, read_provenance

# Bins of sizes are this many to a doubling, and begin at this size; the last one takes all that is larger.
_PER_DOUBLING, _LEAST, _BINS = 4, 2.0**-8, 160


@dataclass(frozen=True)
class ObjectFigures:
    """The objects of an image.

    Attributes:
        count: number of objects.
        density: objects per mm², or per megapixel if the pixel size is unknown; over all planes.
        median: median area; None without objects.
        unit: unit of areas: µm², or px if the pixel size is unknown.
        sizes: number of objects in each bin of areas, the same bins for all images of a unit.
        median_cell: median area of their cells; None without cells.
    """

    count: int
    density: float
    median: float | None
    unit: str
    sizes: tuple[int, ...]
    median_cell: float | None = None

    @property
    def density_unit(self) -> str:
        """Unit of the density."""
        return "/mm²" if self.unit == "µm²" else "/Mpx"


def read_object_figures(table: Path) -> ObjectFigures:
    """Read the figures of an image from its table of objects.

    Raises:
        ReadError: the file is no table of objects.
    """
    provenance = read_provenance(table)
    um2 = provenance.pixel_size_um and provenance.pixel_size_um**2
    names = [AREA.name, CELL_AREA.name] if provenance.cells else [AREA.name]
    batches = list(read_batches(table, names))
    areas, *cells = (np.concatenate([batch[name].to_numpy() for batch in batches]) * (um2 or 1.0) for name in names)
    bins = np.floor(_PER_DOUBLING * np.log2(np.maximum(areas, _LEAST) / _LEAST)).astype(np.int64)
    return ObjectFigures(
        count=len(areas),
        density=len(areas) / (math.prod(provenance.shape) * (um2 or 1.0)) * 1e6,
        median=float(np.median(areas)) if len(areas) else None,
        unit="µm²" if um2 else "px",
        median_cell=float(np.median(cells[0])) if cells and len(areas) else None,
        sizes=tuple(np.bincount(np.minimum(bins, _BINS - 1), minlength=_BINS).tolist()),
    )


def size_at(edge: int) -> float:
    """The area at which bin ``edge`` begins, in the unit of the figures."""
    return float(_LEAST * 2.0 ** (edge / _PER_DOUBLING))
