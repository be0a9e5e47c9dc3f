"""Cut a batch of tiles out of a block's pixels and normalise them: the step before the network.

The reference defines the meaning; the fused kernel gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from cellseg_batch.kernels import gather_numba as fastest
except ImportError:  # without Numba the reference does the work, several times slower
    from cellseg_batch.kernels import gather_reference as fastest  # type: ignore[no-redef]


def gather(
    pixels: NDArray[Any],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    low: float,
    scale: float,
    out: NDArray[np.float32],
) -> None:
    """Fill ``out`` with ``clip((pixel - low) * scale, 0, 1)`` of every tile, in float32; a NaN becomes 0.

    Args:
        pixels: (S, h, w), any real dtype and memory layout, S channels of the pixels that a block read.
        rows: (N, T_y) row in ``pixels`` of each row of each tile; mirrored at the slide's edge by the caller.
        columns: (N, T_x) likewise.
        low: the pixel value that becomes 0.
        scale: 1 / (high - low).
        out: (N, C, T_y, T_x) float32, overwritten; C = S, or any C for S = 1, which is then replicated.

    Raises:
        ValueError: the shapes do not fit together.
    """
    tiles, channels, height, width = out.shape
    if pixels.shape[0] not in (1, channels) or rows.shape != (tiles, height) or columns.shape != (tiles, width):
        raise ValueError(
            f"pixels {pixels.shape}, rows {rows.shape} and columns {columns.shape} do not fit tiles {out.shape}"
        )
    fastest.gather(pixels, rows, columns, np.float32(low), np.float32(scale), out)
