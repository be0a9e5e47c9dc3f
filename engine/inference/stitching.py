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
from cellseg_batch.engine.inference.decoders import GrowingDecoder, PixelWriter
from cellseg_batch.engine.inference.prediction import PredictionRule
from cellseg_batch.engine.objects.stars import StarRule
from cellseg_batch.kernels.stardist import Stars, find_stars, join
from cellseg_batch.kernels.stitch import logit_threshold
from cellseg_batch.kernels.tiling import TileGrid


class Stitch(Protocol):
    """Takes the logits of a block's tiles in order and writes its mask, and its probability if asked for."""

    def add(self, first: int, logits: Any) -> None:
        """Take the logits (n, K, T_y, T_x) of tiles ``first``, ``first`` + 1, ...; a repeated call does no harm."""
        ...

    def finish(self) -> list[Any]:
        """Finish after the last tile; return pairs (foreground pixels, NaN logits) that the caller adds up."""
        ...

    def stars(self) -> Stars | None:
        """The candidates of all tiles, in px of the slide; None unless the rule asks for them."""
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
        mask: (h, w) uint8 of the block, overwritten with its mask or pixel codes; stars leave it.
        probability: (h, w) uint8 of the block, overwritten; None if it is not wanted.
        classes: (h, w) uint8 of the block, overwritten with its class codes, for crop; None if they are not wanted.
        kernels: module with the functions of `cellseg_batch.kernels.stitch` for these arrays.
        codes: module with the functions of `cellseg_batch.kernels.pixel_codes` for these arrays.
        empty: makes an array for logits from its shape.
    """
    decoder, stitch = rule.decoder, rule.stitch
    write_probability = on_grid(decoder.probability_writer(stitch, kernels), rule.grid)
    if rule.stars is not None:
        return _Collect(rule, rule.stars, block, probability, write_probability)
    if rule.instances is None:
        write_mask = on_grid(decoder.mask_writer(stitch, rule.threshold, kernels), rule.grid)
    else:
        assert isinstance(decoder, GrowingDecoder)
        write_mask = decoder.code_writer(rule.instances, rule.threshold, codes)
    out = _Output(mask, write_mask, probability, write_probability, classes, _class_writer(rule, codes))
    return _Crop(out, block) if stitch == "crop" else _Blend(out, block, rule, empty)


def _class_writer(rule: PredictionRule, codes: Any) -> PixelWriter | None:
    if rule.classes is None:
        return None
    first, background = rule.classes.first, rule.classes.background
    return lambda logits, places, out: codes.write_classes(logits, places, first, background, out)


def on_grid(write: PixelWriter, grid: int) -> PixelWriter:
    """Make a writer for `crop` of logits that lie ``grid`` px apart; each fills the square of px that begins at it."""

    def write_squares(logits: Any, places: NDArray[np.int64], out: NDArray[np.uint8]) -> tuple[int, int]:
        foreground = missing = 0
        for tile, (from_y, from_x, to_y, to_x, height, width) in enumerate(places):
            rows, columns = -(-height // grid), -(-width // grid)
            points = np.empty((rows, columns), np.uint8)
            place = np.array([[from_y // grid, from_x // grid, 0, 0, rows, columns]])
            counts = write(logits[tile : tile + 1], place, points)
            core = out[to_y : to_y + height, to_x : to_x + width]
            core[...] = points.repeat(grid, axis=0).repeat(grid, axis=1)[:height, :width]
            foreground += int(np.count_nonzero(core))
            missing += counts[1] if counts else 0
        return foreground, missing

    return write if grid == 1 else write_squares


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

    def stars(self) -> None:
        return None


class _Collect:
    """Finds the candidates in each tile's core: it needs no tile beyond the block."""

    def __init__(
        self,
        rule: PredictionRule,
        stars: StarRule,
        block: Block,
        probability: NDArray[np.uint8] | None,
        write_probability: PixelWriter,
    ) -> None:
        self._threshold = logit_threshold(rule.threshold)
        self._rule = stars
        self._block = block
        self._probability = probability
        self._write_probability = write_probability
        self._found: dict[int, tuple[Stars, int]] = {}

    def add(self, first: int, logits: Any) -> None:
        rule, box = self._rule, self._block.box
        places = core_places(self._block.tiles[first : first + len(logits)], box)
        found, missing = find_stars(logits, places, rule.grid, self._threshold, rule.downscale, rule.longest)
        self._found[first] = found.shifted(box.y0, box.x0), missing
        if self._probability is not None:
            self._write_probability(logits, places, self._probability)

    def finish(self) -> list[Any]:
        return [(0, missing) for _, missing in self._found.values()]

    def stars(self) -> Stars:
        return join([found for found, _ in self._found.values()], self._rule.rays)


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

    def stars(self) -> None:
        return None


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
