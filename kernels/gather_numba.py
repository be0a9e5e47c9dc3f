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
    low: NDArray[np.float32],
    scale: NDArray[np.float32],
    out: NDArray[np.float32],
    clip: bool,
) -> None:
    """Fill ``out`` with normalised tiles; arguments as `gather.gather`, low and scale (C,)."""
    tiles, channels, height, width = out.shape
    sources = pixels.shape[0]
    lowest, highest = np.float32(0), np.float32(1)
    for tile in range(tiles):
        for channel in range(channels):
            source = channel if sources > 1 else 0
            if source < channel and low[channel] == low[0] and scale[channel] == scale[0]:
                out[tile, channel] = out[tile, 0]
                continue
            zero, factor = low[channel], scale[channel]
            for y in range(height):
                row = rows[tile, y]
                for x in range(width):
                    scaled = (np.float32(pixels[source, row, columns[tile, x]]) - zero) * factor
                    if clip:
                        out[tile, channel, y, x] = min(scaled, highest) if scaled > lowest else lowest
                    else:
                        out[tile, channel, y, x] = lowest if np.isnan(scaled) else scaled
