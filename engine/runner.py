"""Run the tiles of a block through the compiled model: gather, model, stitch, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.backends.backend import CompiledModel
from cellseg_batch.engine.errors import ComputeError
from cellseg_batch.engine.geometry import Block, Box, Lattice, Tile, reflect
from cellseg_batch.engine.normalise import Bounds
from cellseg_batch.engine.stages import StageClock
from cellseg_batch.kernels.gather import gather
from cellseg_batch.kernels.stitch import logit_threshold, stitch_mask, stitch_probability


@dataclass(frozen=True)
class BlockResult:
    """What one block became.

    Attributes:
        mask: (h, w) uint8, 1 is foreground.
        probability: (h, w) uint8, 255 is certain; None unless asked for.
        foreground: pixels of the mask that are 1.
        missing: NaN values in the block's input (each counts as 0).
    """

    mask: NDArray[np.uint8]
    probability: NDArray[np.uint8] | None
    foreground: int
    missing: int


class Runner:
    """Segments blocks of one slide, one at a time: model and batch are its own meanwhile.

    Args:
        model: compiled for the batch's shape.
        batch: (N, C, T_y, T_x) float32 that tiles are gathered into; the last one of a block is padded with what it
            held before.
        lattice: of the slide.
        bounds: of the slide.
        threshold: probability above which a pixel is foreground.
        probability: also make the probability.
        clock: counts the stages.
    """

    def __init__(
        self,
        model: CompiledModel,
        batch: NDArray[np.float32],
        lattice: Lattice,
        bounds: Bounds,
        threshold: float,
        probability: bool,
        clock: StageClock,
    ) -> None:
        self._model = model
        self._lattice = lattice
        self._bounds = bounds
        self._threshold = logit_threshold(threshold)
        self._probability = probability
        self._clock = clock
        self._batch = batch

    def segment(self, pixels: NDArray[Any], block: Block) -> BlockResult:
        """Segment ``block`` from the pixels (C, h, w) of its read box.

        Raises:
            ComputeError: the model returned NaN.
        """
        mask = np.empty(block.box.shape, np.uint8)
        probability = np.empty(block.box.shape, np.uint8) if self._probability else None
        foreground = undefined = 0
        tiles = iter(block.tiles)
        while batch := list(islice(tiles, len(self._batch))):
            logits = self.logits(pixels, block.read_box, batch)
            with self._clock.stage("stitch"):
                places = core_places(batch, block.box)
                counts = stitch_mask(logits, places, self._threshold, mask)
                foreground, undefined = foreground + counts[0], undefined + counts[1]
                if probability is not None:
                    stitch_probability(logits, places, probability)
        if undefined:
            raise ComputeError(
                f"block {block.index}",
                expected="finite logits",
                found=f"{undefined} NaN",
                cause="weights or a precision that overflow",
                remedy="try --precision fp32",
            )
        return BlockResult(mask, probability, foreground, count_missing(pixels, block))

    def logits(self, pixels: NDArray[Any], read_box: Box, batch: list[Tile]) -> NDArray[np.float32]:
        """Logits (N, K, T_y, T_x) of a batch of tiles, valid until the next call."""
        height, width = self._lattice.shape
        with self._clock.stage("gather"):
            rows = np.stack([reflect(tile.frame.y0, tile.frame.y1, height) for tile in batch]) - read_box.y0
            columns = np.stack([reflect(tile.frame.x0, tile.frame.x1, width) for tile in batch]) - read_box.x0
            gather(pixels, rows, columns, self._bounds.low, self._bounds.scale, self._batch[: len(batch)])
        with self._clock.stage("model"):
            return self._model(self._batch)


def core_places(batch: list[Tile], target: Box) -> NDArray[np.int64]:
    """Where the cores of a batch lie in their tiles and in ``target``: rows for `stitch_mask`, (N, 6) int64."""
    return np.array(
        [
            (
                tile.core.y0 - tile.frame.y0,
                tile.core.x0 - tile.frame.x0,
                tile.core.y0 - target.y0,
                tile.core.x0 - target.x0,
                *tile.core.shape,
            )
            for tile in batch
        ],
        np.int64,
    )


def count_missing(pixels: NDArray[Any], block: Block) -> int:
    """NaN values in the core of a block, each counted by exactly one block."""
    if pixels.dtype.kind != "f":
        return 0
    top, left = block.box.y0 - block.read_box.y0, block.box.x0 - block.read_box.x0
    height, width = block.box.shape
    return int(np.count_nonzero(np.isnan(pixels[:, top : top + height, left : left + width])))
