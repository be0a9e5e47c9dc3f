"""Predict blocks batch by batch: gather tiles on the host, run the model, stitch on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block, Box, Tile
from cellseg_batch.engine.inference.backends.protocol import Logits
from cellseg_batch.engine.inference.prediction import (
    BlockResult,
    PredictionRule,
    count_missing,
    no_foreground,
    refuse_nan,
    source_tables,
)
from cellseg_batch.engine.inference.session import Session
from cellseg_batch.engine.inference.stitching import make_stitch
from cellseg_batch.engine.stage_clock import StageClock
from cellseg_batch.kernels import pixel_codes, stitch


@dataclass(frozen=True)
class CpuPredictor:
    """Predicts blocks of one slide; the host gathers and stitches, whichever device runs the network.

    Attributes:
        session: lends the calling thread a session for one block, for batches of the rule's shape.
        rule: prediction rule of the slide.
        clock: counts the stages.
    """

    session: Callable[[], AbstractContextManager[Session]]
    rule: PredictionRule
    clock: StageClock

    def predict(self, pixels: NDArray[Any], block: Block) -> BlockResult:
        """See `Predictor.predict`.

        Raises:
            ComputeError: the model returned NaN.
        """
        rule = self.rule
        if not block.tiles:
            return no_foreground(block, rule, count_missing(pixels, block))
        with self.session() as session:
            return stitch_on_host(rule, pixels, block, self._batches(session, pixels, block), self.clock)

    def _batches(self, session: Session, pixels: NDArray[Any], block: Block) -> Iterator[tuple[int, Logits]]:
        """The logits of a block batch by batch, each with the number of its first tile."""
        count = self.rule.shape[0]
        for first in range(0, len(block.tiles), count):
            batch = block.tiles[first : first + count]
            logits = tile_logits(session, self.rule, pixels, block.read_box, batch, self.clock)
            yield first, logits[: len(batch)]


def stitch_on_host(
    rule: PredictionRule,
    pixels: NDArray[Any],
    block: Block,
    batches: Iterable[tuple[int, Logits]],
    clock: StageClock,
) -> BlockResult:
    """Turn the logits of a block into its result.

    Args:
        rule: prediction rule of the slide.
        pixels: (C, h, w) of the block's read box.
        block: the block.
        batches: number of the first tile and float32 logits (n, K, T_y, T_x) of each batch, in order of the tiles.
        clock: counts the stage "stitch".

    Raises:
        ComputeError: there are NaN among the logits.
    """
    # Pixels outside all tiles are background.
    mask = np.zeros(block.box.shape, np.uint8)
    probability = np.zeros(block.box.shape, np.uint8) if rule.probability else None
    classes = np.zeros(block.box.shape, np.uint8) if rule.classes else None
    stitching = make_stitch(
        rule,
        block,
        mask,
        probability,
        classes,
        kernels=stitch,
        codes=pixel_codes,
        empty=partial(np.empty, dtype=np.float32),
    )
    for first, logits in batches:
        with clock.stage("stitch"):
            stitching.add(first, logits)
    with clock.stage("stitch"):
        foreground, undefined = (sum(counts) for counts in zip(*stitching.finish(), strict=True))
    refuse_nan(block, undefined)
    return BlockResult(mask, probability, foreground, count_missing(pixels, block), classes, stitching.stars())


def tile_logits(
    session: Session,
    rule: PredictionRule,
    pixels: NDArray[Any],
    read_box: Box,
    tiles: Sequence[Tile],
    clock: StageClock,
) -> Logits:
    """Return the logits (N, K, T_y, T_x) of a batch, valid until the session's next call.

    Args:
        session: session for batches of N tiles.
        rule: prediction rule of the slide.
        pixels: (C, h, w) of ``read_box``.
        read_box: box in px of the slide that holds every pixel of the tiles inside the slide.
        tiles: up to N tiles; logits behind the last tile are meaningless.
        clock: counts the stages.
    """
    with clock.stage("gather"):
        rows, columns = source_tables(tiles, rule.lattice.shape, read_box)
        session.fill(pixels, rows, columns, rule.bounds)
    with session.run_lock, clock.stage("model"):  # take the lock first, so that waiting does not count as model time
        return session.logits()
