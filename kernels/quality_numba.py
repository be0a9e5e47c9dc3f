"""Compute `quality` in a single fused pass on the CPU, in loops that compilers can vectorise."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._jit import jit

Sums = tuple[float, float, float, float, float, float, float]


def survey(pixels: NDArray[Any], top: int, bottom: int, left: int, right: int) -> Sums:
    """Compute the sums; arguments and result as `quality_reference.survey`."""
    # Integers of up to 16 bits are added as int64: their squares fit, and integer sums may be reordered.
    if pixels.dtype.kind in "iu" and pixels.dtype.itemsize <= 2:
        return _survey(pixels, np.int64(0), np.iinfo(np.int64).min, top, bottom, left, right)
    return _survey(pixels, np.float64(0), -np.inf, top, bottom, left, right)


@jit
def _survey(pixels: NDArray[Any], zero: Any, lowest: Any, top: int, bottom: int, left: int, right: int) -> Sums:
    height, width = pixels.shape
    count, curved = 0, 0
    total, curvature, squares = zero, zero, zero
    highest, saturated = -np.inf, 0
    first, last = max(left, 1), min(right, width - 1)
    for y in range(top, bottom):
        line = pixels[y, left:right]
        brightest = lowest
        for x in range(len(line)):
            value = line[x] + zero
            known = value == value
            count += known
            total += value if known else zero
            brightest = value if value > brightest else brightest
        if brightest > highest:
            highest, saturated = np.float64(brightest), 0
        if brightest == highest:
            for x in range(len(line)):
                saturated += line[x] + zero == brightest
        if 0 < y < height - 1:
            above, below, middle = pixels[y - 1, first:last], pixels[y + 1, first:last], pixels[y, first:last]
            before, after = pixels[y, first - 1 : last - 1], pixels[y, first + 1 : last + 1]
            for x in range(len(middle)):
                laplacian = above[x] + zero + below[x] + before[x] + after[x] - 4 * (middle[x] + zero)
                known = laplacian == laplacian
                curved += known
                curvature += laplacian if known else zero
                squares += laplacian * laplacian if known else zero
    return count, total, curved, curvature, squares, highest, saturated
