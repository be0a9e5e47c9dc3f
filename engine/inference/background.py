"""Skip flat tiles, whose contrast is too low for the model to find a nucleus in them.

Whether a tile is flat depends on its own pixels and on one number of its slide, so masks do not depend on blocks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block, Box, Lattice, source_box
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.kernels.flat import is_flat
from cellseg_batch.trainer.card import Normalisation

# Share of the slide's contrast (high - low) below which a tile is flat.  In real images that were dimmed step by step,
# the shipped model still finds nuclei at 0.009 (small ones, in fluorescence), and none at 0.008.
FLAT = 0.007


def flat_limit(bounds: Bounds, rule: Normalisation) -> float:
    """Return the difference of pixel values below which a tile of a slide is background; 0 if no tile may be skipped.

    Under a fixed rule it is 0: fixed bounds do not measure the slide's contrast, so nuclei may span little of them.
    """
    # Of all channels the least, so that a tile that shows something in any of them is computed.
    contrast = min(high - low for low, high in zip(bounds.low, bounds.high, strict=True))
    return FLAT * contrast if rule.kind == "percentile" else 0.0


def without_background(block: Block, pixels: NDArray[Any], lattice: Lattice, limit: float) -> Block:
    """Return the block without its flat tiles.

    Args:
        block: block of the slide.
        pixels: (C, h, w) of the block's read box.
        lattice: tile lattice of the slide.
        limit: difference of pixel values from `flat_limit`; 0 keeps all tiles.
    """
    if not limit > 0:
        return block

    def flat(box: Box) -> bool:
        in_pixels = source_box(box, lattice.shape).seen_from(block.read_box)
        return is_flat(pixels[(slice(None), *in_pixels.slices())], limit)

    return replace(block, tiles=tuple(tile for tile in block.tiles if not flat(tile.frame)))
