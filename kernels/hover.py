"""Turn the maps of HoVer-Net into pixel codes, which `cellseg_batch.kernels.instances` makes into instances.

HoVer-Net (Graham et al. 2019, doi 10.1016/j.media.2019.101563) predicts for each pixel of a nucleus how far it lies
from the centre, horizontally and vertically: from -1 at one side of the nucleus to 1 at the other.  Within a nucleus
both maps *rise*; where two nuclei touch, one of them falls steeply.

The *rise* of a pixel is the lower one of two Sobel gradients, of the horizontal map along x and of the vertical map
along y.  The Sobel kernel is scaled by the maps' range: a rise lies between -1, a step from 1 to -1, and 1, a step from
-1 to 1.  The published method stretches the gradients of each image to their extremes instead, which makes a nucleus
depend on all others in its tile; with fixed bounds a pixel code depends on outputs at most `HoverRule.reach` px away.
A pixel code is a seed where a nucleus rises, border where it falls, and inner between.

All arithmetic is in integers, so the fast form gives the same bits as the reference, which defines the meaning.
"""

from __future__ import annotations

from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels._fastest import fastest
from cellseg_batch.kernels.instances import ONE_BITS
from cellseg_batch.kernels.tiling import check_places

SOBEL = 21
"""Width of the Sobel kernel in px of the image that the model is shown, as published."""


class HoverRule(NamedTuple):
    """The rule that decides a pixel's code; made by `hover_rule`.

    Both kernels are given by their half from the centre on, without outer weights that round to 0.
    """

    foreground: np.float32
    """Logit above which a pixel is foreground."""
    smooth: NDArray[np.int32]
    """Even kernel across the direction of a gradient; the whole kernel adds up to 2 ** 14."""
    slope: NDArray[np.int32]
    """Odd kernel along the direction of a gradient; the absolute weights of the whole kernel add up to 2 ** 14."""
    spacing: int
    """Pixels between two taps of the kernels."""
    seed_level: int
    """Rise above which a foreground pixel is a seed, in units of 2 ** -14."""
    border_level: int
    """Rise at or below which a foreground pixel is border, in units of 2 ** -14."""

    @property
    def reach(self) -> int:
        """How many px around a pixel decide its code."""
        return (max(len(self.smooth), len(self.slope)) - 1) * self.spacing


def hover_rule(foreground: float, spacing: int, seed_level: float, border_level: float) -> HoverRule:
    """Return the rule in fixed point.

    Args:
        foreground: logit above which a pixel is foreground.
        spacing: px between two taps; interpolated logits of a downscaled model are differentiated on its own grid.
        seed_level: rise above which a foreground pixel is a seed, -1 to 1.
        border_level: rise at or below which a foreground pixel is border, -1 to 1.
    """
    unit, radius = 1 << ONE_BITS, SOBEL // 2
    # A Sobel kernel of n taps is n - 1 times (1, 1) in one direction, and n - 2 times that and (-1, 1) in the other.
    smooth = np.array([comb(SOBEL - 1, radius + tap) for tap in range(radius + 1)])
    slope = np.array([comb(SOBEL - 2, radius + tap - 1) - comb(SOBEL - 2, radius + tap) for tap in range(radius + 1)])
    weights = np.round(unit * smooth / (2 * smooth.sum() - smooth[0])).astype(np.int32)
    weights[0] = unit - 2 * weights[1:].sum()
    slopes = np.round(unit / 2 * slope / slope.sum()).astype(np.int32)
    slopes[1] = unit // 2 - slopes[2:].sum()
    return HoverRule(
        np.float32(foreground),
        np.trim_zeros(weights, "b"),
        np.trim_zeros(slopes, "b"),
        spacing,
        round(unit * seed_level),
        round(unit * border_level),
    )


def classify_maps(
    logits: NDArray[np.float32], places: NDArray[np.int64], rule: HoverRule, out: NDArray[np.uint8]
) -> tuple[int, int]:
    """Write the pixel codes of every tile's core: 0 background, 1 border, 2 inner, 3 seed.

    The Sobel kernel reads into the tile's margin and repeats the tile's outermost pixels beyond it.  Values of the maps
    beyond -1 and 1 count as these.

    Args:
        logits: (N, K, T_y, T_x) float32 of a batch: 0 logit of the foreground, 1 horizontal and 2 vertical map.
        places: as in `cellseg_batch.kernels.stitch.stitch_mask`.
        rule: from `hover_rule`.
        out: (H, W) uint8.

    Returns:
        (foreground pixels, pixels with a NaN among the three); a NaN in logit 0 is background, in a map it counts
        as -1.

    Raises:
        ValueError: a core is out of bounds, or there are fewer than three outputs.
    """
    check_maps(logits.shape)
    check_places(places, logits.shape, out.shape)
    foreground, missing = fastest(__name__).classify_maps(logits, places, rule, out)
    return int(foreground), int(missing)


def check_maps(logits: tuple[int, ...]) -> None:
    """Raise ValueError if logits of this shape (N, K, T_y, T_x) have too few outputs for `classify_maps`."""
    if logits[1] < 3:
        raise ValueError(f"{logits[1]} outputs; HoVer-Net has foreground, horizontal and vertical")
