"""Draw labels onto a picture: the one way in which the trainer and the engine show what was found.

It knows arrays only, and neither torch nor files.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

# A bright line with a dark edge: one of the two stands out from any ground, be it black, white or stained.
_LINE, _EDGE = (255, 230, 0), (0, 0, 0)
# Objects narrower than this many px would vanish below their outlines.
_SMALL = 9


def outlined(picture: NDArray[np.uint8], labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """A copy of ``picture`` (H, W, 3) with the outline of each object of ``labels`` (H, W), 0 being background.

    The line is two pixels wide and centred on the border of the object, so objects that touch share one; its dark edge
    lies in the background. Where most objects are too small for that, they are tinted as a whole.
    """
    drawn = picture.copy()
    inside = labels > 0
    if too_small_to_outline(labels):
        drawn[inside] = (drawn[inside] + 2 * np.array(_LINE)) // 3
        return drawn
    line = borders(labels)
    drawn[_grown(line) & ~line & ~inside] = _EDGE
    drawn[line] = _LINE
    return drawn


def tinted(picture: NDArray[np.uint8], classes: NDArray[np.integer], colours: Mapping[int, str]) -> NDArray[np.uint8]:
    """A copy of ``picture`` (H, W, 3) whose pixels are tinted by class.

    Args:
        picture: the picture.
        classes: (H, W) numbers of the pixels' classes; 0 and what has no colour stay as they are.
        colours: number of a class -> its colour, ``#rrggbb``.
    """
    drawn = picture.copy()
    for number, colour in colours.items():
        inside = classes == number
        drawn[inside] = (drawn[inside].astype(np.uint16) + np.array(list(bytes.fromhex(colour[1:])))) // 2
    return drawn


def too_small_to_outline(labels: NDArray[np.integer]) -> bool:
    """Whether most objects of ``labels`` (H, W) are so small that outlines would hide them."""
    inside = labels > 0
    # A disc of d px has pi d border pixels among pi / 4 d^2.
    return bool(np.count_nonzero(borders(labels) & inside) * _SMALL > 4 * np.count_nonzero(inside))


def borders(labels: NDArray[np.integer]) -> NDArray[np.bool_]:
    """The pixels (H, W) beside which another object, or the background, begins."""
    border = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        values, side = np.moveaxis(labels, axis, 0), np.moveaxis(border, axis, 0)
        differs = values[:-1] != values[1:]
        side[:-1] |= differs
        side[1:] |= differs
    return border


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask (H, W) and all pixels that share a side with it."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown
