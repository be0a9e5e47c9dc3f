"""What decides a block's prediction besides its pixels, what it becomes, and what is checked of it on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cellseg_batch.engine.errors import ComputeError
from cellseg_batch.engine.geometry import Block, Box, Lattice, Tile, reflect
from cellseg_batch.engine.inference.backends.protocol import Shape
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.engine.objects.seeds import InstanceRule


@dataclass(frozen=True)
class PredictionRule:
    """How the pixels of one slide become its masks.

    Attributes:
        lattice: of the slide's tiles.
        shape: (N, C, T_y, T_x) of every batch.
        dtype: of the slide's pixels.
        bounds: of the normalisation.
        threshold: probability above which a pixel is foreground.
        probability: also make the probability.
        stitch: crop or blend.
        downscale: by how much the slide is downscaled for the model.
        instances: makes pixel codes instead of the mask; None for a mask.
    """

    lattice: Lattice
    shape: Shape
    dtype: DTypeLike
    bounds: Bounds
    threshold: float
    probability: bool = False
    stitch: str = "crop"
    downscale: int = 1
    instances: InstanceRule | None = None


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
            remedy="try `precision=fp32`",
        )


def count_missing(pixels: NDArray[Any], block: Block) -> int:
    """NaN values in the core of a block, each counted by exactly one block."""
    if pixels.dtype.kind != "f":
        return 0
    top, left = block.box.y0 - block.read_box.y0, block.box.x0 - block.read_box.x0
    height, width = block.box.shape
    return int(np.count_nonzero(np.isnan(pixels[:, top : top + height, left : left + width])))
