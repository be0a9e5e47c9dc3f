"""Run the tiles of a block through the compiled model: gather, model, stitch, batch by batch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.errors import ComputeError
from cellseg_batch.engine.geometry import Block, Box, Lattice, Tile, reflect
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.engine.inference.session import Feed
from cellseg_batch.engine.inference.stitching import make_stitch
from cellseg_batch.engine.objects.seeds import InstanceRule
from cellseg_batch.engine.stage_clock import StageClock
from cellseg_batch.kernels import stitch
from cellseg_batch.kernels.stitch import logit_threshold


@dataclass(frozen=True)
class BlockResult:
    """What one block became.

    Attributes:
        mask: (h, w) uint8, 1 is foreground; for instances the pixel codes.
        probability: (h, w) uint8, 255 is certain; None unless asked for.
        foreground: pixels that are foreground.
        missing: NaN values in the block's input (each counts as 0).
    """

    mask: NDArray[np.uint8]
    probability: NDArray[np.uint8] | None
    foreground: int
    missing: int


class AnyRunner(Protocol):
    """What segments the blocks of one slide, on the CPU or on a GPU."""

    def segment(self, pixels: NDArray[Any], block: Block) -> BlockResult:
        """Segment ``block`` from the pixels (C, h, w) of its read box.

        Raises:
            ComputeError: the model gives no usable numbers.
        """
        ...


class Runner:
    """Segments blocks of one slide, one at a time: the feed is its own meanwhile, and the model while it runs.

    Args:
        feed: the model; the last batch of a block is padded with anything.
        lattice: of the slide.
        bounds: of the slide.
        threshold: probability above which a pixel is foreground.
        probability: also make the probability.
        stitch: crop or blend.
        clock: counts the stages.
        instances: makes pixel codes instead of the mask; None for a mask.
    """

    def __init__(
        self,
        feed: Feed,
        lattice: Lattice,
        bounds: Bounds,
        threshold: float,
        probability: bool,
        stitch: str,
        clock: StageClock,
        instances: InstanceRule | None = None,
    ) -> None:
        self._feed = feed
        self._lattice = lattice
        self._bounds = bounds
        self._threshold = logit_threshold(threshold)
        self._probability = probability
        self._stitch = stitch
        self._classify = None if instances is None else instances.classifier(threshold)
        self._clock = clock
        if probability or stitch == "blend" or instances is not None or not feed.takes_bytes:
            _load_numba()  # bytes become a mask without it

    def segment(self, pixels: NDArray[Any], block: Block) -> BlockResult:
        """Segment ``block`` from the pixels (C, h, w) of its read box.

        Raises:
            ComputeError: the model returned NaN.
        """
        # What no tile covers is background.
        mask = np.zeros(block.box.shape, np.uint8)
        probability = np.zeros(block.box.shape, np.uint8) if self._probability else None
        way = self._stitch, block, self._lattice, self._threshold, mask, probability
        stitching = make_stitch(
            *way, kernels=stitch, empty=partial(np.empty, dtype=np.float32), classify=self._classify
        )
        count = self._feed.shape[0]
        for first in range(0, len(block.tiles), count):
            batch = block.tiles[first : first + count]
            logits = self.logits(pixels, block.read_box, batch)
            with self._clock.stage("stitch"):
                stitching.add(first, logits[: len(batch)])
        with self._clock.stage("stitch"):
            foreground, undefined = (sum(counts) for counts in zip(*stitching.finish(), strict=True))
        refuse_nan(block, undefined)
        return BlockResult(mask, probability, foreground, count_missing(pixels, block))

    def logits(self, pixels: NDArray[Any], read_box: Box, batch: Sequence[Tile]) -> NDArray[np.float32]:
        """Logits (N, K, height, width) of up to N tiles of one size, valid until the next call."""
        with self._clock.stage("gather"):
            rows, columns = source_tables(batch, self._lattice.shape, read_box)
            self._feed.fill(pixels, rows, columns, self._bounds)
        with self._feed.turn, self._clock.stage("model"):  # waiting for its turn is no work of the model
            return self._feed.logits()


@cache
def _load_numba() -> None:
    """Have it imported and its first call made meanwhile, once: together they take half a second."""
    tile = np.zeros((1, 1, 1, 1), np.float32), np.zeros((1, 6), np.int64), np.zeros((1, 1), np.uint8)
    threading.Thread(target=stitch.stitch_probability, args=tile, daemon=True).start()


def no_foreground(pixels: NDArray[Any], block: Block, probability: bool) -> BlockResult:
    """The result of a block of which no tile is computed."""
    mask = np.zeros(block.box.shape, np.uint8)
    return BlockResult(mask, mask if probability else None, 0, count_missing(pixels, block))


def source_tables(
    tiles: Sequence[Tile], shape: tuple[int, int], read_box: Box
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column in the pixels of ``read_box`` of each row (N, T_y) and column (N, T_x) of tiles of a slide."""
    rows = np.stack([reflect(tile.frame.y0, tile.frame.y1, shape[0]) for tile in tiles]) - read_box.y0
    columns = np.stack([reflect(tile.frame.x0, tile.frame.x1, shape[1]) for tile in tiles]) - read_box.x0
    return rows, columns


def refuse_nan(block: Block, undefined: int) -> None:
    """Raise ComputeError where ``undefined`` logits of a block were NaN."""
    if undefined:
        raise ComputeError(
            f"block {block.index}",
            expected="finite logits",
            found=f"{undefined} NaN",
            cause="weights or a precision that overflow",
            remedy="try --precision fp32",
        )


def count_missing(pixels: NDArray[Any], block: Block) -> int:
    """NaN values in the core of a block, each counted by exactly one block."""
    if pixels.dtype.kind != "f":
        return 0
    top, left = block.box.y0 - block.read_box.y0, block.box.x0 - block.read_box.x0
    height, width = block.box.shape
    return int(np.count_nonzero(np.isnan(pixels[:, top : top + height, left : left + width])))
