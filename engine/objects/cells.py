"""Expand nuclei into cells without overlap: every pixel within a distance of a nucleus belongs to the nearest one.

A cell has the id of its nucleus and includes it; the ring is the cell without the nucleus.  Cells are those of
scikit-image's ``expand_labels`` on the whole plane: what is near decides, whatever block it lies in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from cellseg_batch.engine.objects.moment_files import Objects
from cellseg_batch.kernels.expand import reach

# Distances in px are rounded to this many decimals.
_DECIMALS = 6


@dataclass(frozen=True)
class CellRule:
    """How nuclei are expanded into cells.

    Attributes:
        distance: how far, in widths of a pixel of the slide.
        aspect: height of a pixel divided by its width.
        pixel_size_um: width of a pixel in µm; None if it is unknown: then ``distance`` is what was asked for.
    """

    distance: float
    aspect: float = 1.0
    pixel_size_um: float | None = None

    @property
    def reach(self) -> int:
        """How many px around a nucleus its cell may extend."""
        return reach(self.distance, self.aspect)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the user."""
        if self.pixel_size_um is not None:
            return ()
        return (
            f"pixel size unknown, so nuclei were expanded by {self.distance:g} px and not µm; `pixel_size` sets it",
        )


def cell_rule(um: float, pixel_size_um: float | None, aspect: float) -> CellRule:
    """The rule of a slide.

    Args:
        um: how far nuclei are expanded, in µm; in px if the pixel size is unknown.
        pixel_size_um: width of a pixel in µm; None if it is unknown.
        aspect: height of a pixel divided by its width.
    """
    # 1.2 µm are 3 px of 0.4 µm, and not the 2.9999999999999996 px that floats make of them.
    return CellRule(round(um / (pixel_size_um or 1.0), _DECIMALS), aspect, pixel_size_um)


def with_cells(nuclei: Iterable[Objects], cells: Iterable[Objects]) -> Iterator[Objects]:
    """The objects of nuclei with the moments of their cells; both have the same ids in the same pieces."""
    for some, own in zip(nuclei, cells, strict=True):
        assert np.array_equal(some.ids, own.ids)  # every nucleus is part of its cell
        yield replace(some, cells=own.rows)
