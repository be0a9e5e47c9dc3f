"""Define the rule and the result of a block's prediction, and the checks that every device shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cellseg_batch.engine.errors import ComputeError
from cellseg_batch.engine.geometry import Block, Box, Lattice, Tile, reflect
from cellseg_batch.engine.inference.backends.protocol import Shape
from cellseg_batch.engine.inference.decoders import DECODERS, Decoder
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.engine.objects.classes import ClassRule
from cellseg_batch.engine.objects.seeds import InstanceRule
from cellseg_batch.engine.objects.stars import StarRule
from cellseg_batch.kernels.stardist import Stars, join


@dataclass(frozen=True)
class PredictionRule:
    """How the pixels of one slide become its masks.

    Attributes:
        lattice: tile lattice of the slide.
        shape: (N, C, T_y, T_x) of every batch.
        dtype: dtype of the slide's pixels.
        bounds: pixel values that normalisation maps to 0 and 1.
        threshold: probability above which a pixel is foreground.
        probability: whether to make the probability too.
        stitch: crop or blend.
        downscale: factor by which the slide is downscaled for the model.
        decoder: decoder of the model.
        instances: rule that makes pixel codes instead of the mask; None for a mask.
        classes: class map whose codes are made too; None for none.
        stars: rule that makes candidates instead of the mask; None for a mask.
        grid: px between two points of the network's output.
    """

    lattice: Lattice
    shape: Shape
    dtype: DTypeLike
    bounds: Bounds
    threshold: float
    probability: bool = False
    stitch: str = "crop"
    downscale: int = 1
    decoder: Decoder = DECODERS["mask"]
    instances: InstanceRule | None = None
    classes: ClassRule | None = None
    stars: StarRule | None = None
    grid: int = 1

    @property
    def on_host(self) -> bool:
        """Whether logits become the result on the host, whichever device computes them."""
        return self.stars is not None or self.grid > 1


@dataclass(frozen=True)
class BlockResult:
    """The prediction of one block.

    Attributes:
        mask: (h, w) uint8, 1 is foreground; for instances the pixel codes; all background for stars.
        probability: (h, w) uint8, 255 is certain; None unless asked for.
        foreground: number of foreground pixels.
        missing: number of NaN values in the block's pixels, which the model sees as 0.
        classes: (h, w) uint8, the class codes; None unless asked for.
        stars: the candidates whose centres lie in the block, in px of the slide; None unless the rule asks for them.
    """

    mask: NDArray[np.uint8]
    probability: NDArray[np.uint8] | None
    foreground: int
    missing: int
    classes: NDArray[np.uint8] | None = None
    stars: Stars | None = None


def no_foreground(block: Block, rule: PredictionRule, missing: int = 0) -> BlockResult:
    """Return the result of a block without tiles to compute, with so many NaN values: all background."""
    mask = np.zeros(block.box.shape, np.uint8)
    return BlockResult(
        mask,
        mask if rule.probability else None,
        0,
        missing,
        classes=mask if rule.classes else None,
        stars=None if rule.stars is None else join([], rule.stars.rays),
    )


def source_tables(
    tiles: Sequence[Tile], shape: tuple[int, int], read_box: Box
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the row in ``read_box`` of each tile row (N, T_y), and the column of each tile column (N, T_x).

    Rows and columns beyond the slide's edge are mirrored.

    Args:
        tiles: N tiles of the slide.
        shape: (height, width) of the slide in px.
        read_box: box of the slide in px whose pixels were read.
    """
    rows = np.stack([reflect(tile.frame.y0, tile.frame.y1, shape[0]) for tile in tiles]) - read_box.y0
    columns = np.stack([reflect(tile.frame.x0, tile.frame.x1, shape[1]) for tile in tiles]) - read_box.x0
    return rows, columns


def refuse_nan(block: Block, undefined: int) -> None:
    """Raise ComputeError if any logits of a block were NaN; ``undefined`` is their number."""
    if undefined:
        raise ComputeError(
            f"block {block.index}",
            expected="finite logits",
            found=f"{undefined} NaN",
            cause="weights or a precision that overflow",
            remedy="try `precision=fp32`",
        )


def count_missing(pixels: NDArray[Any], block: Block) -> int:
    """Count the NaN values in the core of a block, so that each is counted by exactly one block."""
    return int(np.count_nonzero(np.isnan(core_of(pixels, block)))) if pixels.dtype.kind == "f" else 0


def count_infinite(pixels: NDArray[Any], block: Block) -> int:
    """Count the values in the core of a block that are infinite in the model's float32."""
    if pixels.dtype.kind != "f":
        return 0
    return int(np.count_nonzero(np.abs(core_of(pixels, block)) > np.finfo(np.float32).max))


def core_of(pixels: NDArray[Any], block: Block) -> NDArray[Any]:
    """The pixels (C, h, w) in the core of a block, from those of its ``read_box``."""
    top, left = block.box.y0 - block.read_box.y0, block.box.x0 - block.read_box.x0
    height, width = block.box.shape
    return pixels[:, top : top + height, left : left + width]
