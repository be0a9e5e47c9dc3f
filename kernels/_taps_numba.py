"""Convolve rows of integers with short kernels, along a row or down the columns of some rows.

A kernel is given by half of its weights, from the centre on, in units of 2 ** -14; its taps lie ``spacing`` px apart.
A *sum* mirrors the weights (an even kernel), a *difference* also changes their sign (an odd one, whose centre is 0): it
is positive where values rise.  Results are rounded.  A row is longer than ``out`` by the kernel's reach on either side;
a *ring* holds the row of line i in slot i modulo its length.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._jit import jit
from cellseg_batch.kernels.instances import ONE_BITS

Ints = NDArray[np.int32]


@jit
def sum_row(row: Ints, weights: Ints, spacing: int, out: Ints) -> None:
    """Convolve a row with an even kernel."""
    reach = (len(weights) - 1) * spacing
    _begin(weights[0], row[reach:], out)
    for tap in range(1, len(weights)):
        _add_sum(weights[tap], row[reach - tap * spacing :], row[reach + tap * spacing :], out)
    _shift(out)


@jit
def sum_column(ring: Ints, line: int, weights: Ints, spacing: int, out: Ints) -> None:
    """Convolve the columns around a line with an even kernel."""
    _begin(weights[0], ring[line % len(ring)], out)
    for tap in range(1, len(weights)):
        step = tap * spacing
        _add_sum(weights[tap], ring[(line - step) % len(ring)], ring[(line + step) % len(ring)], out)
    _shift(out)


@jit
def difference_row(row: Ints, weights: Ints, spacing: int, out: Ints) -> None:
    """Convolve a row with an odd kernel."""
    reach = (len(weights) - 1) * spacing
    _begin(weights[0], row[reach:], out)
    for tap in range(1, len(weights)):
        _add_difference(weights[tap], row[reach - tap * spacing :], row[reach + tap * spacing :], out)
    _shift(out)


@jit
def difference_column(ring: Ints, line: int, weights: Ints, spacing: int, out: Ints) -> None:
    """Convolve the columns around a line with an odd kernel."""
    _begin(weights[0], ring[line % len(ring)], out)
    for tap in range(1, len(weights)):
        step = tap * spacing
        _add_difference(weights[tap], ring[(line - step) % len(ring)], ring[(line + step) % len(ring)], out)
    _shift(out)


@jit
def _begin(weight: np.int32, centre: Ints, out: Ints) -> None:
    half = np.int32(1 << (ONE_BITS - 1))
    for x in range(len(out)):
        out[x] = weight * centre[x] + half


@jit
def _add_sum(weight: np.int32, before: Ints, after: Ints, out: Ints) -> None:
    for x in range(len(out)):
        out[x] += weight * (after[x] + before[x])


@jit
def _add_difference(weight: np.int32, before: Ints, after: Ints, out: Ints) -> None:
    for x in range(len(out)):
        out[x] += weight * (after[x] - before[x])


@jit
def _shift(out: Ints) -> None:
    for x in range(len(out)):
        out[x] >>= ONE_BITS
