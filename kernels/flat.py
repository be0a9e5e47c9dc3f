"""Whether the pixels of a tile show anything at all: what need not go through the network.

The reference defines the meaning; the fused kernel gives the same answer and stops where it is known.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

try:
    from cellseg_batch.kernels import flat_numba as fastest
except ImportError:  # without Numba the reference does the work, several times slower
    from cellseg_batch.kernels import flat_reference as fastest  # type: ignore[no-redef]


def is_flat(pixels: NDArray[Any], limit: float) -> bool:
    """Whether the means of all windows of 8 x 8 px differ by less than ``limit``, in every channel.

    The windows lie 4 px apart, so that one of them shows a small object nearly alone; their mean keeps single noisy
    pixels out of it.

    Args:
        pixels: (S, h, w), any real dtype and memory layout.
        limit: a difference of pixel values; of 0, nothing is flat.

    Returns:
        False for pixels that are fewer than 8 along an axis, and for a NaN or an infinity among them.
    """
    return min(pixels.shape[1:]) >= 8 and bool(fastest.is_flat(pixels, limit))
