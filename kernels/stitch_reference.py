"""Define `stitch` in plain numpy: crop the cores of tiles or blend their overlaps, and threshold the logits.

Crop reads one logit per pixel (4 bytes in float32).  Blend reads every logit once, which is (T / (T - O))^2 per pixel
for tiles of T px that overlap by O px: 1.31 logits, 5.2 bytes, for 512 and 64.  Mask and probability write 1 byte per
pixel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels.tiling import TileGrid

Logits = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def stitch_mask(logits: Logits, places: NDArray[np.int64], threshold: float, out: Bytes) -> tuple[int, int]:
    """Write the mask; arguments as `cellseg_batch.kernels.stitch.stitch_mask`."""
    foreground = missing = 0
    for tile, (from_y, from_x, to_y, to_x, height, width) in enumerate(places):
        core = logits[tile, 0, from_y : from_y + height, from_x : from_x + width]
        mask = core > np.float32(threshold)
        out[to_y : to_y + height, to_x : to_x + width] = mask
        foreground += int(np.count_nonzero(mask))
        missing += int(np.count_nonzero(np.isnan(core)))
    return foreground, missing


def stitch_classes(logits: Logits, places: NDArray[np.int64], threshold: float, out: Bytes) -> tuple[int, int]:
    """Write the classes; arguments as `cellseg_batch.kernels.stitch.stitch_classes`."""
    foreground = missing = 0
    for tile, (from_y, from_x, to_y, to_x, height, width) in enumerate(places):
        background, *classes = logits[tile, :, from_y : from_y + height, from_x : from_x + width]
        with np.errstate(invalid="ignore"):  # NaN, or infinity minus infinity
            inside = np.max(classes, axis=0) - background > np.float32(threshold)
        out[to_y : to_y + height, to_x : to_x + width] = np.where(inside, 1 + np.argmax(classes, axis=0), 0)
        foreground += int(np.count_nonzero(inside))
        missing += int(np.count_nonzero(np.isnan([background, *classes]).any(axis=0)))
    return foreground, missing


def stitch_probability(logits: Logits, places: NDArray[np.int64], out: Bytes) -> None:
    """Write the probability; arguments as `cellseg_batch.kernels.stitch.stitch_probability`."""
    for tile, (from_y, from_x, to_y, to_x, height, width) in enumerate(places):
        core = logits[tile, 0, from_y : from_y + height, from_x : from_x + width]
        out[to_y : to_y + height, to_x : to_x + width] = _probability(core)


def blend(logits: Logits, grid: TileGrid) -> Logits:
    """Return the window's logits (H, W): the weighted sum of the tiles, added in raster order.

    The weights at a pixel sum to 1.  A tile of weight 0 is left out, so that an infinite logit at its very edge does
    not become NaN.
    """
    height, width = logits.shape[2:]
    steps = height - grid.overlap, width - grid.overlap
    whole = np.zeros((grid.rows * steps[0] + grid.overlap, grid.columns * steps[1] + grid.overlap), np.float32)
    for row in range(grid.rows):
        for column in range(grid.columns):
            weight = np.outer(
                _ramp(row, grid.rows, height, grid.overlap), _ramp(column, grid.columns, width, grid.overlap)
            )
            with np.errstate(invalid="ignore"):  # 0 * inf is discarded; inf - inf is NaN and counted
                term = np.where(weight > 0, weight * logits[row * grid.columns + column, 0], np.float32(0))
                whole[row * steps[0] :, column * steps[1] :][:height, :width] += term
    return whole[grid.top : grid.top + grid.height, grid.left : grid.left + grid.width]


def blend_mask(logits: Logits, grid: TileGrid, threshold: float, out: Bytes) -> tuple[int, int]:
    """Write the mask; arguments as `cellseg_batch.kernels.stitch.blend_mask`."""
    blended = blend(logits, grid)
    out[...] = blended > np.float32(threshold)
    return int(np.count_nonzero(out)), int(np.count_nonzero(np.isnan(blended)))


def blend_probability(logits: Logits, grid: TileGrid, out: Bytes) -> None:
    """Write the probability; arguments as `cellseg_batch.kernels.stitch.blend_probability`."""
    out[...] = _probability(blend(logits, grid))


def _ramp(index: int, count: int, length: int, overlap: int) -> NDArray[np.float32]:
    """Return the weight of each pixel of tile ``index`` of ``count`` along one axis."""
    weight = np.ones(length, np.float32)
    rise = np.arange(overlap, dtype=np.float32) / np.float32(overlap)
    if index > 0:
        weight[:overlap] = rise
    if index < count - 1:
        weight[-overlap:] = 1 - rise
    return weight


def _probability(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Return floor(255 * sigmoid(logits) + 0.5) in float64, 0 for NaN."""
    probability = 0.5 * (1 + np.tanh(0.5 * np.nan_to_num(logits.astype(np.float64), nan=-np.inf)))
    return np.floor(255 * probability + 0.5)
