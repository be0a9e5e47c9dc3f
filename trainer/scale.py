"""The scale at which a model is shown an image: whole, or shrunk so that large nuclei are as large as it has learnt.

Shared by the engine and the trainer's scores, so that both show the model the same.  It needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Large nuclei cover up to 1.3 times as much as in the image shrunk half as much, crowds that melt into one 1.7 times
# and more (measured on the validation images).  Four times as much no crowd can: what it leaves free is too little.
_MELTING = (1.45, 4.0)


@dataclass(frozen=True)
class Objects:
    """What masks show.

    Attributes:
        width: of their objects in px, six times the mean distance of their pixels to the outline, which is the diameter
            of a disk; 0 if there is no foreground.
        share: of foreground pixels.
    """

    width: float
    share: float


def measure_objects(masks: Iterable[NDArray[np.bool_]]) -> Objects:
    """Width and share of the foreground of masks (H, W), all taken together."""
    from scipy import ndimage  # takes 15 MB, which a run at a given scale can do without

    distances, foreground, pixels = 0.0, 0, 0
    for mask in masks:
        distance: NDArray[np.float64] = ndimage.distance_transform_edt(mask)
        distances += float(distance.sum())
        foreground += int(np.count_nonzero(mask))
        pixels += mask.size
    if not foreground:
        return Objects(0.0, 0.0)
    # The transform measures to the centre of the next pixel, half a pixel beyond the outline.
    return Objects(6 * (distances / foreground - 0.5), foreground / pixels)


def pick_shrink(widths: dict[str, float], masks_at: Callable[[int], Iterable[NDArray[np.bool_]]]) -> int:
    """By how much to shrink an image, 1 for not at all.

    A factor is taken if objects are wide enough in the image shrunk by it, unless they cover far less in the image
    shrunk half as much: then they are a crowd of small ones that melts into one.  Where that image shows next to
    nothing they are large ones that the model does not see there.

    Args:
        widths: of the model's card: factor -> width in px of the image shrunk by it from which on it is used.
        masks_at: the masks that the model finds in the image shrunk by a factor, at its size.
    """
    seen: dict[int, Objects] = {}

    def at(factor: int) -> Objects:
        if factor not in seen:
            seen[factor] = measure_objects(masks_at(factor))
        return seen[factor]

    factors = sorted((int(name) for name in widths), reverse=True)
    for position, factor in enumerate(factors):
        crowd = at(factor)
        if crowd.width >= widths[str(factor)] and not _melts(crowd.share, at(factor // 2).share):
            return factor
        # Twice as large an image shows everything twice as wide; what is still too narrow then need not be looked at.
        if all(crowd.width * factor / other < widths[str(other)] for other in factors[position + 1 :]):
            return 1
    return 1


def _melts(share: float, finer: float) -> bool:
    least, most = _MELTING
    return least * finer < share < most * finer
