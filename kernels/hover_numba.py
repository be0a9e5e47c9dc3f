"""Compute `hover` on the CPU in a single pass: both gradients in rings of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._jit import jit
from cellseg_batch.kernels._taps_numba import difference_column, difference_row, sum_column, sum_row
from cellseg_batch.kernels.instances import ONE_BITS

if TYPE_CHECKING:
    from cellseg_batch.kernels.hover import HoverRule

_UNIT = 1 << ONE_BITS
_SCALE, _OFFSET, _LAST = np.float32(_UNIT), np.float32(_UNIT + 0.5), np.float32(2 * _UNIT)


@jit
def _fixed_point(values: NDArray[np.float32], first: int, row: NDArray[np.int32]) -> None:
    """Fill ``row`` with the values from column ``first`` on, in units of 2 ** -14; the tile's ends are repeated."""
    last = len(values) - 1
    for i in range(len(row)):
        step = values[min(max(first + i, 0), last)] * _SCALE + _OFFSET
        step = step if step > 0 else np.float32(0)  # also where it is NaN
        row[i] = np.int32(min(step, _LAST)) - np.int32(_UNIT)


@jit
def classify_maps(
    logits: NDArray[np.float32], places: NDArray[np.int64], rule: HoverRule, out: NDArray[np.uint8]
) -> tuple[int, int]:
    """Write the pixel codes; arguments as `cellseg_batch.kernels.hover.classify_maps`."""
    smooth, slope = (len(rule.smooth) - 1) * rule.spacing, (len(rule.slope) - 1) * rule.spacing
    radius = max(smooth, slope)
    size = 2 * radius + 1
    foreground = 0
    missing = 0
    for tile in range(len(places)):
        from_y, from_x, to_y, to_x, height, width = places[tile]
        horizontal, vertical = logits[tile, 1], logits[tile, 2]
        rings, held = np.empty((2, size, width), np.int32), np.full(size, -size)
        row = np.empty(width + 2 * radius, np.int32)
        along_x, along_y = np.empty(width, np.int32), np.empty(width, np.int32)
        for y in range(height):
            mask, target = logits[tile, 0, from_y + y, from_x : from_x + width], out[to_y + y, to_x : to_x + width]
            inside = 0
            for x in range(width):
                across, down = horizontal[from_y + y, from_x + x], vertical[from_y + y, from_x + x]
                missing += (mask[x] != mask[x]) | (across != across) | (down != down)
                inside += mask[x] > rule.foreground
                target[x] = 0
            foreground += inside
            if inside == 0:
                continue
            for line in range(y - radius, y + radius + 1):
                if held[line % size] != line:
                    source = min(max(from_y + line, 0), logits.shape[2] - 1)
                    _fixed_point(horizontal[source], from_x - radius, row)
                    difference_row(row[radius - slope :], rule.slope, rule.spacing, rings[0, line % size])
                    _fixed_point(vertical[source], from_x - radius, row)
                    sum_row(row[radius - smooth :], rule.smooth, rule.spacing, rings[1, line % size])
                    held[line % size] = line
            sum_column(rings[0], y, rule.smooth, rule.spacing, along_x)
            difference_column(rings[1], y, rule.slope, rule.spacing, along_y)
            for x in range(width):
                if mask[x] > rule.foreground:
                    rise = min(along_x[x], along_y[x])
                    target[x] = 1 + (rise > rule.border_level) + (rise > rule.seed_level)
    return foreground, missing
