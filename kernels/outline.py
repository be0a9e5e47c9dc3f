"""Trace the outline of an object along the edges of its pixels, exactly: filling the rings gives the object again.

A ring runs through corners of pixels with the object on its right, y pointing down; a corner that it would pass twice
cuts it in two, so that no ring touches itself.  Pixels that meet at a corner only are apart.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._jit import jit

Ring = NDArray[np.int64]
# (dy, dx) of a step to the right, down, to the left, up; and the pixel on the right of such a step, from its start.
_STEPS = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])
_RIGHT_OF = np.array([(0, 0), (0, -1), (-1, -1), (-1, 0)])


def trace(mask: NDArray[np.bool_]) -> list[tuple[Ring, tuple[int, int]]]:
    """The rings of an object.

    Args:
        mask: (h, w), True inside.

    Returns:
        For each ring its corners, (n, 2) int64 y and x from the mask's corner, without those on straight lines and
        without repeating the first; and a pixel of the object on its right.  `signed_area` is positive for an outer
        ring, negative for a hole.
    """
    corners, stops = _trace(np.pad(mask, 1))
    rings = np.split(corners, stops[:-1])
    return [(ring[_turns(ring)], _pixel_beside(ring)) for ring in rings if len(ring)]


def signed_area(ring: Ring) -> float:
    """Pixels inside a ring, negative if it runs round a hole."""
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
    """All corners of all rings in a row, and where each ring ends; ``padded`` has a border of background."""
    height, width = padded.shape
    edges = 0
    for y in range(1, height):
        for x in range(1, width):
            edges += (padded[y, x] != padded[y - 1, x]) + (padded[y, x] != padded[y, x - 1])
    corners = np.empty((edges, 2), np.int64)
    stops = np.empty(edges, np.int64)
    path = np.empty((edges + 1, 2), np.int64)  # of the ring under way
    place = np.full((height, width), -1)  # of each corner in it
    done = np.zeros((height, width), np.bool_)  # steps to the right, by the pixel below
    written, rings = 0, 0
    for top in range(1, height - 1):
        for left in range(1, width - 1):
            if not padded[top, left] or padded[top - 1, left] or done[top, left]:
                continue
            y, x, way, length = top - 1, left - 1, 0, 0
            while True:
                if place[y, x] >= 0:
                    first = place[y, x]
                    for corner in range(first, length):
                        corners[written] = path[corner]
                        place[path[corner, 0], path[corner, 1]] = -1
                        written += 1
                    stops[rings] = written
                    rings += 1
                    length = first
                    if first == 0 and way == 0:  # back where it began, and not only passing by
                        break
                place[y, x] = length
                path[length] = y, x
                length += 1
                if way == 0:
                    done[y + 1, x + 1] = True
                y += _STEPS[way, 0]
                x += _STEPS[way, 1]
                ahead = way
                beside = _RIGHT_OF[ahead]
                opposite = _RIGHT_OF[(ahead + 3) % 4]
                if not padded[y + 1 + beside[0], x + 1 + beside[1]]:
                    way = (ahead + 1) % 4
                elif padded[y + 1 + opposite[0], x + 1 + opposite[1]]:
                    way = (ahead + 3) % 4
    return corners[:written], stops[:rings]
