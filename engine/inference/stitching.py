"""Turn the logits of a block's tiles into its mask: crop each core, or blend neighbours where they overlap.

Both work on host arrays and on GPU tensors, with the kernels that the caller passes.  They must not know which backend
computed the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block, Box, Tile
from cellseg_batch.engine.inference.decoders import PixelWriter
from cellseg_batch.engine.inference.prediction import PredictionRule
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
    rule: PredictionRule,
    block: Block,
    mask: Any,
    probability: Any,
    classes: Any,
    kernels: Any,
    codes: Any,
    empty: Callable[[tuple[int, ...]], Any],
) -> Stitch:
    """Return the stitching of one block.

    Args:
        rule: prediction rule of the slide.
        block: the block to stitch; for blend its tiles must reach one core beyond it.
        mask: (h, w) uint8 of the block, overwritten with its mask or pixel codes.
        probability: (h, w) uint8 of the block, overwritten; None if it is not wanted.
        classes: (h, w) uint8 of the block, overwritten with its class codes, for crop; None if they are not wanted.
        kernels: module with the functions of `cellseg_batch.kernels.stitch` for these arrays.
        codes: module with the functions of `cellseg_batch.kernels.pixel_codes` for these arrays.
        empty: makes an array for logits from its shape.
    """
    decoder, stitch = rule.decoder, rule.stitch
    if rule.instances is None:
        write_mask = decoder.mask_writer(stitch, rule.threshold, kernels)
    else:
        write_mask = decoder.code_writer(rule.instances, rule.threshold, codes)
    out = _Output(
        mask, write_mask, probability, decoder.probability_writer(stitch, kernels), classes, _class_writer(rule, codes)
    )
    return _Crop(out, block) if stitch == "crop" else _Blend(out, block, rule, empty)


def _class_writer(rule: PredictionRule, codes: Any) -> PixelWriter | None:
    if rule.classes is None:
        return None
    first, background = rule.classes.first, rule.classes.background
    return lambda logits, places, out: codes.write_classes(logits, places, first, background, out)


@dataclass(frozen=True)
class _Output:
    mask: Any
    write_mask: PixelWriter
    probability: Any
    write_probability: PixelWriter
    classes: Any
    write_classes: PixelWriter | None


class _Crop:
    """Writes each tile's core: it needs no tile beyond the block."""

    def __init__(self, out: _Output, block: Block) -> None:
        self._out = out
        self._block = block
        self._counts: dict[int, list[Any]] = {}

    def add(self, first: int, logits: Any) -> None:
        places = core_places(self._block.tiles[first : first + len(logits)], self._block.box)
        out = self._out
        self._counts[first] = [out.write_mask(logits, places, out.mask)]
        if out.probability is not None:
            out.write_probability(logits, places, out.probability)
        if out.write_classes is not None:
            self._counts[first].append(out.write_classes(logits, places, out.classes))

    def finish(self) -> list[Any]:
        return list(chain.from_iterable(self._counts.values()))


class _Blend:
    """Fades overlapping tiles into each other, linearly in logit space; holds the logits of all tiles until the end."""

    def __init__(
        self, out: _Output, block: Block, rule: PredictionRule, empty: Callable[[tuple[int, ...]], Any]
    ) -> None:
        self._out = out
        lattice = rule.lattice
        # Blend only a tile's core and half of the overlap around it.
        reach = lattice.overlap // 2
        self._inner = slice(lattice.margin - reach, reach - lattice.margin or None)
        height, width = lattice.core
        self._outputs = len(rule.decoder.mask_outputs)
        self._logits = empty((len(block.tiles), self._outputs, height + 2 * reach, width + 2 * reach))
        corner = block.tiles[0].core
        top, left = block.box.y0 - corner.y0 + reach, block.box.x0 - corner.x0 + reach
        self._grid = TileGrid(*block.tile_rows_columns, lattice.overlap, top, left, *block.box.shape)

    def add(self, first: int, logits: Any) -> None:
        self._logits[first : first + len(logits)] = logits[:, : self._outputs, self._inner, self._inner]

    def finish(self) -> list[Any]:
        out = self._out
        if out.probability is not None:
            out.write_probability(self._logits, self._grid, out.probability)
        return [out.write_mask(self._logits, self._grid, out.mask)]


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
