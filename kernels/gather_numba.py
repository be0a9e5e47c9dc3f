"""Compute `gather` in a single fused pass on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._jit import jit


@jit
def gather(
    pixels: NDArray[Any],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    low: np.float32,
    scale: np.float32,
    out: NDArray[np.float32],
) -> None:
    """Fill ``out`` with normalised tiles; arguments as `cellseg_batch.kernels.gather.gather`."""
    tiles, channels, height, width = out.shape
    sources = pixels.shape[0]
    lowest, highest = np.float32(0), np.float32(1)
    for tile in range(tiles):
        for source in range(sources):
            for y in range(height):
                row = rows[tile, y]
                for x in range(width):
                    scaled = (np.float32(pixels[source, row, columns[tile, x]]) - low) * scale
                    out[tile, source, y, x] = min(scaled, highest) if scaled > lowest else lowest
        for channel in range(sources, channels):
            out[tile, channel] = out[tile, 0]
