"""Compute `stardist` on the CPU: stars become runs of pixels, and meet in cells of a few pixels.

Only stars that stand, open ones and survivors, are kept: their runs, and an entry in every cell that their boxes touch.
A pair is compared in the one cell that holds the corner where its boxes begin to overlap.  In a cell the higher ranks
come first, and they suppress most, so few pairs are compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._jit import jit
from cellseg_batch.kernels.stardist_reference import directions

if TYPE_CHECKING:
    from cellseg_batch.kernels.stardist import Stars

_SUPPRESSED, _OPEN, _SURVIVOR = 0, 1, 2
# Side of a cell in px, about the width of a nucleus.
_CELL = 32

Runs = NDArray[np.int16]
Places = NDArray[np.int32]
Floats = NDArray[np.float64]


def suppress(stars: Stars, states: NDArray[np.uint8], exposed: NDArray[np.bool_], threshold: float) -> None:
    """Decide the open ones of ``states``; arguments as `cellseg_batch.kernels.stardist.suppress`."""
    if len(states):
        _suppress(stars.y, stars.x, stars.rays, *directions(stars.rays.shape[1]), states, exposed, threshold)


def draw(stars: Stars, ids: NDArray[Any], out: NDArray[Any]) -> None:
    """Draw the stars; arguments as `cellseg_batch.kernels.stardist.draw`."""
    if len(ids):
        _draw(stars.y, stars.x, stars.rays, *directions(stars.rays.shape[1]), ids, out)


@jit
def _suppress(
    y: Places,
    x: Places,
    rays: NDArray[np.float32],
    sines: Floats,
    cosines: Floats,
    states: NDArray[np.uint8],
    exposed: NDArray[np.bool_],
    threshold: float,
) -> None:
    count, reach = len(states), int(np.ceil(rays.max())) + 1
    top, left = y.min() - reach, x.min() - reach
    rows, columns = (y.max() + reach - top) // _CELL + 1, (x.max() + reach - left) // _CELL + 1
    # Each cell is a list of entries, from the first to the last; an entry names a star.
    firsts, lasts = np.full((rows, columns), -1, np.int32), np.full((rows, columns), -1, np.int32)
    followers, members, entries = np.empty(1024, np.int32), np.empty(1024, np.int32), 0
    crossings, crossed = np.empty((2 * reach, len(sines)), np.int32), np.empty(2 * reach, np.int32)
    # Runs (y, start, stop) of the standing stars, from each star's centre, one star after the other.
    most_runs = reach * len(sines)
    runs, held = np.empty((8 * most_runs, 3), np.int16), 0
    spans, areas, boxes = np.empty((count, 2), np.int64), np.empty(count, np.int64), np.empty((count, 4), np.int32)
    for star in range(count):
        if states[star] == _SUPPRESSED:
            continue
        if held + most_runs > len(runs):
            runs = np.concatenate((runs, np.empty_like(runs)))
        stop = _rasterise(rays[star], sines, cosines, crossings, crossed, runs, held)
        own = runs[held:stop]
        spans[star, 0], spans[star, 1] = held, stop
        areas[star] = _measure(own, y[star], x[star], boxes[star])
        box = boxes[star]
        cell_rows = range((box[0] - top) // _CELL, (box[2] - 1 - top) // _CELL + 1)
        cell_columns = range((box[1] - left) // _CELL, (box[3] - 1 - left) // _CELL + 1)
        if states[star] == _OPEN:
            states[star] = _OPEN if exposed[star] else _SURVIVOR
            for row in cell_rows:
                for column in cell_columns:
                    entry = firsts[row, column]
                    while entry >= 0 and states[star] != _SUPPRESSED:
                        other = members[entry]
                        entry = followers[entry]
                        if states[star] == _OPEN and states[other] == _OPEN:
                            continue
                        other_box = boxes[other]
                        y0, x0 = max(box[0], other_box[0]), max(box[1], other_box[1])
                        if (y0 - top) // _CELL != row or (x0 - left) // _CELL != column:
                            continue
                        smaller = min(areas[star], areas[other])
                        most = (min(box[2], other_box[2]) - y0) * (min(box[3], other_box[3]) - x0)
                        if y0 >= other_box[2] or x0 >= other_box[3] or not most / smaller > threshold:
                            continue
                        shift = y[star] - y[other], x[star] - x[other]
                        common = _common(runs[spans[other, 0] : spans[other, 1]], own, shift)
                        if common / smaller > threshold:
                            states[star] = _SUPPRESSED if states[other] == _SURVIVOR else _OPEN
            if states[star] == _SUPPRESSED:
                continue
        held = stop
        needed = entries + len(cell_rows) * len(cell_columns)
        while needed > len(members):
            followers = np.concatenate((followers, np.empty_like(followers)))
            members = np.concatenate((members, np.empty_like(members)))
        for row in cell_rows:
            for column in cell_columns:
                members[entries], followers[entries] = star, -1
                if firsts[row, column] < 0:
                    firsts[row, column] = entries
                else:
                    followers[lasts[row, column]] = entries
                lasts[row, column] = entries
                entries += 1


@jit
def _rasterise(
    rays: NDArray[np.float32],
    sines: Floats,
    cosines: Floats,
    crossings: NDArray[np.int32],
    crossed: NDArray[np.int32],
    runs: Runs,
    start: int,
) -> int:
    """Write the runs of a star from ``start`` on, ordered by y and start; return the end of its runs.

    ``crossings`` (2 reach, R) and ``crossed`` (2 reach,) are room for the first pixel behind each edge, row by row.
    """
    reach, count = len(crossed) // 2, len(rays)
    y0, x0 = rays[count - 1] * sines[count - 1], rays[count - 1] * cosines[count - 1]
    first = last = row0 = int(np.ceil(y0)) + reach
    for ray in range(count):
        y1, x1 = rays[ray] * sines[ray], rays[ray] * cosines[ray]
        row1 = int(np.ceil(y1)) + reach
        # The rows that are reached for the first time lie above or below all others.
        crossed[row1:first] = 0
        crossed[last:row1] = 0
        first, last = min(first, row1), max(last, row1)
        if row0 != row1:
            slope = (x1 - x0) / (y1 - y0)
            for row in range(min(row0, row1), max(row0, row1)):
                pixel = int(np.ceil(x0 + (row - reach - y0) * slope))
                place = crossed[row]
                while place > 0 and crossings[row, place - 1] > pixel:
                    crossings[row, place] = crossings[row, place - 1]
                    place -= 1
                crossings[row, place] = pixel
                crossed[row] += 1
        y0, x0, row0 = y1, x1, row1
    stop = start
    for row in range(first, last):
        for place in range(0, crossed[row], 2):
            if crossings[row, place] < crossings[row, place + 1]:
                runs[stop, 0] = row - reach
                runs[stop, 1], runs[stop, 2] = crossings[row, place], crossings[row, place + 1]
                stop += 1
    return stop


@jit
def _measure(runs: Runs, y: int, x: int, box: NDArray[np.int32]) -> int:
    """Write the box (y0, x0, y1, x1) of a star, and return its area in px."""
    box[0], box[2] = y + runs[0, 0], y + runs[-1, 0] + 1
    box[1], box[3] = x + runs[0, 1], x + runs[0, 2]
    area = 0
    for run in range(len(runs)):
        area += runs[run, 2] - runs[run, 1]
        box[1], box[3] = min(box[1], x + runs[run, 1]), max(box[3], x + runs[run, 2])
    return area


@jit
def _common(runs: Runs, others: Runs, shift: tuple[int, int]) -> int:
    """The number of pixels that two stars share; the others' centre lies ``shift`` (y, x) px from that of the first."""
    common = run = other = 0
    while run < len(runs) and other < len(others):
        rows = others[other, 0] + shift[0] - runs[run, 0]
        start = max(runs[run, 1], others[other, 1] + shift[1])
        stop = min(runs[run, 2], others[other, 2] + shift[1])
        if rows == 0 and start < stop:
            common += stop - start
        if rows > 0 or (rows == 0 and runs[run, 2] <= others[other, 2] + shift[1]):
            run += 1
        else:
            other += 1
    return common


@jit
def _draw(
    y: Places,
    x: Places,
    rays: NDArray[np.float32],
    sines: Floats,
    cosines: Floats,
    ids: NDArray[Any],
    out: NDArray[Any],
) -> None:
    reach = int(np.ceil(rays.max())) + 1
    crossings, crossed = np.empty((2 * reach, len(sines)), np.int32), np.empty(2 * reach, np.int32)
    runs = np.empty((reach * len(sines), 3), np.int16)
    for star in range(len(ids) - 1, -1, -1):
        for run in range(_rasterise(rays[star], sines, cosines, crossings, crossed, runs, 0)):
            row = y[star] + runs[run, 0]
            if 0 <= row < out.shape[0]:
                out[row, max(x[star] + runs[run, 1], 0) : max(x[star] + runs[run, 2], 0)] = ids[star]
