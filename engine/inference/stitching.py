"""How the logits of a block's tiles become its mask: each core cropped, or neighbours blended where they overlap.

Both work on arrays of the host and on tensors of a GPU, with the kernels that are handed to them.  They must not know
where logits come from.
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
    """Takes the logits of a block's tiles in order and writes its mask, and its probability if there is one."""

    def add(self, first: int, logits: Any) -> None:
        """Take the logits (n, K, T_y, T_x) of tiles ``first``, ``first`` + 1, ...; again does no harm."""
        ...

    def finish(self) -> list[Any]:
        """After the last tile: pairs of foreground pixels and NaN logits, which are to be added up."""
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
    """What stitches one block.

    Args:
        stitch: crop or blend.
        block: that is stitched; to be blended, its tiles reach one core beyond it.
        lattice: of the slide.
        threshold: a logit.
        mask: (h, w) uint8 of the block, overwritten.
        probability: (h, w) uint8, overwritten, or None if it is not wanted.
        kernels: module with the functions of `cellseg_batch.kernels.stitch` for these arrays.
        empty: makes an array of a shape for logits.
        classify: writes pixel codes of a batch's cores instead of their mask; only to be cropped.
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
    """Writes each tile's core: no tile beyond the block is needed, and one logit is read per pixel."""

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
    """Fades overlapping tiles into each other, linearly in logit space; holds the logits of all tiles until then."""

    def __init__(self, out: _Output, block: Block, lattice: Lattice, empty: Callable[[tuple[int, ...]], Any]) -> None:
        self._out = out
        # Of a tile, its core and half of the overlap around it is blended.
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
    """Where the cores of tiles lie in their tiles and in ``target``: rows for `stitch_mask`, (N, 6) int64."""
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
