"""Compute `expand` on the CPU: the nearest labelled pixel of each column first, then the nearest of these in a row.

A row is searched from each pixel outwards, until what is left is farther away than what is found.  Beside labels and
result, 4 bytes are held per pixel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._jit import jit


@jit
def expand(labels: NDArray[Any], distance: float, aspect: float) -> NDArray[Any]:
    """Return the expanded labels; arguments as `cellseg_batch.kernels.expand.expand`, ``labels`` contiguous."""
    height, width = labels.shape
    nearest = _nearest_rows(labels)
    expanded = np.zeros_like(labels)
    reach = int(min(distance, width))
    for y in range(height):
        rows = nearest[y]
        for x in range(width):
            if labels[y, x]:
                expanded[y, x] = labels[y, x]
                continue
            least, best = np.inf, -1
            for step in range(reach + 1):
                across = float(step * step)
                if across > least:
                    break
                left, right = x - step, x + step
                # Columns on the left come before all that were looked at, and win if they are as near.
                if left >= 0 and rows[left] >= 0:
                    down = (rows[left] - y) * aspect
                    if down * down + across <= least:
                        least, best = down * down + across, left
                if right < width and rows[right] >= 0:
                    down = (rows[right] - y) * aspect
                    if down * down + across < least:
                        least, best = down * down + across, right
            if np.sqrt(least) <= distance:
                expanded[y, x] = labels[rows[best], best]
    return expanded


@jit
def _nearest_rows(labels: NDArray[Any]) -> NDArray[np.int32]:
    """Row of the labelled pixel of the same column that is nearest to each pixel, the upper of two; -1 without one."""
    height, width = labels.shape
    rows = np.empty((height, width), np.int32)
    last = np.full(width, -1, np.int32)
    for y in range(height):
        for x in range(width):
            if labels[y, x]:
                last[x] = y
            rows[y, x] = last[x]
    last[:] = -1
    for y in range(height - 1, -1, -1):
        for x in range(width):
            if labels[y, x]:
                last[x] = y
            if last[x] >= 0 and (rows[y, x] < 0 or last[x] - y < y - rows[y, x]):
                rows[y, x] = last[x]
    return rows
