"""Compute `instances` on the CPU in single passes: smooth in a ring of rows, label by runs, grow by a front."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._jit import jit
from cellseg_batch.kernels._taps_numba import sum_column, sum_row
from cellseg_batch.kernels.instances import TABLE_RANGE, TABLE_STEPS

if TYPE_CHECKING:
    from cellseg_batch.kernels.instances import SeedRule

Logits = NDArray[np.float32]
_MIDDLE = TABLE_RANGE * TABLE_STEPS
_SCALE, _OFFSET, _LAST = np.float32(TABLE_STEPS), np.float32(_MIDDLE + 0.5), np.float32(2 * _MIDDLE)


@jit
def _score_row(distance: Logits, border: Logits, rule: SeedRule, first: int, row: NDArray[np.int32]) -> None:
    """Fill ``row`` with distance minus border, from column ``first`` of the logits on; the tile's ends are repeated."""
    last = len(distance) - 1
    for i in range(len(row)):
        x = min(max(first + i, 0), last)
        high, low = distance[x] * _SCALE + _OFFSET, border[x] * _SCALE + _OFFSET
        high = high if high > 0 else np.float32(0)  # also where it is NaN
        low = low if low > 0 else np.float32(0)
        row[i] = rule.distance[int(min(high, _LAST))] - rule.border[int(min(low, _LAST))]


@jit
def classify_pixels(
    logits: Logits, places: NDArray[np.int64], rule: SeedRule, out: NDArray[np.uint8]
) -> tuple[int, int]:
    """Write the pixel codes; arguments as `cellseg_batch.kernels.instances.classify_pixels`."""
    radius = (len(rule.weights) - 1) * rule.spacing
    size = 2 * radius + 1
    foreground = 0
    missing = 0
    for tile in range(len(places)):
        from_y, from_x, to_y, to_x, height, width = places[tile]
        border, distance = logits[tile, 1], logits[tile, 2]
        ring, held = np.empty((size, width), np.int32), np.full(size, -size)
        row, score = np.empty(width + 2 * radius, np.int32), np.empty(width, np.int32)
        for y in range(height):
            mask, target = logits[tile, 0, from_y + y, from_x : from_x + width], out[to_y + y, to_x : to_x + width]
            inside = 0
            for x in range(width):
                far, near = distance[from_y + y, from_x + x], border[from_y + y, from_x + x]
                missing += (mask[x] != mask[x]) | (far != far) | (near != near)
                inside += mask[x] > rule.foreground
                target[x] = 0
            foreground += inside
            if inside == 0:
                continue
            for line in range(y - radius, y + radius + 1, rule.spacing):
                if held[line % size] != line:
                    source = min(max(from_y + line, 0), logits.shape[2] - 1)
                    _score_row(distance[source], border[source], rule, from_x - radius, row)
                    sum_row(row, rule.weights, rule.spacing, ring[line % size])
                    held[line % size] = line
            sum_column(ring, y, rule.weights, rule.spacing, score)
            for x in range(width):
                if mask[x] > rule.foreground:
                    target[x] = 1 + (score[x] > rule.border_level) + (score[x] > rule.seed_level)
    return foreground, missing


