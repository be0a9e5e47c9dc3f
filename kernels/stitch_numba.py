"""`stitch` as one fused pass on the CPU."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._jit import jit


@jit
def stitch_mask(
    logits: NDArray[np.float32], places: NDArray[np.int64], threshold: np.float32, out: NDArray[np.uint8]
) -> tuple[int, int]:
    """Write the mask; arguments as `cellseg_batch.kernels.stitch.stitch_mask`."""
    foreground = 0
    missing = 0
    for tile in range(len(places)):
        from_y, from_x, to_y, to_x, height, width = places[tile]
        for y in range(height):
            for x in range(width):
                logit = logits[tile, 0, from_y + y, from_x + x]
                inside = logit > threshold
                out[to_y + y, to_x + x] = inside
                foreground += inside
                missing += logit != logit
    return foreground, missing


@jit
def stitch_probability(logits: NDArray[np.float32], places: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
    """Write the probability; arguments as `cellseg_batch.kernels.stitch.stitch_probability`."""
    for tile in range(len(places)):
        from_y, from_x, to_y, to_x, height, width = places[tile]
        for y in range(height):
            for x in range(width):
                logit = logits[tile, 0, from_y + y, from_x + x]
                probability = np.float32(0)
                if logit == logit:
                    probability = np.float32(1) / (np.float32(1) + np.float32(math.exp(-logit)))
                out[to_y + y, to_x + x] = np.uint8(np.float32(255) * probability + np.float32(0.5))
