"""The seeds of one block: numbered, and what a merge over blocks has to know of them.

    a block's record    cells   number of seeds that begin in each of its lattice cores, in raster order
                        edges   the seeds that touch a side beyond which the slide goes on
                        sides   where along each such side they lie, as runs

A seed that touches no such side is whole, and nobody outside the block has to know of it but as a number.  This room
knows pixels and geometry; it does not know files, models or other blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block, BlockGrid
from cellseg_batch.kernels.instances import classify_foreground, classify_pixels, label_seeds, seed_rule
from cellseg_batch.kernels.stitch import logit_threshold
from cellseg_batch.trainer.bundle import Card, Instances

TOP, LEFT, BOTTOM, RIGHT = "top", "left", "bottom", "right"

PixelClassifier = Callable[[NDArray[np.float32], NDArray[np.int64], NDArray[np.uint8]], tuple[int, int]]


@dataclass(frozen=True)
class InstanceRule:
    """How logits become instances on one slide.

    Attributes:
        card: the model's own rule, in px of the image that it is shown.
        by_distance: seeds come from distance and border; otherwise every component of the foreground is an object.
        shrink: by how much the slide is shrunk for the model.
    """

    card: Instances
    by_distance: bool
    shrink: int = 1

    @property
    def smallest_seed(self) -> int:
        """px of the slide."""
        return self.card.smallest_seed * self.shrink**2

    @property
    def steps(self) -> int:
        """Of growth, in each of its two rounds."""
        return self.card.growth * self.shrink

    def classifier(self, threshold: float) -> PixelClassifier:
        """What writes the pixel codes of a batch, (logits, places, out) -> (foreground, NaN), at a probability."""
        limit = logit_threshold(threshold)
        if not self.by_distance:
            return lambda logits, places, out: classify_foreground(logits, places, limit, out)
        card = self.card
        rule = seed_rule(limit, card.border_weight, card.smoothing, self.shrink, card.seed_level, card.border_level)
        return lambda logits, places, out: classify_pixels(logits, places, rule, out)

    def manifest(self) -> dict[str, Any]:
        """What decides the instances, as plain JSON values."""
        return {"objects": "seeds" if self.by_distance else "components of the foreground", **asdict(self.card)}


def instance_rule(card: Card) -> InstanceRule:
    """The rule of a model."""
    return InstanceRule(card.instances, card.outputs[:3] == ("foreground", "border", "distance"))


def number_seeds(
    classes: NDArray[np.uint8], block: Block, grid: BlockGrid, smallest: int
) -> tuple[NDArray[np.uint32], dict[str, Any]]:
    """The codes (h, w) of a block, as `cellseg_batch.kernels.instances` says, and its record, plain JSON values.

    Args:
        classes: (h, w) of the block.
        block: one of ``grid``.
        grid: of the slide.
        smallest: seeds of fewer px are none.
    """
    box, lattice = block.box, grid.lattice
    height, width = lattice.shape
    is_open = {TOP: box.y0 > 0, LEFT: box.x0 > 0, BOTTOM: box.y1 < height, RIGHT: box.x1 < width}
    codes = np.empty(box.shape, np.uint32)
    sides = is_open[TOP], is_open[LEFT], is_open[BOTTOM], is_open[RIGHT]
    seeds = label_seeds(classes, lattice.core, smallest, sides, codes)
    y, x = np.divmod(seeds.first, box.shape[1])
    rows, columns = (-(-length // core) for length, core in zip(box.shape, lattice.core, strict=True))
    cells = np.bincount(y // lattice.core[0] * columns + x // lattice.core[1], minlength=rows * columns)
    lines = {TOP: codes[0], LEFT: codes[:, 0], BOTTOM: codes[-1], RIGHT: codes[:, -1]}
    runs = {side: _runs(line) for side, line in lines.items() if is_open[side]}
    edges = np.unique(np.concatenate([ids for ids, _, _ in runs.values()])) if runs else np.zeros(0, np.int64)
    firsts = (box.y0 + y[edges - 1]) * width + box.x0 + x[edges - 1]
    record = {
        "cells": cells.tolist(),
        "edges": {"ids": edges.tolist(), "areas": seeds.area[edges - 1].tolist(), "firsts": firsts.tolist()},
        "sides": {side: [part.tolist() for part in parts] for side, parts in runs.items()},
    }
    return codes, record


def _runs(line: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(ids, starts, stops) of the seeds along one side of a block."""
    starts = np.concatenate(([0], np.flatnonzero(np.diff(line.astype(np.int64))) + 1))
    stops = np.append(starts[1:], len(line))
    kept = line[starts] > 2
    return line[starts][kept].astype(np.int64) - 2, starts[kept], stops[kept]
