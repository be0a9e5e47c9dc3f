"""The scale at which a model is shown an image: whole, or shrunk so that large nuclei are as large as it has learnt.

Shared by the engine and the trainer's scores, so that both show the model the same.  It needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


def mean_width(masks: Iterable[NDArray[np.bool_]]) -> float:
    """How wide the objects of masks (H, W) are in px: six times the mean distance of their pixels to the outline.

    That is the diameter of a disk.  0 if there is no foreground.
    """
    total, pixels = 0.0, 0
    for mask in masks:
        distance: NDArray[np.float64] = ndimage.distance_transform_edt(mask)
        total += float(distance.sum())
        pixels += int(np.count_nonzero(mask))
    # The transform measures to the centre of the next pixel, half a pixel beyond the outline.
    return 6 * (total / pixels - 0.5) if pixels else 0.0


def pick_shrink(widths: dict[str, float], masks_at: Callable[[int], Iterable[NDArray[np.bool_]]]) -> int:
    """By how much to shrink an image, 1 for not at all.

    Args:
        widths: of the model's card: factor -> width in px of the image shrunk by it from which on it is used.
        masks_at: the masks that the model finds in the image shrunk by a factor, at its size.
    """
    for factor in sorted((int(name) for name in widths), reverse=True):
        width = mean_width(masks_at(factor))
        if width >= widths[str(factor)]:
            return factor
        smaller = [int(name) for name in widths if int(name) < factor]
        # Twice as large an image shows everything twice as wide; what is still too narrow then need not be looked at.
        if all(width * factor / other < widths[str(other)] for other in smaller):
            return 1
    return 1
