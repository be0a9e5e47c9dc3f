"""Tiles that need not be computed, as what they show is too flat for the model to find anything in it.

A tile is judged by its own pixels and by one number of its slide, so masks stay independent of blocks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block, Box, Lattice, source_box
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.kernels.flat import is_flat
from cellseg_batch.trainer.bundle import Normalisation

# Share of a slide's contrast.  Real images of nuclei, dimmed until the shipped model found none, still found some at
# 0.0139 (small ones, fluorescence); as they were, no image in which it found a nucleus had less than 0.06.
FLAT = 0.0125


def flat_limit(bounds: Bounds, rule: Normalisation) -> float:
    """Difference of pixel values below which a tile of a slide is background; 0 if there is none.

    Fixed bounds say nothing of the slide's own contrast, of which its nuclei may be a small part.
    """
    return FLAT * (bounds.high - bounds.low) if rule.rule == "percentile" else 0.0


def without_background(block: Block, pixels: NDArray[Any], lattice: Lattice, limit: float) -> Block:
    """The block without its flat tiles.

    Args:
        block: of the slide.
        pixels: (C, h, w) of its read box.
        lattice: of the slide.
        limit: as `flat_limit` says; 0 leaves all tiles as they are.
    """
    if not limit > 0:
        return block

    def flat(box: Box) -> bool:
        seen = source_box(box, lattice.shape).seen_from(block.read_box)
        return is_flat(pixels[(slice(None), *seen.slices())], limit)

    return replace(block, tiles=tuple(tile for tile in block.tiles if not flat(tile.frame)))
