"""Define `moments` in plain numpy, object by object.

Labels are read once (4 bytes per pixel), pixels of objects once per channel; a row of 8 * (14 + 4 * C) bytes is written
per object.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels.moments_columns import CHANNELS, PER_CHANNEL


def measure(
    labels: NDArray[Any], pixels: NDArray[Any], probability: NDArray[np.uint8]
) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
    """Measure every object; arguments as `cellseg_batch.kernels.moments.measure`, ``probability`` is (0, 0) for none.

    Boxes are counted from the block's corner; an id occurs once.
    """
    core = labels[2:-2, 2:-2]
    ids = np.unique(core[core > 0])
    rows = np.zeros((len(ids), CHANNELS + PER_CHANNEL * len(pixels)))
    for label, row in zip(ids, rows, strict=True):
        y, x = np.nonzero(core == label)
        top, left = y.min(), x.min()
        outline = [np.count_nonzero(_outline(labels == label)[2:-2, 2:-2] == kind) for kind in (1, 2, 3)]
        sums = [(y - top).sum(), (x - left).sum()]
        products = [((y - top) ** 2).sum(), ((y - top) * (x - left)).sum(), ((x - left) ** 2).sum()]
        probability_sum = int(probability[y, x].sum()) if probability.size else 0
        row[:CHANNELS] = top, left, y.max() + 1, x.max() + 1, len(y), *outline, *sums, *products, probability_sum
        for channel, plane in enumerate(pixels):
            values = plane[y, x].astype(np.float64)
            base = CHANNELS + PER_CHANNEL * channel
            row[base : base + PER_CHANNEL] = values.min(), values.max(), values.sum(), (values**2).sum()
    return ids.astype(np.uint64), rows


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return the kind of each pixel of a mask as in `_outline_kinds`; 0 for pixels off its outline."""
    inside = np.pad(mask, 1)
    cross = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    edge = np.pad(mask & ~cross, 1).astype(np.int64)
    sides = edge[:-2, 1:-1] + edge[2:, 1:-1] + edge[1:-1, :-2] + edge[1:-1, 2:]
    corners = edge[:-2, :-2] + edge[:-2, 2:] + edge[2:, :-2] + edge[2:, 2:]
    return np.where(edge[1:-1, 1:-1] > 0, OUTLINE_KIND[sides, corners], 0).astype(np.uint8)


def _outline_kinds() -> NDArray[np.uint8]:
    """Return the kind by (outline pixels beside, outline pixels at the corners).

    The kinds are 1 straight, 2 diagonal, 3 mixed, 0 not counted.

    scikit-image's ``measure.perimeter`` has the same table, indexed by 1 + 2 * sides + 10 * corners.
    """
    kinds = np.zeros((5, 5), np.uint8)
    for kind, sums in ((1, (5, 7, 15, 17, 25, 27)), (2, (21, 33)), (3, (13, 23))):
        for total in sums:
            kinds[(total - 1) % 10 // 2, (total - 1) // 10] = kind
    return kinds


OUTLINE_KIND = _outline_kinds()
