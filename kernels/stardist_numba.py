"""Compute `stardist` on the CPU: stars become runs of pixels, and meet in cells of a few pixels.

Only stars that stand, open ones and survivors, are kept: their runs, and an entry in every cell that their boxes touch.
A pair is compared in the one cell that holds the corner where its boxes begin to overlap.  In a cell the higher ranks
come first, and they suppress most, so few pairs are compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._jit import jit
from cellseg_batch.kernels.stardist import OPEN, SUPPRESSED, SURVIVOR
from cellseg_batch.kernels.stardist_reference import directions

if TYPE_CHECKING:
    from cellseg_batch.kernels.stardist import Stars

# Side of a cell in px, about the width of a nucleus.
_CELL = 32

Runs = NDArray[np.int16]
Places = NDArray[np.int32]
Floats = NDArray[np.float64]


class _Shapes(NamedTuple):
    """The pixels of the stars that stand; the entries of other stars are meaningless."""

    y: Places
    x: Places
    boxes: NDArray[np.int32]
    """(n, 4) y0, x0, y1, x1, half-open."""
    areas: NDArray[np.int64]
    spans: NDArray[np.int64]
    """(n, 2) half-open range of each star's runs."""


class _Cells(NamedTuple):
    """The stars in every cell: a list of entries from the highest rank down, each of which names a star."""

    corner: tuple[int, int]
    firsts: NDArray[np.int32]
    """(rows, columns) first entry of each cell; -1 for none."""
    lasts: NDArray[np.int32]
    """(rows, columns) last entry of each cell."""
    followers: NDArray[np.int32]
    """The next entry of each entry; -1 for none."""
    members: NDArray[np.int32]
    """The star of each entry."""


def suppress(stars: Stars, states: NDArray[np.uint8], exposed: NDArray[np.bool_], threshold: float) -> None:
    """Decide the open ones of ``states``; arguments as `cellseg_batch.kernels.stardist.suppress`."""
    if not len(states):
        return
    reaches = np.ceil(stars.rays.max(axis=1)).astype(np.int64) + 1
    reach = int(reaches.max())
    corner = int(stars.y.min()) - reach, int(stars.x.min()) - reach
    sides = (
        (values.max() + reach - start) // _CELL + 1 for values, start in zip((stars.y, stars.x), corner, strict=True)
    )
    firsts = np.full(tuple(map(int, sides)), -1, np.int32)
    # A star touches at most so many cells.
    entries = int(np.square(2 * reaches // _CELL + 2).sum())
    cells = _Cells(corner, firsts, firsts.copy(), np.empty(entries, np.int32), np.empty(entries, np.int32))
    count = len(states)
    areas, spans = np.empty(count, np.int64), np.empty((count, 2), np.int64)
    shapes = _Shapes(stars.y, stars.x, np.empty((count, 4), np.int32), areas, spans)
    _suppress(shapes, cells, stars.rays, *directions(stars.rays.shape[1]), reach, states, exposed, threshold)


def draw(stars: Stars, ids: NDArray[Any], out: NDArray[Any]) -> None:
    """Draw the stars; arguments as `cellseg_batch.kernels.stardist.draw`."""
    if len(ids):
        _draw(stars.y, stars.x, stars.rays, *directions(stars.rays.shape[1]), ids, out)


@jit
def _suppress(
    shapes: _Shapes,
    cells: _Cells,
    rays: NDArray[np.float32],
    sines: Floats,
    cosines: Floats,
    reach: int,
    states: NDArray[np.uint8],
    exposed: NDArray[np.bool_],
    threshold: float,
) -> None:
    crossings, crossed = np.empty((2 * reach, len(sines)), np.int32), np.empty(2 * reach, np.int32)
    most_runs = reach * len(sines)
    # Runs (y, start, stop) from each star's centre, one star after the other.
    runs, held, entries = np.empty((8 * most_runs, 3), np.int16), 0, 0
    for star in range(len(states)):
        if states[star] == SUPPRESSED:
            continue
        if held + most_runs > len(runs):
            runs = np.concatenate((runs, np.empty_like(runs)))
        stop = _rasterise(rays[star], sines, cosines, crossings, crossed, runs, held)
        shapes.spans[star, 0], shapes.spans[star, 1] = held, stop
        shapes.areas[star] = _measure(runs[held:stop], shapes.y[star], shapes.x[star], shapes.boxes[star])
        if states[star] == OPEN:
            states[star] = _decide(shapes, cells, runs, states, star, exposed[star], threshold)
        if states[star] != SUPPRESSED:
            held = stop
            entries = _enter(cells, shapes.boxes[star], star, entries)


@jit
def _decide(
    shapes: _Shapes,
    cells: _Cells,
    runs: Runs,
    states: NDArray[np.uint8],
    star: int,
    exposed: bool,
    threshold: float,
) -> int:
    """The state of a star that stands unless a star of higher rank says otherwise."""
    state = OPEN if exposed else SURVIVOR
    top, left, bottom, right = _touched(cells, shapes.boxes[star])
    for row in range(top, bottom):
        for column in range(left, right):
            entry = cells.firsts[row, column]
            while entry >= 0:
                other = cells.members[entry]
                entry = cells.followers[entry]
                if state == OPEN and states[other] == OPEN:
                    continue
                y = max(shapes.boxes[star, 0], shapes.boxes[other, 0])
                x = max(shapes.boxes[star, 1], shapes.boxes[other, 1])
                if (y - cells.corner[0]) // _CELL != row or (x - cells.corner[1]) // _CELL != column:
                    continue
                if _overlap(shapes, runs, star, other, threshold):
                    if states[other] == SURVIVOR:
                        return SUPPRESSED
                    state = OPEN
    return state


@jit
def _touched(cells: _Cells, box: NDArray[np.int32]) -> tuple[int, int, int, int]:
    """The rows and columns of the cells that a box touches: first row, first column, and those behind the last."""
    top, left = cells.corner
    return (
        (box[0] - top) // _CELL,
        (box[1] - left) // _CELL,
        (box[2] - 1 - top) // _CELL + 1,
        (box[3] - 1 - left) // _CELL + 1,
    )


@jit
def _enter(cells: _Cells, box: NDArray[np.int32], star: int, entries: int) -> int:
    """Add a star at the end of the cells that its box touches; the number of entries, of which there were some."""
    top, left, bottom, right = _touched(cells, box)
    for row in range(top, bottom):
        for column in range(left, right):
            cells.members[entries], cells.followers[entries] = star, -1
            if cells.firsts[row, column] < 0:
                cells.firsts[row, column] = entries
            else:
                cells.followers[cells.lasts[row, column]] = entries
            cells.lasts[row, column] = entries
            entries += 1
    return entries


@jit
def _overlap(shapes: _Shapes, runs: Runs, star: int, other: int, threshold: float) -> bool:
    """Whether the overlap of two stars is above a threshold; the area that their boxes share bounds it."""
    own, others = shapes.boxes[star], shapes.boxes[other]
    height = min(own[2], others[2]) - max(own[0], others[0])
    width = min(own[3], others[3]) - max(own[1], others[1])
    smaller = min(shapes.areas[star], shapes.areas[other])
    if height <= 0 or width <= 0 or not height * width / smaller > threshold:
        return False
    shift = shapes.y[star] - shapes.y[other], shapes.x[star] - shapes.x[other]
    own_runs = runs[shapes.spans[star, 0] : shapes.spans[star, 1]]
    other_runs = runs[shapes.spans[other, 0] : shapes.spans[other, 1]]
    above: bool = _common(other_runs, own_runs, shift) / smaller > threshold
    return above


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
