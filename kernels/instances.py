"""Turn logits into instances: classify pixels of tiles, number the seeds of a block, grow seeds into the foreground.

A *pixel code* (uint8) classifies a pixel: 0 background; 1 *border*, foreground where nuclei touch; 2 *inner*, all other
foreground; 3 *seed*, where smoothed distance minus border is high.  The 4-connected components of the seeds are
numbered, and grow by synchronous steps, first into inner and then into border pixels, so that they meet where the model
predicts a border.  Each function needs only pixels near those that it decides; `grow` states the distance.

A *numbered code* (uint32 or uint64) also names the seed of a pixel: 0, 1 and 2 as above, and 2 + id for the seed
``id``, counted from 1.

All arithmetic is in integers, so the fast form gives the same bits as the reference, which defines the meaning.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._fastest import fastest
from cellseg_batch.kernels.stitch import stitch_mask
from cellseg_batch.kernels.tiling import check_places

BACKGROUND, BORDER, INNER, SEED = 0, 1, 2, 3
# Fixed point: 2 ** 14 stands for 1.  A logit is looked up in tables of 128 steps per unit from -8 to 8.
ONE_BITS = 14
TABLE_STEPS, TABLE_RANGE = 128, 8


class SeedRule(NamedTuple):
    """The rule that decides a pixel's code; made by `seed_rule`."""

    foreground: np.float32
    """Logit above which a pixel is foreground."""
    distance: NDArray[np.int32]
    """Probability of each quantised logit, in units of 2 ** -14."""
    border: NDArray[np.int32]
    """Probability of each quantised logit times the border's weight, in units of 2 ** -14."""
    weights: NDArray[np.int32]
    """Half of a symmetric smoothing kernel, from the centre on; the whole kernel adds up to 2 ** 14."""
    spacing: int
    """Pixels between two taps of the kernel."""
    seed_level: int
    """Smoothed distance minus border above which a foreground pixel is a seed."""
    border_level: int
    """Smoothed distance minus border at or below which a foreground pixel is border."""

    @property
    def reach(self) -> int:
        """How many px around a pixel decide its code."""
        return (len(self.weights) - 1) * self.spacing


class Seeds(NamedTuple):
    """The numbered seeds of a block, ordered by their ids 1, 2, ..."""

    first: NDArray[np.int64]
    """Index of each seed's first pixel, in raster order of the block."""
    area: NDArray[np.int64]
    """Area of each seed in px."""


def seed_rule(
    foreground: float, border_weight: float, smoothing: float, spacing: int, seed_level: float, border_level: float
) -> SeedRule:
    """Return the rule in fixed point.

    Args:
        foreground: logit above which a pixel is foreground.
        border_weight: factor of the border's probability that is subtracted from the distance, at most 3.
        smoothing: standard deviation of a Gaussian, cut at four of them, in units of ``spacing`` px.
        spacing: px between two taps; interpolated logits of a downscaled model are smoothed on its own grid.
        seed_level: smoothed distance minus border above which a foreground pixel is a seed.
        border_level: smoothed distance minus border at or below which a foreground pixel is border.
    """
    unit = 1 << ONE_BITS
    logits = np.arange(2 * TABLE_RANGE * TABLE_STEPS + 1) / TABLE_STEPS - TABLE_RANGE
    probability = 0.5 * (1 + np.tanh(0.5 * logits))
    distance = np.arange(int(4 * smoothing + 0.5) + 1)
    gaussian = np.exp(-0.5 * (distance / max(smoothing, 1e-9)) ** 2)
    weights = np.round(unit * gaussian / (2 * gaussian.sum() - gaussian[0])).astype(np.int32)
    weights[0] = unit - 2 * weights[1:].sum()
    return SeedRule(
        np.float32(foreground),
        np.round(unit * probability).astype(np.int32),
        np.round(unit * border_weight * probability).astype(np.int32),
        weights,
        spacing,
        round(unit * seed_level),
        round(unit * border_level),
    )


def classify_pixels(
    logits: NDArray[np.float32], places: NDArray[np.int64], rule: SeedRule, out: NDArray[np.uint8]
) -> tuple[int, int]:
    """Write the pixel codes of every tile's core: 0 background, 1 border, 2 inner, 3 seed.

    The smoothing reads into the tile's margin and repeats the tile's outermost pixels beyond it.

    Args:
        logits: (N, K, T_y, T_x) float32 of a batch: 0 foreground, 1 border, 2 distance.
        places: as in `cellseg_batch.kernels.stitch.stitch_mask`.
        rule: from `seed_rule`.
        out: (H, W) uint8.

    Returns:
        (foreground pixels, pixels with a NaN among their logits); a NaN in logit 0 is background, in the others it
        counts as -8.

    Raises:
        ValueError: a core is out of bounds, or there are fewer than three logits.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"{logits.shape[1]} logits; seeds need foreground, border and distance")
    check_places(places, logits.shape, out.shape)
    foreground, missing = fastest(__name__).classify_pixels(logits, places, rule, out)
    return int(foreground), int(missing)


def classify_foreground(
    logits: NDArray[np.float32], places: NDArray[np.int64], foreground: float, out: NDArray[np.uint8]
) -> tuple[int, int]:
    """Write pixel codes for a model without distance: all foreground is seed, so its components are the objects.

    Arguments and result as `classify_pixels`; ``foreground`` is the logit above which a pixel is foreground.
    """
    counts = stitch_mask(logits, places, foreground, out)
    for _, _, y, x, height, width in places:
        out[y : y + height, x : x + width] *= SEED
    return counts


def label_seeds(
    pixel_codes: NDArray[np.uint8],
    cell: tuple[int, int],
    smallest: int,
    open_sides: tuple[bool, bool, bool, bool],
    out: NDArray[np.uint32],
) -> Seeds:
    """Number the 4-connected components of a block's seeds and write the block's numbered codes.

    Ids are ordered by the cell that holds a seed's first pixel, then by that pixel, both in raster order.  A component
    of fewer than ``smallest`` px becomes inner, unless it touches an open side, where it may continue.

    Args:
        pixel_codes: (H, W) uint8 from `classify_pixels`.
        cell: (height, width) in px of the cells, laid from the block's first pixel.
        smallest: area in px.
        open_sides: whether the slide continues above, left of, below and right of the block.
        out: (H, W) uint32, receives the numbered codes.
    """
    first, area = fastest(__name__).label_seeds(pixel_codes, cell, smallest, open_sides, out)
    return Seeds(first, area)


def renumber(codes: NDArray[np.uint32], final: NDArray[Any], out: NDArray[Any]) -> None:
    """Write ``final[codes]`` without numpy's index array of 8 bytes per pixel.

    Args:
        codes: (H, W) numbered codes from `label_seeds`.
        final: (2 + ids + 1,) uint32 or uint64, for each numbered code the numbered code with its final id.
        out: (H, W) of the same dtype as ``final``.

    Raises:
        ValueError: the shapes do not fit, or a code lies beyond ``final``.
    """
    if codes.shape != out.shape or codes.max(initial=0) >= len(final):
        raise ValueError(f"codes {codes.shape} up to {codes.max(initial=0)}, {len(final)} of which have a final one")
    fastest(__name__).renumber(codes, final, out)


def reach(steps: int) -> int:
    """Return the width in px of the frame that `grow` needs around its output."""
    return 2 * steps + 1


def grow(codes: NDArray[Any], steps: int, out: NDArray[Any]) -> None:
    """Grow every seed by ``steps`` steps into inner pixels, then by as many into inner and border pixels.

    In each step every foreground pixel without an id takes the id of the first neighbour that had one before the step,
    in the order above, left, right, below.  So the result at a pixel depends on codes at most 2 * steps px away.

    Args:
        codes: (H + 2 f, W + 2 f) numbered codes, uint32 or uint64, with f = ``reach(steps)``; overwritten.
        steps: number of steps in each of the two rounds, at least 1.
        out: (H, W) of the same dtype, receives the ids; 0 where no seed grew.

    Raises:
        ValueError: the shapes do not fit, or ``steps`` is below 1.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps; growth needs at least 1")
    frame = reach(steps)
    if codes.shape != (out.shape[0] + 2 * frame, out.shape[1] + 2 * frame):
        raise ValueError(f"codes {codes.shape} are not ids {out.shape} with a frame of {frame} px")
    fastest(__name__).grow(codes, steps, out)
