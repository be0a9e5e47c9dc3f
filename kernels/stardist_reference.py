"""Define `stardist` in plain numpy, star by star and pixel by pixel.

A star takes 12 + 4 * R bytes.  Every pair of stars whose boxes meet is compared on a pixel map of the smaller box.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels.stardist import OPEN, SUPPRESSED, SURVIVOR

if TYPE_CHECKING:
    from cellseg_batch.kernels.stardist import Stars


def suppress(stars: Stars, states: NDArray[np.uint8], exposed: NDArray[np.bool_], threshold: float) -> None:
    """Decide the open ones of ``states``; arguments as `cellseg_batch.kernels.stardist.suppress`."""
    covered: list[NDArray[np.int64]] = []
    for star in range(len(states)):
        covered.append(covered_pixels(stars, star))
        if states[star] != OPEN:
            continue
        standing = np.flatnonzero(states[:star])
        distance = np.hypot(stars.y[standing] - stars.y[star], stars.x[standing] - stars.x[star])
        near = standing[distance < stars.rays[standing].max(axis=1, initial=0) + stars.rays[star].max() + 2]
        rivals = {int(states[other]) for other in near if overlap(covered[other], covered[star]) > threshold}
        if SURVIVOR in rivals:
            states[star] = SUPPRESSED
        elif OPEN not in rivals and not exposed[star]:
            states[star] = SURVIVOR


def overlap(pixels: NDArray[np.int64], others: NDArray[np.int64]) -> float:
    """The overlap of two stars from the pixels that they cover."""
    return len(np.intersect1d(pixels, others, assume_unique=True)) / min(len(pixels), len(others))


def covered_pixels(stars: Stars, star: int) -> NDArray[np.int64]:
    """The pixels (k,) whose centres lie in a star, as y * 2 ** 32 + x."""
    reach = int(np.ceil(stars.rays[star].max()))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    rows, columns = np.nonzero(is_inside(stars.rays[star], y, x))
    pixels: NDArray[np.int64] = ((stars.y[star] + rows - reach) << 32) + (stars.x[star] + columns - reach)
    return pixels


def is_inside(rays: NDArray[np.float32], y: NDArray[np.int64], x: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether points, in px from the centre, lie in a star: an odd number of edges crosses their row at or before x."""
    sines, cosines = directions(len(rays))
    corner_y, corner_x = rays * sines, rays * cosines
    inside = np.zeros(y.shape, np.bool_)
    for y0, x0, y1, x1 in zip(corner_y, corner_x, np.roll(corner_y, -1), np.roll(corner_x, -1), strict=True):
        if y0 != y1:
            inside ^= ((y0 <= y) != (y1 <= y)) & (x0 + (y - y0) * ((x1 - x0) / (y1 - y0)) <= x)
    return inside


def directions(rays: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sine and cosine (R,) of the angles of the rays; every form takes them from here, for the same bits."""
    angles = 2 * np.pi / rays * np.arange(rays)
    return np.sin(angles), np.cos(angles)


def draw(stars: Stars, ids: NDArray[Any], out: NDArray[Any]) -> None:
    """Draw the stars, the lowest rank first; arguments as `cellseg_batch.kernels.stardist.draw`."""
    for star in reversed(range(len(ids))):
        y, x = np.divmod(covered_pixels(stars, star), 1 << 32)
        visible = (y >= 0) & (x >= 0) & (y < out.shape[0]) & (x < out.shape[1])
        out[y[visible], x[visible]] = ids[star]
