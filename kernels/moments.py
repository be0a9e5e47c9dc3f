"""Measure labelled objects as sums that can be added up over blocks; every figure of an object follows from its sums.

A row holds the sums over an object in a block.  `merge` adds the rows of an object that several blocks share, which
gives the same result as measuring it in one piece.  For integer pixels all columns are whole numbers below 2^53, so
sums in float64 are exact and do not depend on their order.

The reference defines the meaning; the fused kernel gives the same rows, for integer pixels bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._fastest import fastest
from cellseg_batch.kernels.moments_columns import (
    AREA,
    BOTTOM,
    CHANNELS,
    DIAGONAL,
    HIGH,
    LEFT,
    LOW,
    MIXED,
    PER_CHANNEL,
    RIGHT,
    STRAIGHT,
    SUM_X,
    SUM_XX,
    SUM_Y,
    SUM_YX,
    SUM_YY,
    TOP,
)

HALO = 2
"""Width in px of the surroundings of a block that its perimeters need."""

Ids = NDArray[np.uint64]
Rows = NDArray[np.float64]


def measure(
    labels: NDArray[Any], pixels: NDArray[Any], probability: NDArray[np.uint8] | None, origin: tuple[int, int]
) -> tuple[Ids, Rows]:
    """Measure the part of every object that lies in a block.

    Args:
        labels: (h + 2 * HALO, w + 2 * HALO) unsigned integers, the block and its surroundings; 0 is background, also
            outside the slide.
        pixels: (C, h, w) of the block, any real dtype and memory layout, C >= 0.
        probability: (h, w) of the block, 255 is certain; None counts as 0.
        origin: (y, x) of the block in the slide, in px.

    Returns:
        (n,) ids in ascending order and (n, CHANNELS + PER_CHANNEL * C) rows, see `moments_columns`.

    Raises:
        ValueError: the shapes do not fit together.
    """
    core = labels.shape[0] - 2 * HALO, labels.shape[1] - 2 * HALO
    if pixels.shape[1:] != core or (probability is not None and probability.shape != core):
        shape = None if probability is None else probability.shape
        raise ValueError(f"pixels {pixels.shape} and probability {shape} do not fit labels {labels.shape}")
    wide = pixels.dtype.kind in "iu" and pixels.dtype.itemsize > 2  # squares of wide integers overflow
    # A single memory layout needs a single compiled kernel.
    labels, pixels = np.ascontiguousarray(labels), np.ascontiguousarray(pixels, np.float64 if wide else None)
    ids, rows = fastest(__name__).measure(
        labels, pixels, np.zeros((0, 0), np.uint8) if probability is None else probability
    )
    rows[:, [TOP, BOTTOM]] += origin[0]
    rows[:, [LEFT, RIGHT]] += origin[1]
    return merge(ids, rows)


def merge(ids: Ids, rows: Rows) -> tuple[Ids, Rows]:
    """Add up the rows of each id; ids are in ascending order in the result."""
    order = np.argsort(ids, kind="stable")
    ids, rows = ids[order], rows[order]
    first = np.ones(len(ids), bool)
    first[1:] = ids[1:] != ids[:-1]
    if first.all():
        return ids, rows
    starts, group = np.flatnonzero(first), np.cumsum(first) - 1
    top, left = (np.minimum.reduceat(rows[:, column], starts) for column in (TOP, LEFT))
    _move(rows, top[group], left[group])
    merged = np.add.reduceat(rows, starts)
    for column in (TOP, LEFT, *range(CHANNELS + LOW, rows.shape[1], PER_CHANNEL)):
        merged[:, column] = np.minimum.reduceat(rows[:, column], starts)
    for column in (BOTTOM, RIGHT, *range(CHANNELS + HIGH, rows.shape[1], PER_CHANNEL)):
        merged[:, column] = np.maximum.reduceat(rows[:, column], starts)
    return ids[starts], merged


def perimeter(rows: Rows) -> NDArray[np.float64]:
    """Return the perimeter of each row in px, by the estimator of Benkrid and Crookes as in scikit-image."""
    return rows[:, STRAIGHT] + math.sqrt(2) * rows[:, DIAGONAL] + (1 + math.sqrt(2)) / 2 * rows[:, MIXED]


def axes(rows: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return (major axis in px, minor axis in px, eccentricity) of the ellipse with the second moments of each row."""
    area = rows[:, AREA]
    mean_y, mean_x = rows[:, SUM_Y] / area, rows[:, SUM_X] / area
    yy, xx = rows[:, SUM_YY] / area - mean_y**2, rows[:, SUM_XX] / area - mean_x**2
    yx = rows[:, SUM_YX] / area - mean_y * mean_x
    middle, spread = (yy + xx) / 2, np.hypot((yy - xx) / 2, yx)
    largest, smallest = middle + spread, np.maximum(middle - spread, 0)
    flatness = np.divide(smallest, largest, out=np.ones_like(area), where=largest > 0)
    return 4 * np.sqrt(largest), 4 * np.sqrt(smallest), np.sqrt(1 - flatness)


def _move(rows: Rows, top: NDArray[np.float64], left: NDArray[np.float64]) -> None:
    """Move the sums of coordinates, in place, from the corner of each row's box to (top, left)."""
    down, right = rows[:, TOP] - top, rows[:, LEFT] - left
    area, sum_y, sum_x = rows[:, AREA], rows[:, SUM_Y], rows[:, SUM_X]
    rows[:, SUM_YY] += (2 * sum_y + down * area) * down
    rows[:, SUM_XX] += (2 * sum_x + right * area) * right
    rows[:, SUM_YX] += down * sum_x + right * sum_y + down * right * area
    rows[:, SUM_Y] += down * area
    rows[:, SUM_X] += right * area
