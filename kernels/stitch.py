"""Stitch tiles after the network: write mask or probability from their logits, one read and one write per pixel.

There are two forms: *stitch* crops the core of each tile, *blend* fades overlapping tiles into each other, in logits
and not in probabilities.  The threshold applies to the logit, z > log(t / (1 - t)), so a mask needs no exponential.

The reference defines the meaning; the fast form gives the same mask bit for bit, and probabilities within 1/255.
`cellseg_batch.kernels.stitch_triton` has the same functions for tensors on a GPU.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._fastest import fastest
from cellseg_batch.kernels.tiling import TileGrid, check_grid


def logit_threshold(probability: float) -> float:
    """Return the logit whose sigmoid is ``probability``, which must lie strictly between 0 and 1."""
    return math.log(probability / (1 - probability))


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the probabilities of logits of any shape; only comparisons need them, a mask does not."""
    return 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))


def stitch_mask(
    logits: NDArray[np.float32], places: NDArray[np.int64], threshold: float, out: NDArray[np.uint8]
) -> tuple[int, int]:
    """Write ``logits[:, 0] > threshold`` of every tile's core into ``out``.

    Args:
        logits: (N, K, T_y, T_x) float32 of a batch; logit 0 is the foreground.
        places: (M, 6) int64 in px with M <= N, one row per tile: y and x of the core in the tile, y and x of the core
            in ``out``, height and width of the core; later tiles of the batch are padding.
        threshold: logit above which a pixel is foreground, see `logit_threshold`.
        out: (H, W) uint8, 1 is foreground.

    Returns:
        (foreground pixels, NaN logits); a NaN is background.
    """
    foreground = missing = 0
    for tile, (from_y, from_x, to_y, to_x, height, width) in enumerate(places):
        core = logits[tile, 0, from_y : from_y + height, from_x : from_x + width]
        inside = out[to_y : to_y + height, to_x : to_x + width].view(bool)
        np.greater(core, np.float32(threshold), out=inside)
        foreground += int(np.count_nonzero(inside))
        # The maximum of a tile is NaN if any logit is; it takes half the time of counting.
        if core.size and np.isnan(core.max()):
            missing += int(np.count_nonzero(np.isnan(core)))
    return foreground, missing


def stitch_probability(logits: NDArray[np.float32], places: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
    """Write ``floor(255 * sigmoid(logits[:, 0]) + 0.5)`` of every tile's core into ``out``.

    Arguments as `stitch_mask`; a NaN logit becomes 0.
    """
    fastest(__name__).stitch_probability(logits, places, out)


def stitch_classes(
    logits: NDArray[np.float32], places: NDArray[np.int64], threshold: float, out: NDArray[np.uint8]
) -> tuple[int, int]:
    """Write the number of the likeliest class of every pixel of every tile's core into ``out``, 0 for background.

    A pixel belongs to a class if the largest logit of a class exceeds the background's by more than ``threshold``; of
    equal ones the first counts.

    Args:
        logits: (N, 1 + classes, T_y, T_x) float32 of a batch; logit 0 is the background.
        places: as `stitch_mask`.
        threshold: see `logit_threshold`; 0 takes the largest of all logits.
        out: (H, W) uint8.

    Returns:
        (pixels of some class, pixels with a NaN logit); the latter are background.
    """
    foreground, missing = fastest(__name__).stitch_classes(logits, places, np.float32(threshold), out)
    return int(foreground), int(missing)


def blend_mask(
    logits: NDArray[np.float32], grid: TileGrid, threshold: float, out: NDArray[np.uint8]
) -> tuple[int, int]:
    """Write ``blended > threshold`` of a window of overlapping tiles into ``out``.

    In the r-th pixel of an overlap of O px, the later tile has weight r / O and the earlier tile the rest; where four
    tiles meet, the weights along y and x are multiplied.  Terms are added in raster order of the tiles.

    Args:
        logits: (N, K, T_y, T_x) float32, the tiles of ``grid`` in raster order; logit 0 is the foreground.
        grid: overlap of the tiles, and the window to write.
        threshold: logit above which a pixel is foreground, see `logit_threshold`.
        out: (grid.height, grid.width) uint8, 1 is foreground.

    Returns:
        (foreground pixels, pixels whose blended logit is NaN); a NaN is background.

    Raises:
        ValueError: the shapes do not fit together, or the overlap is not as `TileGrid` says.
    """
    check_grid(grid, logits.shape, out.shape)
    foreground, missing = fastest(__name__).blend_mask(logits, grid, np.float32(threshold), out)
    return int(foreground), int(missing)


def blend_probability(logits: NDArray[np.float32], grid: TileGrid, out: NDArray[np.uint8]) -> None:
    """Write ``floor(255 * sigmoid(blended) + 0.5)`` of a window of overlapping tiles into ``out``.

    Arguments and errors as `blend_mask`; a NaN logit becomes 0.
    """
    check_grid(grid, logits.shape, out.shape)
    fastest(__name__).blend_probability(logits, grid, out)
