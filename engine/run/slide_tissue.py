"""Settle which tiles of a slide on glass are computed, once for each slide, and write the mask of its tissue.

Which tiles these are depends on the slide and its lattice alone; a run that goes on takes them from the manifest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Lattice
from cellseg_batch.engine.inference.tissue import CELL, Tissue, find_tissue, look_level
from cellseg_batch.engine.run.records import TissueTiles
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.label_layout import Layout
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.slides.writer import ImageWriter

# Side in px of a chunk of the mask.
_CHUNK = 512

TileMap = NDArray[np.bool_]


def settle_tissue(reader: SlideReader, settings: Settings) -> Tissue | None:
    """Find the tissue in the level of a reader; None if no glass is to be left out, or is found."""
    return find_tissue(reader) if settings.skips_background else None


def settle_tiles(tissue: Tissue, lattice: Lattice, inside: TileMap | None) -> TissueTiles:
    """Settle which tiles are computed.

    Args:
        tissue: tissue of the slide.
        lattice: tiles of the slide.
        inside: whether each tile of a plane is in the region; None for the whole slide.
    """
    tiles = tissue.tiles(lattice)
    inside = np.ones_like(tiles) if inside is None else inside
    if not (tiles & inside).any():
        # One is computed even so: by the pixels of a block that was read, an image that changes is noticed.
        tiles.flat[np.flatnonzero(inside)[0]] = True
    return TissueTiles(tissue.level, tissue.area(lattice.shape), np.packbits(tiles).tobytes())


def as_map(tiles: TissueTiles, lattice: Lattice) -> TileMap:
    """Whether each tile of a plane is computed, (rows, columns)."""
    rows, columns = lattice.grid
    bits = np.unpackbits(np.frombuffer(tiles.tiles, np.uint8), count=rows * columns)
    return bits.astype(np.bool_).reshape(rows, columns)


def remarks(slide: Slide, level: int, tissue: TissueTiles) -> tuple[str, ...]:
    """Remarks for the user on a low level that was not believed.

    Args:
        slide: the image.
        level: level that is processed.
        tissue: its tissue.
    """
    expected = look_level(slide, level)
    if tissue.level == expected:
        return ()
    return (f"level {expected} does not show what level {level} does, so glass was looked for in level {tissue.level}",)


def mask_layout(layout: Layout) -> Layout:
    """The layout of the mask of tissue beside labels of ``layout``: one level, a pixel for each cell."""
    planes, (height, width) = len(layout.axes) - 2, layout.shapes[0][-2:]
    scale, translation = layout.datasets[0]
    factors = (1,) * planes + (CELL, CELL)
    coarse = tuple(side * factor for side, factor in zip(scale, factors, strict=True))
    # A pixel's position is that of its centre.
    shifted = tuple(at + side * (factor - 1) / 2 for at, side, factor in zip(translation, scale, factors, strict=True))
    return replace(
        layout,
        shapes=((1,) * planes + (-(-height // CELL), -(-width // CELL)),),
        chunks=(_CHUNK, _CHUNK),
        shards=((_CHUNK, _CHUNK),),
        datasets=((coarse, shifted),),
    )


def write_mask(writer: ImageWriter, tissue: Tissue | None) -> None:
    """Write the mask of a slide's tissue; without glass all of it is tissue.

    Raises:
        OutputError: the store cannot be written.
    """
    rows, columns = writer.layout.shapes[0][-2:]
    cells: NDArray[Any] = np.ones((rows, columns), np.uint8) if tissue is None else tissue.cells.astype(np.uint8)
    for number in range(writer.layout.shard_count(0)):
        plane, box = writer.layout.shard_box(0, number)
        writer.write(0, plane, box, cells[box.slices()])
