"""Define `hover` in plain numpy.

Per pixel, classifying reads one logit and two maps (12 bytes in float32) and writes 1 byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d

from cellseg_batch.kernels.instances import ONE_BITS

if TYPE_CHECKING:
    from cellseg_batch.kernels.hover import HoverRule

Ints = NDArray[np.int32]


def classify_maps(
    logits: NDArray[np.float32], places: NDArray[np.int64], rule: HoverRule, out: NDArray[np.uint8]
) -> tuple[int, int]:
    """Write the pixel codes; arguments as `cellseg_batch.kernels.hover.classify_maps`."""
    foreground = missing = 0
    for tile, (from_y, from_x, to_y, to_x, height, width) in enumerate(places):
        horizontal, vertical = (_fixed_point(one) for one in logits[tile, 1:3])
        smooth, slope = _spread(rule.smooth, 1, rule.spacing), _spread(rule.slope, -1, rule.spacing)
        along_x = _correlate(_correlate(horizontal, slope, axis=1), smooth, axis=0)
        along_y = _correlate(_correlate(vertical, smooth, axis=1), slope, axis=0)
        core = np.s_[from_y : from_y + height, from_x : from_x + width]
        rise, mask = np.minimum(along_x, along_y)[core], logits[tile, 0][core] > rule.foreground
        codes = 1 + (rise > rule.border_level).astype(np.uint8) + (rise > rule.seed_level)
        out[to_y : to_y + height, to_x : to_x + width] = np.where(mask, codes, 0)
        foreground += int(np.count_nonzero(mask))
        missing += int(np.count_nonzero(np.isnan(logits[tile, :3][:, *core]).any(axis=0)))
    return foreground, missing


def _fixed_point(values: NDArray[np.float32]) -> Ints:
    """Values from -1 to 1 in units of 2 ** -14."""
    unit = np.float32(1 << ONE_BITS)
    # fmax returns 0 where a value is NaN.
    steps: Ints = np.fmin(np.fmax(values * unit + (unit + np.float32(0.5)), np.float32(0)), 2 * unit).astype(np.int32)
    return steps - np.int32(unit)


def _spread(half: Ints, sign: int, spacing: int) -> Ints:
    """The whole kernel of a half, whose other half has this sign, with ``spacing`` px between two taps."""
    kernel = np.zeros(2 * (len(half) - 1) * spacing + 1, np.int32)
    kernel[::spacing] = np.concatenate([sign * half[:0:-1], half])
    return kernel


def _correlate(values: Ints, kernel: Ints, axis: int) -> Ints:
    # Sums stay below 2 ** 29, which float64 holds exactly.
    total = correlate1d(values.astype(np.float64), kernel, axis, mode="nearest").astype(np.int64)
    rounded: Ints = ((total + (1 << (ONE_BITS - 1))) >> ONE_BITS).astype(np.int32)
    return rounded
