"""Keep pixels between the passes over a slide, in the journal's folder until the labels are done.

    <journal>/scratch/codes/         the numbered codes, a file for each block
    <journal>/scratch/stars/         the stars that are not suppressed in their block, a file for each block
    <journal>/scratch/survivors/     the stars that are objects, a file for each block
    <journal>/scratch/probability/   the probability, a file for each block, if objects are measured
    <journal>/scratch/classes/       the class codes, a file for each block, if objects get classes
    <journal>/scratch/ids/           the final ids from the merge
    <journal>/scratch/sums/          the sums of each block's objects that make centroids, if there is a region
    <journal>/scratch/objects/       the moments of each block's objects
    <journal>/scratch/cells/         those of their cells, if there are some

The pixels of a block are compressed in pieces, those of its frame apart from those of its inside, because a block is
read once as a whole and eight times for the frame of a neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import Blosc
from numpy.typing import DTypeLike, NDArray

from cellseg_batch.engine.errors import OutputError
from cellseg_batch.engine.geometry import Block, Box
from cellseg_batch.engine.storage.atomic_files import numbered, remove_tree, whole_file

# Rows of a piece in px: few enough that the compressed piece stays in the processor's cache and the heap.
_ROWS = 256
# Fast rather than small, because scratch lives for minutes.
_CODEC = Blosc("lz4", clevel=1, shuffle=Blosc.SHUFFLE)


class ScratchFolder:
    """A folder in the scratch of an output.

    Args:
        journal: folder of the output's journal.
        name: name of the folder in the scratch.

    Attributes:
        name: as given.
        ids: folder of the final ids.
        sums: folder of the sums that make centroids.
        objects: folder of the moments.
        cells: folder of the moments of cells.
    """

    def __init__(self, journal: Path, name: str) -> None:
        self.name = name
        self._folder = journal / "scratch" / name
        self.ids = journal / "scratch" / "ids"
        self.sums = journal / "scratch" / "sums"
        self.objects = journal / "scratch" / "objects"
        self.cells = journal / "scratch" / "cells"

    def create(self) -> None:
        """Create the folder, empty.

        Raises:
            OutputError: the folder cannot be written.
        """
        with whole_file(self._mark):
            pass

    def exists(self) -> bool:
        """Whether the folder has been created and not removed."""
        return self._mark.is_file()

    def remove(self) -> None:
        """Delete the whole scratch; what cannot be deleted stays."""
        with suppress(OSError):
            # The mark goes first, so that a half-removed scratch is never taken for a whole one.
            self._mark.unlink(missing_ok=True)
            remove_tree(self._folder.parent)

    @property
    def _mark(self) -> Path:
        return self._folder / "made"


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn any error while a file of the scratch is read into an OutputError; ``what`` names its content."""
    try:
        yield
    except Exception as error:  # Blosc raises errors of its own types
        raise OutputError(
            str(path),
            expected=f"{what} that an earlier task of this run wrote",
            found=f"{type(error).__name__}: {error}",
            cause="files between two passes were removed or damaged",
            remedy="begin this image anew with `overwrite`",
        ) from error


class Scratch(ScratchFolder):
    """An image in the scratch of an output, with a file for each block; safe for any number of threads.

    Args:
        journal: folder of the output's journal.
        name: name of the image's folder in the scratch.
        dtype: type of its pixels.
        frame: px around a block that are read with it.
    """

    def __init__(self, journal: Path, name: str, dtype: DTypeLike, frame: int) -> None:
        super().__init__(journal, name)
        self._dtype = np.dtype(dtype)
        self._frame = frame

    def write(self, block: Block, pixels: NDArray[Any]) -> None:
        """Write the ``pixels`` (h, w) of a block and wait until they are on disk.

        Raises:
            OutputError: the pixels cannot be written.
        """
        pieces = [_CODEC.encode(np.ascontiguousarray(pixels[piece.slices()])) for piece in self._pieces(block)]
        with whole_file(self._path(block)) as stream:
            stream.write(np.array([len(piece) for piece in pieces], np.int64).tobytes())
            stream.writelines(pieces)

    def read(self, block: Block, box: Box) -> Iterator[tuple[Box, NDArray[Any]]]:
        """Read the pixels of a block within ``box``; yields (box of a piece in px of the slide, its pixels (h, w)).

        Raises:
            OutputError: the pixels cannot be read.
        """
        pieces = self._pieces(block)
        with reading(self._path(block), "pixels"):
            content = memoryview(self._path(block).read_bytes())
            sizes = np.frombuffer(content, np.int64, len(pieces))
            stops = sizes.nbytes + np.cumsum(sizes)
            for piece, start, stop in zip(pieces, stops - sizes, stops, strict=True):
                own = piece.shifted((block.box.y0, block.box.x0))
                wanted = own.within(box)
                if wanted.area:
                    pixels = np.frombuffer(_CODEC.decode(content[start:stop]), self._dtype).reshape(piece.shape)
                    yield wanted, np.ascontiguousarray(pixels[wanted.seen_from(own).slices()])

    def read_block(self, block: Block) -> NDArray[Any]:
        """Read the pixels (h, w) of a block.

        Raises:
            OutputError: the pixels cannot be read.
        """
        pixels = np.empty(block.box.shape, self._dtype)
        for box, values in self.read(block, block.box):
            pixels[box.seen_from(block.box).slices()] = values
        return pixels

    def _path(self, block: Block) -> Path:
        return numbered(self._folder, block.index, ".lz4")

    def _pieces(self, block: Block) -> list[Box]:
        """Boxes of a block's pieces, in px from its corner; the frame that neighbours read has pieces of its own."""
        height, width = block.box.shape
        inner = range(self._frame, height - self._frame, _ROWS)
        rows = {0, height, *inner, max(0, height - self._frame), min(height, self._frame)}
        columns = {0, width, min(width, self._frame), max(0, width - self._frame)}
        spans = product(pairwise(sorted(rows)), pairwise(sorted(columns)))
        return [Box(y0, x0, y1, x1) for (y0, y1), (x0, x1) in spans]
