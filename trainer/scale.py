"""Choose the scale at which a model sees an image: full, or downscaled so that large nuclei look as in its training.

The engine and the trainer's scores share it, so that the model sees the same pixels in both.  It needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Least ratio of the foreground's share to that in the image downscaled half as much, for crowds that melt into one
# object.  On the validation images large nuclei reach up to 1.3 and crowds 1.7 and more.
_MELTING = 1.45
# A smaller share is next to no foreground.  Among glands that pass for large nuclei, nuclei take 0.03 and more.
_NOTHING = 0.01


@dataclass(frozen=True)
class Objects:
    """The objects in masks.

    Attributes:
        width: width of the objects in px: six times the mean distance of their pixels to the outline, which is the
            diameter of a disk; 0 if there is no foreground.
        share: share of foreground pixels.
    """

    width: float
    share: float


def measure_objects(masks: Iterable[NDArray[np.bool_]]) -> Objects:
    """Measure width and share of the foreground in masks (H, W), all taken together."""
    from scipy import ndimage  # takes 15 MB, which a run at a given scale does not need

    distances, foreground, pixels = 0.0, 0, 0
    for mask in masks:
        distance: NDArray[np.float64] = ndimage.distance_transform_edt(mask)
        distances += float(distance.sum())
        foreground += int(np.count_nonzero(mask))
        pixels += mask.size
    if not foreground:
        return Objects(0.0, 0.0)
    # The transform measures to the centre of the nearest background pixel, half a pixel beyond the outline.
    return Objects(6 * (distances / foreground - 0.5), foreground / pixels)


def pick_downscale(widths: dict[str, float], masks_at: Callable[[int], Iterable[NDArray[np.bool_]]]) -> int:
    """Pick the factor by which an image is downscaled for the model; 1 leaves it as it is.

    A factor is taken if objects are wide enough in the image downscaled by it, unless they cover far less in the image
    downscaled half as much: then they are a crowd of small objects that melts into one.  If the latter image has next
    to no foreground, they are large objects that the model does not see at that scale.

    Args:
        widths: rule of the model's card: factor -> least width of objects, in px of the image downscaled by it.
        masks_at: returns the model's masks of the image downscaled by a factor, at the size of the downscaled image.
    """
    measured: dict[int, Objects] = {}

    def objects_at(factor: int) -> Objects:
        if factor not in measured:
            measured[factor] = measure_objects(masks_at(factor))
        return measured[factor]

    factors = sorted((int(name) for name in widths), reverse=True)
    for position, factor in enumerate(factors):
        objects = objects_at(factor)
        if objects.width >= widths[str(factor)] and not _melts(objects.share, objects_at(factor // 2).share):
            return factor
        # Objects in an image twice as large are twice as wide; stop if that is too narrow for every smaller factor.
        if all(objects.width * factor / smaller < widths[str(smaller)] for smaller in factors[position + 1 :]):
            return 1
    return 1


def _melts(share: float, finer_share: float) -> bool:
    """Whether a crowd melts into one object, from foreground's share in the image and in the one twice as fine."""
    return finer_share > _NOTHING and share > _MELTING * finer_share
