"""Define `gather` in plain numpy: cut tiles, mirror the slide's edge, normalise.

Per output pixel it reads 1 pixel (1 or 2 bytes) and writes C float32 (4 C bytes); the write dominates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def gather(
    pixels: NDArray[Any],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    low: ArrayLike,
    scale: ArrayLike,
    out: NDArray[np.float32],
    clip: bool = True,
) -> None:
    """Fill ``out`` with normalised tiles; arguments as `cellseg_batch.kernels.gather.gather`."""
    for tile in range(len(out)):
        cut = pixels[:, rows[tile][:, None], columns[tile][None, :]].astype(np.float32)
        with np.errstate(invalid="ignore"):  # NaN, or an infinite pixel times a scale of 0
            scaled = (cut - _of_planes(low)) * _of_planes(scale)
        floor, ceiling = (np.float32(0), np.float32(1)) if clip else (np.float32(-np.inf), np.float32(np.inf))
        out[tile] = np.where(np.isnan(scaled), np.float32(0), np.clip(scaled, floor, ceiling))


def _of_planes(numbers: ArrayLike) -> NDArray[np.float32]:
    """Numbers of all channels or of each, for arrays (C, H, W)."""
    return np.asarray(numbers, np.float32).reshape(-1, 1, 1)
