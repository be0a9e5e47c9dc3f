"""What `stitch` means, in plain numpy: crop the cores of tiles, threshold their logits.

Per pixel it reads one float32 logit (4 bytes) and writes 1 byte.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def stitch_mask(
    logits: NDArray[np.float32], places: NDArray[np.int64], threshold: float, out: NDArray[np.uint8]
) -> tuple[int, int]:
    """Write the mask; arguments as `cellseg_batch.kernels.stitch.stitch_mask`."""
    foreground = missing = 0
    for tile, (from_y, from_x, to_y, to_x, height, width) in enumerate(places):
        core = logits[tile, 0, from_y : from_y + height, from_x : from_x + width]
        mask = core > np.float32(threshold)
        out[to_y : to_y + height, to_x : to_x + width] = mask
        foreground += int(np.count_nonzero(mask))
        missing += int(np.count_nonzero(np.isnan(core)))
    return foreground, missing


def stitch_probability(logits: NDArray[np.float32], places: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
    """Write the probability; arguments as `cellseg_batch.kernels.stitch.stitch_probability`."""
    for tile, (from_y, from_x, to_y, to_x, height, width) in enumerate(places):
        core = logits[tile, 0, from_y : from_y + height, from_x : from_x + width].astype(np.float64)
        probability = 0.5 * (1 + np.tanh(0.5 * np.nan_to_num(core, nan=-np.inf)))
        out[to_y : to_y + height, to_x : to_x + width] = np.floor(255 * probability + 0.5)
