"""Compute `stitch` in a single fused pass on the CPU: crop or blend a row of logits, then write the row."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._jit import jit
from cellseg_batch.kernels.tiling import TileGrid

Logits = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@jit
def _write_mask(row: Logits, threshold: np.float32, out: Bytes) -> tuple[int, int]:
    foreground = 0
    missing = 0
    for x in range(len(row)):
        inside = row[x] > threshold
        out[x] = inside
        foreground += inside
        missing += row[x] != row[x]
    return foreground, missing


@jit
def _write_probability(row: Logits, out: Bytes) -> None:
    for x in range(len(row)):
        probability = np.float32(0)
        if row[x] == row[x]:
            probability = np.float32(1) / (np.float32(1) + np.float32(math.exp(-row[x])))
        out[x] = np.uint8(np.float32(255) * probability + np.float32(0.5))


@jit
def stitch_probability(logits: Logits, places: NDArray[np.int64], out: Bytes) -> None:
    """Write the probability; arguments as `cellseg_batch.kernels.stitch.stitch_probability`."""
    for tile in range(len(places)):
        from_y, from_x, to_y, to_x, height, width = places[tile]
        for y in range(height):
            row = logits[tile, 0, from_y + y, from_x : from_x + width]
            _write_probability(row, out[to_y + y, to_x : to_x + width])


@jit
def stitch_classes(logits: Logits, places: NDArray[np.int64], threshold: np.float32, out: Bytes) -> tuple[int, int]:
    """Write the classes; arguments as `cellseg_batch.kernels.stitch.stitch_classes`."""
    foreground = 0
    missing = 0
    for tile in range(len(places)):
        from_y, from_x, to_y, to_x, height, width = places[tile]
        for y in range(height):
            rows = logits[tile, :, from_y + y, from_x : from_x + width]
            for x in range(width):
                best, number = rows[1, x], 1
                undefined = rows[0, x] != rows[0, x] or best != best
                for one in range(2, len(rows)):
                    undefined |= rows[one, x] != rows[one, x]
                    if rows[one, x] > best:
                        best, number = rows[one, x], one
                inside = not undefined and best - rows[0, x] > threshold
                out[to_y + y, to_x + x] = number if inside else 0
                foreground += inside
                missing += undefined
    return foreground, missing


@jit
def _add_tiles(logits: Logits, grid: TileGrid, tile_row: int, y: int, weight: np.float32, row: Logits) -> None:
    """Add line ``y`` of a row of tiles to the window's ``row``, from left to right."""
    width = logits.shape[3]
    step = width - grid.overlap
    unit = np.float32(1 / grid.overlap)
    for column in range(grid.columns):
        line = logits[tile_row * grid.columns + column, 0, y]
        shift = column * step - grid.left
        first, last = max(0, -shift), min(width, grid.width - shift)
        rise = grid.overlap if column > 0 else 0
        fall = step if column < grid.columns - 1 else width
        for x in range(max(first, min(rise, 1)), min(last, rise)):
            row[shift + x] += weight * (np.float32(x) * unit) * line[x]
        for x in range(max(first, rise), min(last, fall)):
            row[shift + x] += weight * line[x]
        for x in range(max(first, fall), last):
            row[shift + x] += weight * (np.float32(width - x) * unit) * line[x]


@jit
def _blend_row(logits: Logits, grid: TileGrid, y: int, row: Logits) -> None:
    """Fill ``row`` with the logits of row ``y`` of the grid."""
    step = logits.shape[2] - grid.overlap
    tile_row = min(y // step, grid.rows - 1)
    inside = y - tile_row * step
    row[:] = 0
    if tile_row > 0 and inside < grid.overlap:
        _add_tiles(logits, grid, tile_row - 1, inside + step, np.float32(1 - inside / grid.overlap), row)
        if inside > 0:
            _add_tiles(logits, grid, tile_row, inside, np.float32(inside / grid.overlap), row)
    else:
        _add_tiles(logits, grid, tile_row, inside, np.float32(1), row)


@jit
def blend_mask(logits: Logits, grid: TileGrid, threshold: np.float32, out: Bytes) -> tuple[int, int]:
    """Write the mask; arguments as `cellseg_batch.kernels.stitch.blend_mask`."""
    foreground = 0
    missing = 0
    row = np.empty(grid.width, np.float32)
    for y in range(grid.height):
        _blend_row(logits, grid, grid.top + y, row)
        counts = _write_mask(row, threshold, out[y])
        foreground += counts[0]
        missing += counts[1]
    return foreground, missing


@jit
def blend_probability(logits: Logits, grid: TileGrid, out: Bytes) -> None:
    """Write the probability; arguments as `cellseg_batch.kernels.stitch.blend_probability`."""
    row = np.empty(grid.width, np.float32)
    for y in range(grid.height):
        _blend_row(logits, grid, grid.top + y, row)
        _write_probability(row, out[y])
