"""Draw labels onto a picture: the one way in which the trainer and the engine show what was found.

It knows arrays only, and neither torch nor files.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Seen well on dark fluorescence and dark nuclei of bright tissue, and on pale objects on a pale ground.
_ON_DARK, _ON_BRIGHT = (255, 220, 0), (0, 150, 50)
# Objects narrower than this are mostly outline; it is then mixed with what lies below.
_SMALL = 9


def outlined(picture: NDArray[np.uint8], labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """A copy of ``picture`` (H, W, 3) with the outline of each object of ``labels`` (H, W), 0 being background.

    The outline lies inside the object, one pixel wide, so objects that touch stay apart.
    """
    edge = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        near, far = (np.moveaxis(labels, axis, 0)[part] for part in (np.s_[:-1], np.s_[1:]))
        side = np.moveaxis(edge, axis, 0)
        side[:-1] |= near != far
        side[1:] |= near != far
    inside = labels > 0
    edge &= inside
    drawn = picture.copy()
    bright = edge.any() and min(np.median(picture), np.median(picture[edge])) > 127
    colour = np.array(_ON_BRIGHT if bright else _ON_DARK)
    # A disc of d px has pi d outline pixels among pi / 4 d^2.
    crowded = np.count_nonzero(edge) * _SMALL > 4 * np.count_nonzero(inside)
    drawn[edge] = (drawn[edge] + colour) // 2 if crowded else colour
    return drawn
