"""Tiles that need not be computed, because what they show is too flat for the model to find anything in it.

A tile is judged by its own pixels and by one number of its slide, so masks stay independent of blocks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block, Tile, source_box
from cellseg_batch.engine.normalise import Bounds
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


def without_background(block: Block, pixels: NDArray[Any], shape: tuple[int, int], limit: float) -> Block:
    """The block without its flat tiles.

    Args:
        block: of the slide.
        pixels: (C, h, w) of its read box.
        shape: of the slide's plane.
        limit: as `flat_limit` says.
    """

    def shows_something(tile: Tile) -> bool:
        seen, origin = source_box(tile.frame, shape), block.read_box
        rows, columns = slice(seen.y0 - origin.y0, seen.y1 - origin.y0), slice(seen.x0 - origin.x0, seen.x1 - origin.x0)
        return not is_flat(pixels[:, rows, columns], limit)

    return replace(block, tiles=tuple(filter(shows_something, block.tiles))) if limit > 0 else block
