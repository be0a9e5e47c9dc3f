"""Define the geometry of tiles that every form of `stitch` shares, and check that it stays in bounds.

A grid of overlapping tiles along one axis; tile t begins at t * step, step = length - overlap, in px:

    tile 0   |============|----|
    tile 1                |----|============|----|
    tile 2                                  |----|============|
    weight of tile 1      0 to 1      1     1 to 0

It must not know where the tiles come from or what is written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy.typing import NDArray

MAX_OVERLAP = 64


class TileGrid(NamedTuple):
    """Equally large tiles in raster order, each overlapping the next, and the window to write; sizes in px.

    The overlap is a power of two of at most 64, so that the product of two ramps and a float16 logit is exact in
    float32: 6 bits, 6 bits and 11.
    """

    rows: int
    """Tiles along y."""
    columns: int
    """Tiles along x."""
    overlap: int
    """Pixels that two neighbours share along y or x."""
    top: int
    """First row of the window, from the top of tile 0."""
    left: int
    """First column of the window, from the left of tile 0."""
    height: int
    """Rows of the window."""
    width: int
    """Columns of the window."""


def check_grid(grid: TileGrid, logits: tuple[int, ...], out: tuple[int, ...]) -> None:
    """Check that a grid fits its logits (N, K, T_y, T_x) and its output (H, W).

    Raises:
        ValueError: the overlap is no power of two up to 64 or more than half a tile, there are too few tiles, the
            window leaves the grid, or the output and the window have different shapes.
    """
    overlap = grid.overlap
    if not 0 < overlap <= MAX_OVERLAP or overlap & (overlap - 1) or 2 * overlap > min(logits[2:]):
        raise ValueError(f"an overlap of {overlap} px is no power of two up to {MAX_OVERLAP} and half of {logits[2:]}")
    if min(grid.rows, grid.columns) < 1 or grid.rows * grid.columns > logits[0]:
        raise ValueError(f"{logits[0]} tiles do not fill a grid of {grid.rows} x {grid.columns}")
    height, width = (
        (count - 1) * (length - overlap) + length
        for count, length in zip((grid.rows, grid.columns), logits[2:], strict=True)
    )
    if min(grid.top, grid.left) < 0 or grid.top + grid.height > height or grid.left + grid.width > width:
        raise ValueError(f"the window {grid[3:]} leaves a grid of {height} x {width} px")
    if out != (grid.height, grid.width):
        raise ValueError(f"an output of {out} does not fit a window of {grid.height} x {grid.width} px")


def check_places(places: NDArray[Any], logits: tuple[int, ...], out: tuple[int, ...]) -> None:
    """Check that cores lie inside their tiles and their output.

    Args:
        places: (M, 6) in px, one row per core: from y, from x, to y, to x, height, width.
        logits: shape (N, K, T_y, T_x) of the tiles.
        out: shape (H, W) of the output.

    Raises:
        ValueError: ``places`` is not (M, 6) with M at most the number of tiles, or a core is out of bounds.
    """
    if places.ndim != 2 or places.shape[1] != 6 or len(places) > logits[0]:
        raise ValueError(f"places of shape {places.shape} for {logits[0]} tiles; expected (M, 6)")
    source, target, size = places[:, 0:2], places[:, 2:4], places[:, 4:6]
    if (places < 0).any() or (source + size > logits[2:]).any() or (target + size > out).any():
        raise ValueError(f"a core leaves its tile of {logits[2:]} or the output of {out}")
