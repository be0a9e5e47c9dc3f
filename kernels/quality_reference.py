"""Define `quality` in plain numpy: pixels are read once, no array is written."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def survey(
    pixels: NDArray[Any], top: int, bottom: int, left: int, right: int
) -> tuple[float, float, float, float, float, float, float]:
    """Return the fields of `cellseg_batch.kernels.quality.Quality`, in order, over rows and columns of ``pixels``."""
    values = pixels.astype(np.float64)
    core = values[top:bottom, left:right]
    known = core[~np.isnan(core)]
    highest = float(known.max(initial=-np.inf))
    around = np.pad(values, 1, constant_values=np.nan)
    laplacian = around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:] - 4 * values
    curved = laplacian[top:bottom, left:right]
    curved = curved[~np.isnan(curved)]
    curvature, squares = float(curved.sum()), float((curved**2).sum())
    return known.size, float(known.sum()), curved.size, curvature, squares, highest, int((known == highest).sum())
