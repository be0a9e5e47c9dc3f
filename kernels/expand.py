"""Expand labels by a distance without overlap, as scikit-image's ``segmentation.expand_labels``.

A background pixel gets the label of the nearest labelled pixel, if that is near enough; distances are between centres
of pixels.  Of labelled pixels that are equally near the leftmost one counts, and of those in one column the upper one.
That is what the distance transform of SciPy finds, on which scikit-image is built.  So a label depends on the pixels
within the distance alone, and on their places: not on ids, nor on where an image is cut.

The reference defines the meaning; the fused kernel gives the same labels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._fastest import fastest


def reach(distance: float, aspect: float = 1.0) -> int:
    """Width in px of the surroundings of a block that `expand` needs; arguments as there."""
    # One px more, as the quotient is rounded.
    return math.floor(distance / min(aspect, 1.0)) + (aspect < 1)


def expand(labels: NDArray[Any], distance: float, aspect: float = 1.0) -> NDArray[Any]:
    """Return the expanded labels (h, w).

    Args:
        labels: (h, w) unsigned integers; 0 is background.
        distance: how far they are expanded, in widths of a pixel; included.
        aspect: height of a pixel divided by its width.
    """
    if not labels.any():
        return np.zeros_like(labels)
    return np.asarray(fastest(__name__).expand(np.ascontiguousarray(labels), float(distance), float(aspect)))
