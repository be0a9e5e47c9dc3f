"""Turn the outputs of a StarDist network into instances: find stars, suppress those that overlap better ones, draw.

A *star* is a star-convex polygon: a point and the lengths of its rays, which leave it at equal angles, the first along
x and the next towards y.  Every point of the network's grid whose probability is above a threshold is the centre of a
*candidate* (Schmidt, Weigert, Broaddus and Myers, Cell Detection with Star-convex Polygons, MICCAI 2018).  Candidates
are ranked: the higher logit first, then the smaller y, then the smaller x.

A star covers the pixels whose centres lie in its polygon, by the even-odd rule with half-open edges.  Its area and what
it shares with another star are counts of such pixels, so suppression sees what will be drawn, and all comparisons are
exact.  The *overlap* of two stars is the number of shared pixels per pixel of the smaller one: the measure of the
authors' own code, to whose thresholds models are tuned; it is not the intersection over the union.

Greedy non-maximum suppression goes down the ranks; a candidate *survives* unless its overlap with a survivor of higher
rank is above a threshold.  A pixel belongs to the survivor of the highest rank that covers it, as in the authors'
drawing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._fastest import fastest
from cellseg_batch.kernels.tiling import check_places

SUPPRESSED, OPEN, SURVIVOR = 0, 1, 2
"""States of a candidate; an open one awaits the states of others."""
SHORTEST_RAY = 1e-3
"""Length in px of a ray that the network wants shorter, as in the authors' code; so a star covers its own centre."""
LONGEST_RAY = 1 << 14
"""Length in px that no ray may exceed: runs of pixels are held in 16 bits."""


class Stars(NamedTuple):
    """Star-convex polygons."""

    y: NDArray[np.int32]
    """(n,) row of each centre, in px."""
    x: NDArray[np.int32]
    """(n,) column of each centre, in px."""
    logits: NDArray[np.float32]
    """(n,) logit of each probability."""
    rays: NDArray[np.float32]
    """(n, R) length in px of each ray."""

    def take(self, which: Any) -> Stars:
        """The stars at an index, a slice or a mask."""
        return Stars(*(values[which] for values in self))

    def shifted(self, y: int, x: int) -> Stars:
        """The stars moved by (y, x) px."""
        return self._replace(y=self.y + np.int32(y), x=self.x + np.int32(x))

    def ranking(self) -> NDArray[np.int64]:
        """Index (n,) of the stars from the highest rank down."""
        return np.lexsort((self.x, self.y, -self.logits))

    def are_ranked(self) -> bool:
        """Whether the stars are in the order of their ranks."""
        upper, lower = self.take(slice(None, -1)), self.take(slice(1, None))
        before = (upper.y < lower.y) | ((upper.y == lower.y) & (upper.x < lower.x))
        return bool(((upper.logits > lower.logits) | ((upper.logits == lower.logits) & before)).all())


def join(parts: list[Stars], rays: int) -> Stars:
    """Put lists of stars with ``rays`` rays one after the other."""
    none = Stars(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32), np.empty((0, rays), np.float32))
    return Stars(*(np.concatenate(columns) for columns in zip(none, *parts, strict=True)))


def find_stars(
    logits: NDArray[np.float32], places: NDArray[np.int64], grid: int, threshold: float, scale: float, longest: float
) -> tuple[Stars, int]:
    """Find the candidates in every tile's core.

    Args:
        logits: (N, 1 + R, T_y / grid, T_x / grid) float32 of a batch: logit of the probability, then the rays.
        places: (M, 6) in px, as in `cellseg_batch.kernels.stitch.stitch_mask`; multiples of ``grid`` but for height and
            width.
        grid: px between two points of the network's output.
        threshold: logit above which a point is a candidate.
        scale: px per unit of a ray.
        longest: length in px to which longer rays are cut.

    Returns:
        The candidates in no order, and the number of NaN among logits and rays of candidates.

    Raises:
        ValueError: a core is out of bounds or off the grid, there are fewer than three rays, or ``longest`` is above
            `LONGEST_RAY`.
    """
    count, outputs, height, width = logits.shape
    if outputs < 4 or not longest <= LONGEST_RAY:
        raise ValueError(f"{outputs - 1} rays of up to {longest} px; expected three or more, up to {LONGEST_RAY} px")
    if (places[:, :4] % grid).any():
        raise ValueError(f"a core lies off the grid of {grid} px")
    on_grid = np.concatenate([places[:, :4] // grid, -(-places[:, 4:] // grid)], axis=1)
    ends = on_grid[:, 2:4] + on_grid[:, 4:]
    check_places(on_grid, (count, outputs, height, width), tuple(ends.max(axis=0, initial=0).tolist()))
    parts, missing = [], 0
    for tile, (from_y, from_x, to_y, to_x, rows, columns) in enumerate(on_grid):
        core = np.s_[from_y : from_y + rows, from_x : from_x + columns]
        probability = logits[tile, 0][core]
        y, x = np.nonzero(probability > np.float32(threshold))
        rays = logits[tile, 1:, from_y + y, from_x + x] * np.float32(scale)
        missing += int(np.count_nonzero(np.isnan(probability)) + np.count_nonzero(np.isnan(rays)))
        rays = np.clip(rays, np.float32(SHORTEST_RAY), np.float32(longest))
        centre_y, centre_x = ((grid * (to + at)).astype(np.int32) for to, at in ((to_y, y), (to_x, x)))
        parts.append(Stars(centre_y, centre_x, probability[y, x], rays))
    return join(parts, outputs - 1), missing


def suppress(
    stars: Stars, states: NDArray[np.uint8], exposed: NDArray[np.bool_], threshold: float
) -> NDArray[np.uint8]:
    """Decide which stars survive, as far as these stars can tell.

    A star whose state is known keeps it.  Of the others, from the highest rank down, a star whose overlap with a
    survivor of higher rank is above ``threshold`` is suppressed; else, if it is exposed or has such an overlap with an
    open star of higher rank, it stays open; else it survives.  So what is decided does not depend on stars that are not
    here, and if nothing is exposed everything is decided: that is greedy non-maximum suppression.

    Args:
        stars: n stars from the highest rank down.
        states: (n,) uint8, the state of each star that is known, else `OPEN`.
        exposed: (n,) whether stars that are not here may overlap a star.
        threshold: overlap above which a star is suppressed, in [0, 1].

    Returns:
        (n,) uint8, the state of each star.

    Raises:
        ValueError: the stars are not in the order of their ranks.
    """
    if not stars.are_ranked():
        raise ValueError("stars out of the order of their ranks")
    decided = states.copy()
    fastest(__name__).suppress(stars, decided, exposed, threshold)
    return decided


def draw(stars: Stars, ids: NDArray[Any], out: NDArray[Any]) -> None:
    """Write the id of the star of the highest rank that covers a pixel; other pixels keep their values.

    Args:
        stars: n stars from the highest rank down, with centres in px from the corner of ``out``, inside it or not.
        ids: (n,) uint32 or uint64.
        out: (H, W) of the same dtype.

    Raises:
        ValueError: the dtypes or the numbers of stars and ids differ.
    """
    if ids.dtype != out.dtype or len(ids) != len(stars.y):
        raise ValueError(f"{len(ids)} ids of {ids.dtype} for {len(stars.y)} stars in {out.dtype}")
    fastest(__name__).draw(stars, ids, out)
