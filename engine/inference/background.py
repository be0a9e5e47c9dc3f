"""Tiles that need not be computed, or not whole, as what they show is too flat for the model to find anything in it.

A tile is judged by its own pixels and by one number of its slide, so masks stay independent of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block, Box, Lattice, Tile, source_box
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.kernels.flat import is_flat
from cellseg_batch.trainer.bundle import Normalisation

# Share of a slide's contrast.  Real images of nuclei, dimmed until the shipped model found none, still found some at
# 0.0139 (small ones, fluorescence); as they were, no image in which it found a nucleus had less than 0.06.
FLAT = 0.0125

# A tile is shortened by so many px, or 2, 4 or 8 times as many: of few sizes, as a network keeps memory for each.
_STEP = 128
_STEPS = 4
# px inside a core, at least, that must be flat as well where the rest is cut off: room for an object's faint rim.
_RIM = 32
# Sides in px of a window of a sample and of a cell of it; the share of flat windows above which trimming may pay.
_WINDOW, _CELL = 128, 16
_LITTLE = 0.2


def flat_limit(bounds: Bounds, rule: Normalisation) -> float:
    """Difference of pixel values below which a tile of a slide is background; 0 if there is none.

    Fixed bounds say nothing of the slide's own contrast, of which its nuclei may be a small part.
    """
    return FLAT * (bounds.high - bounds.low) if rule.rule == "percentile" else 0.0


def shows_little(sample: Iterable[NDArray[Any]], limit: float) -> bool:
    """Whether so much of a sample (C, h, w) of a slide is background that many tiles will show it in part.

    It is judged roughly, by the means of cells of 16 x 16 px: nothing but the time depends on it.

    Args:
        sample: parts of the slide, or of a lower level of it.
        limit: as `flat_limit` says.
    """
    count = flat = 0
    for part in sample:
        for y in range(0, part.shape[1] - _CELL + 1, _WINDOW):
            for x in range(0, part.shape[2] - _CELL + 1, _WINDOW):
                window = part[:, y : y + _WINDOW, x : x + _WINDOW]
                rows, columns = window.shape[1] // _CELL, window.shape[2] // _CELL
                whole = window[:, : rows * _CELL, : columns * _CELL]
                means = whole.reshape(len(part), rows, _CELL, columns, _CELL).mean(axis=(2, 4))
                count += 1
                flat += bool((np.ptp(means, axis=(1, 2)) < limit).all())
    return flat > _LITTLE * count


def without_background(block: Block, pixels: NDArray[Any], lattice: Lattice, limit: float, trim: bool) -> Block:
    """The block without its flat tiles, and if asked for without the flat ends of the others.

    Args:
        block: of the slide.
        pixels: (C, h, w) of its read box.
        lattice: of the slide.
        limit: as `flat_limit` says; 0 leaves all tiles as they are.
        trim: also cut off of each tile what is flat along its sides.
    """
    if not limit > 0:
        return block

    def flat(box: Box) -> bool:
        seen = source_box(box, lattice.shape).seen_from(block.read_box)
        return is_flat(pixels[(slice(None), *seen.slices())], limit)

    tiles = (tile for tile in block.tiles if not flat(tile.frame))
    if trim:
        tiles = (left for tile in tiles if (left := _trimmed(tile, lattice, flat)).core.area)
    return replace(block, tiles=tuple(tiles))


def _trimmed(tile: Tile, lattice: Lattice, flat: Callable[[Box], bool]) -> Tile:
    """The tile without what is flat along one of its sides, of each axis."""
    frame = tile.frame
    for axis in (0, 1):
        frame = next((left for left, gone in _cuts(frame, axis, lattice) if flat(gone)), frame)
    return Tile(frame, frame.grown(-lattice.margin).within(tile.core))


def _cuts(frame: Box, axis: int, lattice: Lattice) -> Iterator[tuple[Box, Box]]:
    """What may be left of a frame along an axis, and what has to be flat for that; the least that may be left first."""
    # A multiple of the network's total stride, so that what is left is seen in the same phase.
    unit = math.gcd(*lattice.core, lattice.margin)
    step = -(-_STEP // unit) * unit
    rim = max(_RIM, lattice.margin // 2)  # more where the model sees the slide shrunk
    length = frame.shape[axis]
    for power in reversed(range(_STEPS)):
        cut = step * 2**power
        if length - cut >= unit + 2 * lattice.margin:
            gone = min(length, cut + lattice.margin + rim)
            yield _part(frame, axis, cut, length), _part(frame, axis, 0, gone)
            yield _part(frame, axis, 0, length - cut), _part(frame, axis, length - gone, length)


def _part(box: Box, axis: int, start: int, stop: int) -> Box:
    """Rows (axis 0) or columns (axis 1) ``start`` to ``stop`` of a box, counted from its own first."""
    if axis == 0:
        return Box(box.y0 + start, box.x0, box.y0 + stop, box.x1)
    return Box(box.y0, box.x0 + start, box.y1, box.x0 + stop)
