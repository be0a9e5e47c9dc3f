"""`quality` as one fused pass on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._jit import jit


@jit
def survey(
    pixels: NDArray[Any], top: int, bottom: int, left: int, right: int
) -> tuple[float, float, float, float, float, float, float]:
    """The sums; arguments and result as `quality_reference.survey`."""
    height, width = pixels.shape
    count, total, curved, curvature, squares = 0.0, 0.0, 0.0, 0.0, 0.0
    highest, saturated = -np.inf, 0.0
    for y in range(top, bottom):
        for x in range(left, right):
            value = np.float64(pixels[y, x])
            if value != value:
                continue
            count += 1
            total += value
            if value > highest:
                highest = value
                saturated = 0.0
            saturated += value == highest
            if 0 < y < height - 1 and 0 < x < width - 1:
                around = np.float64(pixels[y - 1, x]) + np.float64(pixels[y + 1, x])
                around += np.float64(pixels[y, x - 1]) + np.float64(pixels[y, x + 1])
                laplacian = around - 4 * value
                if laplacian == laplacian:
                    curved += 1
                    curvature += laplacian
                    squares += laplacian * laplacian
    return count, total, curved, curvature, squares, highest, saturated
