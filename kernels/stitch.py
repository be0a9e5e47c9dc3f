"""Put the cores of tiles back together: the step after the network, one read and one write per pixel.

The threshold is applied to the logit, z > log(t / (1 - t)), so a mask needs no exponential.  The reference
defines the meaning; the fused kernel gives the same mask bit for bit, and probabilities within 1/255.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels import stitch_numba


def logit_threshold(probability: float) -> float:
    """The logit whose sigmoid is ``probability``, which lies strictly between 0 and 1."""
    return math.log(probability / (1 - probability))


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """The probabilities of logits of any shape, for comparing them; a mask needs none."""
    return 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))


def stitch_mask(
    logits: NDArray[np.float32], places: NDArray[np.int64], threshold: float, out: NDArray[np.uint8]
) -> tuple[int, int]:
    """Write ``logits[:, 0] > threshold`` of every tile's core into ``out``.

    Args:
        logits: (N, K, T_y, T_x) float32 of a batch; logit 0 is the foreground.
        places: (M, 6) int64 with M <= N, one row per tile: y and x of the core in the tile, y and x of it in
            ``out``, its height and width; later tiles of the batch are padding.
        threshold: a logit, see `logit_threshold`.
        out: (H, W) uint8, 1 is foreground.

    Returns:
        (foreground pixels, NaN logits); a NaN is background.
    """
    foreground, missing = stitch_numba.stitch_mask(logits, places, np.float32(threshold), out)
    return int(foreground), int(missing)


def stitch_probability(logits: NDArray[np.float32], places: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
    """Write ``floor(255 * sigmoid(logits[:, 0]) + 0.5)`` of every tile's core into ``out``.

    Arguments as `stitch_mask`; a NaN logit becomes 0.
    """
    stitch_numba.stitch_probability(logits, places, out)
