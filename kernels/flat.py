"""Find flat tiles, which need not go through the network.

The reference defines the meaning.  This form gives the same answer.  It sums bytes as small integers and stops at the
first strip that is not flat, so a tile of tissue costs a single strip.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

# Height of a strip in px; its sums stay in the processor's cache.
_STRIP = 64
# Dtype that holds the sum of 64 unsigned values of that many bytes; other pixels are summed as float64.
_SUMS: dict[int, DTypeLike] = {1: np.uint16, 2: np.uint32}


def is_flat(pixels: NDArray[Any], limit: float) -> bool:
    """Whether the means of all windows of 8 x 8 px differ by less than ``limit``, in every channel.

    The windows lie 4 px apart, so that some window shows a small object nearly alone; their means suppress single noisy
    pixels.

    Args:
        pixels: (S, h, w), any real dtype and memory layout.
        limit: difference of pixel values; if 0, no tile is flat.

    Returns:
        True if flat; False if an axis has fewer than 8 px, or if a pixel is NaN or infinite.
    """
    channels, height, width = pixels.shape
    if min(height, width) < 8:
        return False
    sums = _SUMS.get(pixels.itemsize, np.float64) if pixels.dtype.kind == "u" else np.float64
    lowest, highest = np.full(channels, np.inf), np.full(channels, -np.inf)
    for top in range(0, height - 4, _STRIP):
        strip = pixels[:, top : top + _STRIP + 4]  # the last window reaches into the next strip
        rows = _sums_of_four(strip.swapaxes(0, 1), sums)
        for channel in range(channels):
            cells = _sums_of_four(rows[:, channel].T, sums)
            pairs = cells[1:] + cells[:-1]
            windows = pairs[:, 1:] + pairs[:, :-1]
            lowest[channel] = np.minimum(lowest[channel], windows.min())
            highest[channel] = np.maximum(highest[channel], windows.max())
            with np.errstate(invalid="ignore"):  # infinity minus infinity
                if not highest[channel] - lowest[channel] < 64 * limit:
                    return False
    return True


def _sums_of_four(values: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """Sum every four values along the first axis; the last sum takes the last four even if they overlap."""
    whole = len(values) // 4 * 4
    sums: NDArray[Any] = np.add(values[0:whole:4], values[1:whole:4], dtype=dtype)
    sums += np.add(values[2:whole:4], values[3:whole:4], dtype=dtype)
    if whole < len(values):
        sums = np.concatenate([sums, values[-4:].sum(axis=0, dtype=dtype, keepdims=True)])
    return sums