def label_seeds(
    pixel_codes: NDArray[np.uint8],
    cell: tuple[int, int],
    smallest: int,
    open_sides: tuple[bool, bool, bool, bool],
    out: NDArray[np.uint32],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number the components; arguments as `cellseg_batch.kernels.instances.label_seeds`."""
    runs = _find_runs(pixel_codes)
    component, first, area, touching = _join_runs(runs, pixel_codes.shape, open_sides)
    seeds = np.flatnonzero(touching | (area >= smallest))
    seed_first, width = first[seeds], pixel_codes.shape[1]
    cells = seed_first // width // cell[0] * -(-width // cell[1]) + seed_first % width // cell[1]
    order = seeds[np.lexsort((seed_first, cells))]
    codes = np.full(len(first), 2, np.uint32)
    codes[order] = np.arange(3, 3 + len(order), dtype=np.uint32)
    _write_codes(pixel_codes, runs, codes[component], out)
    return first[order], area[order]


@jit
def _find_runs(pixel_codes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return (row, start, stop) of every run of seed pixels in a row, in raster order."""
    height, width = pixel_codes.shape
    count = 0
    for y in range(height):
        row = pixel_codes[y]
        count += row[0] == 3
        for x in range(1, width):
            count += (row[x] == 3) & (row[x - 1] != 3)
    runs = np.empty((count, 3), np.int64)
    count = 0
    for y in range(height):
        x = 0
        while x < width:
            if pixel_codes[y, x] != 3:
                x += 1
                continue
            runs[count, 0], runs[count, 1] = y, x
            while x < width and pixel_codes[y, x] == 3:
                x += 1
            runs[count, 2] = x
            count += 1
    return runs


@jit
def _root(parent: NDArray[np.int64], run: int) -> int:
    while parent[run] != run:
        parent[run] = parent[parent[run]]
        run = parent[run]
    return run


@jit
def _join_runs(
    runs: NDArray[np.int64], shape: tuple[int, int], open_sides: tuple[bool, bool, bool, bool]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Return the component of each run, and each component's first pixel, area, and whether it touches an open side."""
    parent = np.arange(len(runs))
    above = 0
    for run in range(len(runs)):
        y, start, stop = runs[run]
        while runs[above, 0] < y - 1 or (runs[above, 0] == y - 1 and runs[above, 2] <= start):
            above += 1
        upper = above
        while runs[upper, 0] == y - 1 and runs[upper, 1] < stop:
            a, b = _root(parent, run), _root(parent, upper)
            parent[max(a, b)] = min(a, b)  # the root is the first run
            upper += 1
    component = np.empty(len(runs), np.int64)
    first, area = np.empty(len(runs), np.int64), np.zeros(len(runs), np.int64)
    touching = np.zeros(len(runs), np.bool_)
    count = 0
    for run in range(len(runs)):
        y, start, stop = runs[run]
        if parent[run] == run:
            component[run] = count
            first[count] = y * shape[1] + start
            count += 1
        else:
            component[run] = component[parent[run]]
        own = component[run]
        area[own] += stop - start
        touching[own] |= (open_sides[0] and y == 0) or (open_sides[2] and y == shape[0] - 1)
        touching[own] |= (open_sides[1] and start == 0) or (open_sides[3] and stop == shape[1])
    return component, first[:count], area[:count], touching[:count]


@jit
def _write_codes(
    pixel_codes: NDArray[np.uint8], runs: NDArray[np.int64], codes: NDArray[np.uint32], out: NDArray[np.uint32]
) -> None:
    out[:] = pixel_codes
    for run in range(len(runs)):
        y, start, stop = runs[run]
        out[y, start:stop] = codes[run]


@jit
def renumber(codes: NDArray[np.uint32], final: NDArray[Any], out: NDArray[Any]) -> None:
    """Write the final codes; arguments as `cellseg_batch.kernels.instances.renumber`."""
    for y in range(codes.shape[0]):
        row, target = codes[y], out[y]
        for x in range(len(row)):
            target[x] = final[row[x]]


@jit
def grow(codes: NDArray[Any], steps: int, out: NDArray[Any]) -> None:
    """Grow the seeds; arguments as `cellseg_batch.kernels.instances.grow`."""
    frame = 2 * steps + 1
    _close(codes[0])
    _close(codes[-1])
    _close(codes[:, 0])
    _close(codes[:, -1])
    for lowest_code in (2, 1):
        front = _front(codes, lowest_code)
        for step in range(1, steps + 1):
            front = _advance(codes.reshape(-1), codes.shape[1], lowest_code, front, step == steps)
    for y in range(out.shape[0]):
        row = codes[frame + y, frame : frame + out.shape[1]]
        for x in range(len(row)):
            out[y, x] = row[x] - 2 if row[x] > 2 else 0


@jit
def _close(edge: NDArray[Any]) -> None:
    """Turn foreground without an id in an outermost row or column into background, so that no seed grows into it."""
    for i in range(len(edge)):
        if edge[i] <= 2:
            edge[i] = 0


@jit
def _front(codes: NDArray[Any], lowest_code: int) -> NDArray[np.int64]:
    """Return the index of every pixel that the first step of a round fills, and set these pixels to 0 until then."""
    height, width = codes.shape
    front, count = np.empty(codes.size // 16 + width, np.int64), 0
    for y in range(1, height - 1):
        if count + width > len(front):
            front = np.concatenate((front, np.empty_like(front)))
        row, above, below = codes[y, 1:-1], codes[y - 1, 1:-1], codes[y + 1, 1:-1]
        before, after = codes[y, :-2], codes[y, 2:]
        for x in range(len(row)):
            beside = (above[x] > 2) | (before[x] > 2) | (after[x] > 2) | (below[x] > 2)
            if lowest_code <= row[x] <= 2 and beside:
                row[x] = 0
                front[count] = y * width + x + 1
                count += 1
    return front[:count]


@jit
def _advance(
    flat: NDArray[Any], width: int, lowest_code: int, front: NDArray[np.int64], is_last: bool
) -> NDArray[np.int64]:
    """Fill every pixel of the front with an id; return the next front, which is empty after the last step."""
    around = (-width, -1, 1, width)
    taken = np.empty(len(front), flat.dtype)
    for i in range(len(front)):
        for offset in around:
            taken[i] = flat[front[i] + offset]
            if taken[i] > 2:
                break
    following, count = np.empty(0 if is_last else 3 * len(front), np.int64), 0
    for i in range(len(front)):
        flat[front[i]] = taken[i]
        for offset in around:
            neighbour = front[i] + offset
            if lowest_code <= flat[neighbour] <= 2 and not is_last:
                flat[neighbour] = 0
                following[count] = neighbour
                count += 1
    return following[:count]
