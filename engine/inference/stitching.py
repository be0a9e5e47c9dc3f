"""Turn the logits of a block's tiles into its mask: crop each core, or blend neighbours where they overlap.

Both work on host arrays and on GPU tensors, with the kernels that the caller passes.  They must not know which backend
computed the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block, Box, Lattice, Tile
from cellseg_batch.engine.objects.seeds import PixelClassifier
from cellseg_batch.kernels.tiling import TileGrid


class Stitch(Protocol):
    """Takes the logits of a block's tiles in order and writes its mask, and its probability if asked for."""

    def add(self, first: int, logits: Any) -> None:
        """Take the logits (n, K, T_y, T_x) of tiles ``first``, ``first`` + 1, ...; a repeated call does no harm."""
        ...

    def finish(self) -> list[Any]:
        """Finish after the last tile; return pairs (foreground pixels, NaN logits) that the caller adds up."""
        ...


def make_stitch(
    stitch: str,
    block: Block,
    lattice: Lattice,
    threshold: float,
    mask: Any,
    probability: Any,
    kernels: Any,
    empty: Callable[[tuple[int, ...]], Any],
    classify: PixelClassifier | None = None,
) -> Stitch:
    """Return the stitching of one block.

    Args:
        stitch: crop or blend.
        block: the block to stitch; for blend its tiles must reach one core beyond it.
        lattice: tile lattice of the slide.
        threshold: logit above which a pixel is foreground.
        mask: (h, w) uint8 of the block, overwritten.
        probability: (h, w) uint8 of the block, overwritten; None if it is not wanted.
        kernels: module with the functions of `cellseg_batch.kernels.stitch` for these arrays.
        empty: makes an array for logits from its shape.
        classify: writes pixel codes of a batch's cores instead of their mask; only for crop.
    """
    out = _Output(kernels, threshold, mask, probability, classify)
    return _Crop(out, block) if stitch == "crop" else _Blend(out, block, lattice, empty)


@dataclass(frozen=True)
class _Output:
    kernels: Any
    threshold: float
    mask: Any
    probability: Any
    classify: PixelClassifier | None


class _Crop:
    """Writes each tile's core: it needs no tile beyond the block and reads one logit per pixel."""

    def __init__(self, out: _Output, block: Block) -> None:
        self._out = out
        self._block = block
        self._counts: dict[int, Any] = {}

    def add(self, first: int, logits: Any) -> None:
        places = core_places(self._block.tiles[first : first + len(logits)], self._block.box)
        kernels, out = self._out.kernels, self._out
        if out.classify is not None:
            self._counts[first] = out.classify(logits, places, out.mask)
        else:
            self._counts[first] = kernels.stitch_mask(logits, places, out.threshold, out.mask)
        if out.probability is not None:
            kernels.stitch_probability(logits, places, out.probability)

    def finish(self) -> list[Any]:
        return list(self._counts.values())


class _Blend:
    """Fades overlapping tiles into each other, linearly in logit space; holds the logits of all tiles until the end."""

    def __init__(self, out: _Output, block: Block, lattice: Lattice, empty: Callable[[tuple[int, ...]], Any]) -> None:
        self._out = out
        # Blend only a tile's core and half of the overlap around it.
        reach = lattice.overlap // 2
        self._inner = slice(lattice.margin - reach, reach - lattice.margin or None)
        height, width = lattice.core
        self._logits = empty((len(block.tiles), 1, height + 2 * reach, width + 2 * reach))
        corner = block.tiles[0].core
        top, left = block.box.y0 - corner.y0 + reach, block.box.x0 - corner.x0 + reach
        self._grid = TileGrid(*block.tile_rows_columns, lattice.overlap, top, left, *block.box.shape)

    def add(self, first: int, logits: Any) -> None:
        self._logits[first : first + len(logits)] = logits[:, :1, self._inner, self._inner]

    def finish(self) -> list[Any]:
        kernels, out = self._out.kernels, self._out
        if out.probability is not None:
            kernels.blend_probability(self._logits, self._grid, out.probability)
        return [kernels.blend_mask(self._logits, self._grid, out.threshold, out.mask)]


def core_places(tiles: Sequence[Tile], target: Box) -> NDArray[np.int64]:
    """Return where tiles' cores lie in their tiles and in ``target``, (N, 6) int64 for the kernel `stitch_mask`."""
    return np.array(
        [
            (
                tile.core.y0 - tile.frame.y0,
                tile.core.x0 - tile.frame.x0,
                tile.core.y0 - target.y0,
                tile.core.x0 - target.x0,
                *tile.core.shape,
            )
            for tile in tiles
        ],
        np.int64,
    )
