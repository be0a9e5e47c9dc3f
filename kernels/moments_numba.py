"""Compute `moments` in a single fused pass on the CPU, run by run.

A run is a stretch of pixels with the same label in a line; it continues the object above it.  An object with two upper
ends begins two rows of moments, which `merge` adds up like the rows of two blocks, so no table of ids is needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._jit import jit
from cellseg_batch.kernels.moments_columns import (
    AREA,
    BOTTOM,
    CHANNELS,
    HIGH,
    LEFT,
    LOW,
    PER_CHANNEL,
    PROBABILITY,
    RIGHT,
    SQUARES,
    STRAIGHT,
    SUM,
    SUM_X,
    SUM_XX,
    SUM_Y,
    SUM_YX,
    SUM_YY,
    TOP,
)
from cellseg_batch.kernels.moments_reference import OUTLINE_KIND

Rows = NDArray[np.float64]


def measure(
    labels: NDArray[Any], pixels: NDArray[Any], probability: NDArray[np.uint8]
) -> tuple[NDArray[np.uint64], Rows]:
    """Measure every object; as `moments_reference.measure`, but an id may occur more than once."""
    unit = np.float64(1) if pixels.dtype.kind == "f" else np.int64(1)
    return _measure(labels, pixels, unit, probability)


@jit
def _measure(
    labels: NDArray[Any], pixels: NDArray[Any], unit: Any, probability: NDArray[np.uint8]
) -> tuple[NDArray[np.uint64], Rows]:
    height, width = labels.shape[0] - 4, labels.shape[1] - 4
    ids = np.empty(256, np.uint64)
    rows = np.empty((256, CHANNELS + PER_CHANNEL * len(pixels)))
    count = 0
    row_of = np.zeros(width, np.int64)  # row of moments of the last object in each column
    edges = np.zeros((3, width + 4), np.bool_)
    for y in range(1, 3):
        _find_edges(labels, y, edges[y % 3])
    for y in range(height):
        line = labels[y + 2]
        _find_edges(labels, y + 3, edges[(y + 3) % 3])
        x = 0
        while x < width:
            label = line[x + 2]
            start = x
            while x < width and line[x + 2] == label:
                x += 1
            if label == 0:
                continue
            row = -1
            for column in range(start, x):
                if y > 0 and labels[y + 1, column + 2] == label:
                    row = row_of[column]
                    break
            if row < 0:
                if count == len(ids):
                    ids = np.concatenate((ids, np.empty_like(ids)))
                    rows = np.concatenate((rows, np.empty_like(rows)))
                row = count
                count += 1
                ids[row] = label
                _begin(rows[row], y)
            row_of[start:x] = row
            _add_run(rows[row], y, start, x)
            _add_outline(rows[row], labels, edges, y, start, x)
            _add_light(rows[row], pixels, unit, probability, y, start, x)
    for row in range(count):
        _about_corner(rows[row])
    return ids[:count], rows[:count]


@jit
def _find_edges(labels: NDArray[Any], y: int, edge: NDArray[np.bool_]) -> None:
    """Mark the pixels of line ``y`` that have another label above, below or beside them."""
    line, above, below = labels[y], labels[y - 1], labels[y + 1]
    for x in range(1, len(line) - 1):
        label = line[x]
        edge[x] = (label != above[x]) | (label != below[x]) | (label != line[x - 1]) | (label != line[x + 1])


@jit
def _begin(row: Rows, y: int) -> None:
    row[:] = 0
    row[TOP] = y
    row[LEFT] = np.inf
    for base in range(CHANNELS, len(row), PER_CHANNEL):
        row[base + LOW] = np.inf
        row[base + HIGH] = -np.inf


@jit
def _add_run(row: Rows, y: int, start: int, stop: int) -> None:
    """Add area, box and sums of coordinates of columns [start, stop), in closed form."""
    length = stop - start
    sum_x = (start + stop - 1) * length // 2
    squares = ((stop - 1) * stop * (2 * stop - 1) - (start - 1) * start * (2 * start - 1)) // 6
    row[LEFT] = min(row[LEFT], start)
    row[BOTTOM] = y + 1
    row[RIGHT] = max(row[RIGHT], stop)
    row[AREA] += length
    row[SUM_Y] += y * length
    row[SUM_X] += sum_x
    row[SUM_YY] += y * y * length
    row[SUM_YX] += y * sum_x
    row[SUM_XX] += squares


@jit
def _add_outline(row: Rows, labels: NDArray[Any], edges: NDArray[np.bool_], y: int, start: int, stop: int) -> None:
    """Count the outline pixels of a run by their kind."""
    label = labels[y + 2, start + 2]
    above, here, below = labels[y + 1], labels[y + 2], labels[y + 3]
    edge_above, edge, edge_below = edges[(y + 1) % 3], edges[(y + 2) % 3], edges[y % 3]
    for x in range(start + 2, stop + 2):
        if edge[x]:
            sides = np.int64(edge_above[x] and above[x] == label)
            sides += edge_below[x] and below[x] == label
            sides += edge[x - 1] and here[x - 1] == label
            sides += edge[x + 1] and here[x + 1] == label
            corners = np.int64(edge_above[x - 1] and above[x - 1] == label)
            corners += edge_above[x + 1] and above[x + 1] == label
            corners += edge_below[x - 1] and below[x - 1] == label
            corners += edge_below[x + 1] and below[x + 1] == label
            kind = OUTLINE_KIND[sides, corners]
            if kind:
                row[STRAIGHT + kind - 1] += 1


@jit
def _add_light(
    row: Rows, pixels: NDArray[Any], unit: Any, probability: NDArray[np.uint8], y: int, start: int, stop: int
) -> None:
    """Add intensities and probability of a run; ``unit`` is a 1 of the type in which they are summed."""
    for channel in range(len(pixels)):
        low = high = pixels[channel, y, start] * unit
        total = squares = 0 * unit
        for x in range(start, stop):
            value = pixels[channel, y, x] * unit
            total += value
            squares += value * value
            low = min(low, value)
            high = max(high, value)
        base = CHANNELS + PER_CHANNEL * channel
        row[base + SUM] += total
        row[base + SQUARES] += squares
        missing = total != total
        row[base + LOW] = np.nan if missing else min(row[base + LOW], low)
        row[base + HIGH] = np.nan if missing else max(row[base + HIGH], high)
    if probability.size:
        total_probability = 0
        for x in range(start, stop):
            total_probability += probability[y, x]
        row[PROBABILITY] += total_probability


@jit
def _about_corner(row: Rows) -> None:
    """Turn sums about the block's corner into sums about the corner of the object's box."""
    top, left, area, sum_y, sum_x = row[TOP], row[LEFT], row[AREA], row[SUM_Y], row[SUM_X]
    row[SUM_YY] += top * (top * area - 2 * sum_y)
    row[SUM_XX] += left * (left * area - 2 * sum_x)
    row[SUM_YX] += top * left * area - top * sum_x - left * sum_y
    row[SUM_Y] -= top * area
    row[SUM_X] -= left * area
