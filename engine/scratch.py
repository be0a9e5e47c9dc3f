"""What lies between the two passes over a slide: codes and final ids, in the journal's folder until labels are done.

    <journal>/scratch/codes/       a zarr array
    <journal>/scratch/certainty/   another one, the probability, if objects are measured
    <journal>/scratch/ids/         what the merge found
    <journal>/scratch/objects/     the moments of each block's objects

An array is written block by block and read with a frame around each block, so its chunks divide the lattice's cores.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import zarr
from numpy.typing import NDArray

from cellseg_batch.engine.errors import writing_to
from cellseg_batch.engine.files import remove_tree, sync_file
from cellseg_batch.engine.geometry import BlockGrid, Box, chunk_side
from cellseg_batch.engine.locations import zarr_store

# A chunk costs zarr about half a millisecond, whatever its size; but of each that a frame touches all is decoded.
_CHUNK = 1024


class Scratch:
    """An array in the scratch of the output whose journal lies in ``journal``; safe for any number of threads.

    Attributes:
        ids: folder of the final ids.
        objects: folder of the moments.
    """

    def __init__(self, journal: Path, grid: BlockGrid, name: str = "codes", dtype: str = "uint32") -> None:
        self._folder = journal / "scratch" / name
        self._dtype = dtype
        self.ids = journal / "scratch" / "ids"
        self.objects = journal / "scratch" / "objects"
        self._grid = grid
        self._array: zarr.Array[Any] | None = None

    def create(self) -> None:
        """Make it, empty.

        Raises:
            OutputError: it cannot be written.
        """
        lattice = self._grid.lattice
        with writing_to(self._folder, "a store"):
            zarr.create_array(
                zarr_store(self._folder),
                shape=(self._grid.planes, *lattice.shape),
                dtype=self._dtype,
                chunks=(1, *(chunk_side(core, _CHUNK) for core in lattice.core)),
                # Fast rather than small: it lives for minutes.
                compressors=numcodecs.Blosc("lz4", clevel=1, shuffle=numcodecs.Blosc.SHUFFLE),
                zarr_format=2,
                fill_value=0,
            )

    def write(self, plane: int, box: Box, pixels: NDArray[Any]) -> None:
        """Write ``pixels`` (h, w) to ``box`` and wait until they are on disk.

        Raises:
            OutputError: it cannot be written.
        """
        with writing_to(self._folder, "a store"):
            # Looked for chunk by chunk, as zarr does, emptiness costs more than writing it.
            array = self._open().with_config({"write_empty_chunks": bool(pixels.any())})
            array[(plane, *box.slices())] = pixels
            _, height, width = array.chunks
            for y in range(box.y0 // height, -(-box.y1 // height)):
                for x in range(box.x0 // width, -(-box.x1 // width)):
                    sync_file(self._folder / f"{plane}.{y}.{x}")

    def read(self, plane: int, box: Box) -> NDArray[Any]:
        """The pixels (h, w) of ``box``.

        Raises:
            OutputError: it cannot be read.
        """
        with writing_to(self._folder, "a store"):
            return np.asarray(self._open()[(plane, *box.slices())])

    def exists(self) -> bool:
        """Whether it has been made and not been removed."""
        return self._metadata.is_file()

    def remove(self) -> None:
        """Delete the whole scratch, as far as it can be."""
        with suppress(OSError):
            # First, so that what is left of a scratch is never taken for all of it.
            self._metadata.unlink(missing_ok=True)
            remove_tree(self._folder.parent)

    @property
    def _metadata(self) -> Path:
        return self._folder / ".zarray"

    def _open(self) -> zarr.Array[Any]:
        if self._array is None:
            self._array = zarr.open_array(zarr_store(self._folder), mode="r+")
        return self._array
