"""How sharp and how well exposed an image is: sums over its pixels that can be added up over blocks.

The reference defines the meaning; the fused kernel gives the same sums to within rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._fastest import fastest

HALO = 1
"""Pixels around a block that its sharpness needs."""

# The brightest value of cameras of 8, 10, 12, 14 and 16 bits.
_FULL_SCALES = (255, 1023, 4095, 16383, 65535)


@dataclass(frozen=True)
class Quality:
    """Sums over the pixels of one channel.

    Attributes:
        pixels: how many there are, NaN not counted.
        total: their sum.
        curved: pixels whose four neighbours are known too.
        curvature: sum of the Laplacian there, the four neighbours less four times the pixel.
        squares: sum of its square.
        highest: the largest value, -inf when there is no pixel.
        saturated: pixels of that value.
    """

    pixels: int = 0
    total: float = 0.0
    curved: int = 0
    curvature: float = 0.0
    squares: float = 0.0
    highest: float = -np.inf
    saturated: int = 0

    def __add__(self, other: Quality) -> Quality:
        """The sums over both."""
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
        """Variance of the Laplacian over the squared mean: falls with blur, is the same at any exposure."""
        if not self.curved or not self.total:
            return None
        variance = self.squares / self.curved - (self.curvature / self.curved) ** 2
        return variance / (self.total / self.pixels) ** 2

    @property
    def saturation(self) -> float:
        """Share of pixels at the brightest value, if that is the end of a camera's scale."""
        return self.saturated / self.pixels if self.highest in _FULL_SCALES else 0.0


def survey(pixels: NDArray[Any], core: tuple[slice, slice]) -> Quality:
    """The sums over a block.

    Args:
        pixels: (h, w), the block and `HALO` px around it, less where the slide ends; any real dtype and layout.
        core: the block in it.
    """
    rows, columns = core
    figures = fastest(__name__).survey(np.ascontiguousarray(pixels), rows.start, rows.stop, columns.start, columns.stop)
    return Quality(int(figures[0]), figures[1], int(figures[2]), figures[3], figures[4], figures[5], int(figures[6]))
