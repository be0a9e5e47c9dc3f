"""Trace the outline of an object exactly along the edges of its pixels: filling the rings gives the object again.

A ring runs through corners of pixels with the object on its right, y pointing down.  A ring that would pass a corner
twice is cut in two there, so that no ring touches itself.  Pixels that meet only at a corner count as apart.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._jit import jit

Ring = NDArray[np.int64]
# (dy, dx) of a step right, down, left and up, and of the pixel on the right of such a step from the step's start.
_STEPS = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])
_RIGHT_OF = np.array([(0, 0), (0, -1), (-1, -1), (-1, 0)])


def trace(mask: NDArray[np.bool_]) -> list[tuple[Ring, tuple[int, int]]]:
    """Return the rings of an object.

    Args:
        mask: (h, w), True inside.

    Returns:
        For each ring (corners, pixel).  The corners are (n, 2) int64, y and x in px from the mask's corner, without
        corners on straight lines and without a repeated first corner.  The pixel is (y, x) of an object pixel on the
        ring's right.  `signed_area` is positive for an outer ring, negative for a hole.
    """
    corners, stops = _trace(np.pad(mask, 1))
    rings = np.split(corners, stops[:-1])
    return [(ring[_turns(ring)], _pixel_beside(ring)) for ring in rings if len(ring)]


def signed_area(ring: Ring) -> float:
    """Return the number of pixels inside a ring, negative if it runs round a hole."""
    y, x = ring.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2


def _turns(ring: Ring) -> NDArray[np.bool_]:
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turns: NDArray[np.bool_] = (before != after).any(axis=1)
    return turns


def _pixel_beside(ring: Ring) -> tuple[int, int]:
    step = ring[1] - ring[0]
    y, x = ring[0] + _RIGHT_OF[int(np.flatnonzero((step == _STEPS).all(axis=1))[0])]
    return int(y), int(x)


@jit
def _trace(padded: NDArray[np.bool_]) -> tuple[Ring, NDArray[np.int64]]:
    """Return the corners of all rings in a row, and each ring's end; ``padded`` has a background border of 1 px."""
    height, width = padded.shape
    edges = 0
    for y in range(1, height):
        for x in range(1, width):
            edges += (padded[y, x] != padded[y - 1, x]) + (padded[y, x] != padded[y, x - 1])
    corners = np.empty((edges, 2), np.int64)
    stops = np.empty(edges, np.int64)
    path = np.empty((edges + 1, 2), np.int64)  # corners of the current ring
    position = np.full((height, width), -1)  # index of each corner in the path, -1 if it is not there
    done = np.zeros((height, width), np.bool_)  # pixels whose top edge was traced, as a step to the right
    written, rings = 0, 0
    for top in range(1, height - 1):
        for left in range(1, width - 1):
            if not padded[top, left] or padded[top - 1, left] or done[top, left]:
                continue
            y, x, direction, length = top - 1, left - 1, 0, 0
            while True:
                if position[y, x] >= 0:
                    first = position[y, x]
                    for corner in range(first, length):
                        corners[written] = path[corner]
                        position[path[corner, 0], path[corner, 1]] = -1
                        written += 1
                    stops[rings] = written
                    rings += 1
                    length = first
                    if first == 0 and direction == 0:  # back at the first corner and about to repeat the first step
                        break
                position[y, x] = length
                path[length] = y, x
                length += 1
                if direction == 0:
                    done[y + 1, x + 1] = True
                y += _STEPS[direction, 0]
                x += _STEPS[direction, 1]
                ahead = direction
                right = _RIGHT_OF[ahead]
                opposite = _RIGHT_OF[(ahead + 3) % 4]
                if not padded[y + 1 + right[0], x + 1 + right[1]]:
                    direction = (ahead + 1) % 4
                elif padded[y + 1 + opposite[0], x + 1 + opposite[1]]:
                    direction = (ahead + 3) % 4
    return corners[:written], stops[:rings]
