"""`is_flat` on the CPU, strip by strip, until something is seen: a tile of tissue costs a few rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._jit import jit


@jit
def _add_strip(strip: NDArray[Any], out: NDArray[np.float64]) -> None:
    """Sums of the 4 x 4 cells of four rows; the last one reaches back where the width is no multiple of 4."""
    width = strip.shape[1]
    for cell in range(len(out)):
        start = min(4 * cell, width - 4)
        total = 0.0
        for y in range(4):
            for x in range(4):
                total += strip[y, start + x]
        out[cell] = total


@jit
def is_flat(pixels: NDArray[Any], limit: float) -> bool:
    """Whether a tile shows nothing; arguments as `cellseg_batch.kernels.flat.is_flat`."""
    channels, height, width = pixels.shape
    above, below = np.empty((width + 3) // 4), np.empty((width + 3) // 4)
    for channel in range(channels):
        lowest, highest = np.inf, -np.inf
        for strip in range((height + 3) // 4):
            start = min(4 * strip, height - 4)
            above, below = below, above
            _add_strip(pixels[channel, start : start + 4], below)
            if strip == 0:
                continue
            for cell in range(1, len(below)):
                window = above[cell - 1] + above[cell] + below[cell - 1] + below[cell]
                lowest, highest = min(lowest, window), max(highest, window)
                if window != window:
                    return False
            if not highest - lowest < 64 * limit:
                return False
    return True
