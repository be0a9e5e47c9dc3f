"""Define `gather` in plain numpy: cut tiles, mirror the slide's edge, normalise.

Per output pixel it reads 1 pixel (1 or 2 bytes) and writes C float32 (4 C bytes); the write dominates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def gather(
    pixels: NDArray[Any],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    low: float,
    scale: float,
    out: NDArray[np.float32],
) -> None:
    """Fill ``out`` with normalised tiles; arguments as `cellseg_batch.kernels.gather.gather`."""
    for tile in range(len(out)):
        cut = pixels[:, rows[tile][:, None], columns[tile][None, :]].astype(np.float32)
        with np.errstate(invalid="ignore"):  # NaN, or an infinite pixel times a scale of 0
            scaled = (cut - np.float32(low)) * np.float32(scale)
        out[tile] = np.where(scaled > 0, np.minimum(scaled, np.float32(1)), np.float32(0))
