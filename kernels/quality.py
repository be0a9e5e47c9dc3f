"""Measure sharpness and exposure of an image as sums over its pixels, which can be added up over blocks.

The reference defines the meaning; the fused kernel gives the same sums to within rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._fastest import fastest

HALO = 1
"""Width in px of the surroundings of a block that its sharpness needs."""

# Brightest value of a camera with 8, 10, 12, 14 and 16 bits.
_FULL_SCALES = (255, 1023, 4095, 16383, 65535)


@dataclass(frozen=True)
class Quality:
    """Sums over the pixels of one channel.

    Attributes:
        pixels: number of pixels that are not NaN.
        total: sum of these pixels.
        curved: number of pixels that have a Laplacian: none of the pixel and its four neighbours is NaN or missing.
        curvature: sum of the Laplacian, which is the sum of the four neighbours minus four times the pixel.
        squares: sum of the squared Laplacian.
        highest: largest pixel value, -inf without pixels.
        saturated: number of pixels of the largest value.
    """

    pixels: int = 0
    total: float = 0.0
    curved: int = 0
    curvature: float = 0.0
    squares: float = 0.0
    highest: float = -np.inf
    saturated: int = 0

    def __add__(self, other: Quality) -> Quality:
        """Return the sums over both sets of pixels."""
        highest = max(self.highest, other.highest)
        return Quality(
            pixels=self.pixels + other.pixels,
            total=self.total + other.total,
            curved=self.curved + other.curved,
            curvature=self.curvature + other.curvature,
            squares=self.squares + other.squares,
            highest=highest,
            saturated=sum(part.saturated for part in (self, other) if part.highest == highest),
        )

    @property
    def focus(self) -> float | None:
        """Variance of the Laplacian over the squared mean pixel; falls with blur, does not depend on exposure.

        None without a Laplacian or a mean, and for values whose squares are 0 or infinite.
        """
        if not self.curved or not self.total:
            return None
        curvature, mean = self.curvature / self.curved, self.total / self.pixels
        # Products, because a power of floats raises an error where these become infinite.
        variance, square = self.squares / self.curved - curvature * curvature, mean * mean
        return variance / square if math.isfinite(variance) and 0 < square < math.inf else None

    @property
    def saturation(self) -> float:
        """Share of pixels at the largest value if that is the end of a camera's scale; otherwise 0."""
        return self.saturated / self.pixels if self.highest in _FULL_SCALES else 0.0


def survey(pixels: NDArray[Any], core: tuple[slice, slice]) -> Quality:
    """Return the sums over a block.

    Args:
        pixels: (h, w), the block and `HALO` px around it, less at the slide's edges; any real dtype and layout.
        core: (rows, columns) of the block in ``pixels``.
    """
    rows, columns = core
    sums = fastest(__name__).survey(np.ascontiguousarray(pixels), rows.start, rows.stop, columns.start, columns.stop)
    return Quality(int(sums[0]), sums[1], int(sums[2]), sums[3], sums[4], sums[5], int(sums[6]))
