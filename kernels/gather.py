"""Cut a batch of tiles out of a block's pixels before the network, and normalise them unless the network does.

The reference defines the meaning; the fused kernel gives the same bits.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellseg_batch.kernels._fastest import fastest


def gather(
    pixels: NDArray[Any],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    low: ArrayLike,
    scale: ArrayLike,
    out: NDArray[np.float32],
    clip: bool = True,
) -> None:
    """Fill ``out`` with ``clip((pixel - low) * scale, 0, 1)`` of every tile, in float32; a NaN becomes 0.

    Args:
        pixels: (S, h, w), any real dtype and memory layout; S channels of a block's read box.
        rows: (N, T_y) row in ``pixels`` of each row of each tile; the caller mirrors them at the slide's edge.
        columns: (N, T_x) column in ``pixels`` of each column of each tile; mirrored likewise.
        low: pixel value that becomes 0; one for all C channels or one for each.
        scale: 1 / (high - low); as low.
        out: (N, C, T_y, T_x) float32, overwritten; C = S, or any C for S = 1, which is then replicated.
        clip: False leaves values outside [0, 1] as they are.

    Raises:
        ValueError: the shapes do not fit together.
    """
    _check(pixels, rows, columns, out)
    fastest(__name__).gather(pixels, rows, columns, *by_channel(low, scale, out.shape[1]), out, clip)


def by_channel(low: ArrayLike, scale: ArrayLike, channels: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return low and scale of each of ``channels`` channels, (C,) float32, from one for all or one for each.

    Raises:
        ValueError: they are of another number of channels.
    """
    pair = (np.broadcast_to(np.asarray(numbers, np.float32), (channels,)).copy() for numbers in (low, scale))
    lows, scales = pair
    return lows, scales


def cut(pixels: NDArray[Any], rows: NDArray[np.int64], columns: NDArray[np.int64], out: NDArray[Any]) -> None:
    """Fill ``out`` with the unchanged pixels of every tile.

    A table of rows or columns consists of a few runs of evenly spaced indices, or of a single run if it does not
    mirror.  A run of rows and a run of columns span a rectangle, which numpy copies fast channel by channel.  A copy of
    all channels at once would walk through the channels of each pixel, which is three times slower if only one of the
    two arrays is planar.

    Args:
        pixels: (S, h, w), dtype of ``out``, any memory layout.
        rows, columns: as in `gather`.
        out: (N, C, T_y, T_x), any memory layout, overwritten; C = S, or any C for S = 1, which is then replicated.

    Raises:
        ValueError: the shapes do not fit together.
    """
    _check(pixels, rows, columns, out)
    channels = np.broadcast_to(pixels, (out.shape[1], *pixels.shape[1:]))
    for tile, tile_rows, tile_columns in zip(out, rows, columns, strict=True):
        for (y, from_y), (x, from_x) in product(_runs(tile_rows), _runs(tile_columns)):
            for target, channel in zip(tile, channels, strict=True):
                target[y, x] = channel[from_y, from_x]


def _runs(indices: NDArray[np.int64]) -> list[tuple[slice, slice]]:
    """Return (positions in ``indices``, indices) of each run of evenly spaced indices, as slices."""
    runs = []
    steps, start = np.diff(indices), 0
    while start < len(indices):
        step = int(steps[start]) if start < len(steps) else 1
        (uneven,) = np.nonzero(steps[start:] != step)
        stop = start + int(uneven[0]) + 1 if len(uneven) else len(indices)
        first, end = int(indices[start]), int(indices[stop - 1]) + (1 if step >= 0 else -1)
        runs.append((slice(start, stop), slice(first, end if end >= 0 else None, step or 1)))
        start = stop
    return runs


def _check(pixels: NDArray[Any], rows: NDArray[np.int64], columns: NDArray[np.int64], out: NDArray[Any]) -> None:
    tiles, channels, height, width = out.shape
    if pixels.shape[0] not in (1, channels) or rows.shape != (tiles, height) or columns.shape != (tiles, width):
        raise ValueError(
            f"pixels {pixels.shape}, rows {rows.shape} and columns {columns.shape} do not fit tiles {out.shape}"
        )
