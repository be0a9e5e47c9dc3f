"""Write which class each pixel is, from the logits of a network with a class map.

A *class code* (uint8) is 0 where no class is the likeliest, else the number of the class, counted from 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels.tiling import check_places


def write_classes(
    logits: NDArray[np.float32], places: NDArray[np.int64], first: int, background: bool, out: NDArray[np.uint8]
) -> tuple[int, int]:
    """Write the class codes of every tile's core: the number of the highest logit, the first of equal ones.

    Args:
        logits: (N, K, T_y, T_x) float32 of a batch; those from ``first`` on are the classes', at most 255.
        places: as in `cellseg_batch.kernels.stitch.stitch_mask`.
        first: index of the first class's logit.
        background: whether that one is no class but the background's, whose pixels get 0.
        out: (H, W) uint8.

    Returns:
        (0, pixels with a NaN among these logits); such a pixel gets 0.

    Raises:
        ValueError: a core is out of bounds, or there are no or too many classes.
    """
    check_classes(logits.shape, first, background)
    check_places(places, logits.shape, out.shape)
    missing = 0
    for tile, (from_y, from_x, to_y, to_x, height, width) in zip(logits, places, strict=False):
        core = tile[first:, from_y : from_y + height, from_x : from_x + width]
        target = out[to_y : to_y + height, to_x : to_x + width]
        highest = core[0].copy()
        target[...] = not background
        for number, values in enumerate(core[1:], 2 - background):
            np.copyto(target, number, where=values > highest, casting="unsafe")
            np.maximum(values, highest, out=highest)  # NaN if either is
        undefined = np.isnan(highest)
        target[undefined] = 0
        missing += int(np.count_nonzero(undefined))
    return 0, missing


def check_classes(logits: tuple[int, ...], first: int, background: bool) -> None:
    """Raise ValueError if logits of this shape (N, K, T_y, T_x) have no classes, or more than a code can tell."""
    count = logits[1] - first - background
    if not 0 < count < 256:
        raise ValueError(f"{count} classes from logit {first} on; expected 1 to 255")
