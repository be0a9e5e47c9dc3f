"""Write labels and probabilities as OME-Zarr: groups, arrays, pixels, pyramid.

Version 0.5 is written sharded, one shard per block, with a checksum; 0.4 as zarr v2 chunks. The writer knows boxes and
arrays; it does not know models, tiles or the journal.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numcodecs
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from cellseg_batch.engine.errors import writing_to
from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.discover import journals_of
from cellseg_batch.engine.slides.label_layout import Layout, image_metadata
from cellseg_batch.engine.slides.ome_zarr import OUTPUT_MARK
from cellseg_batch.engine.slides.pixel_meaning import PixelMeaning
from cellseg_batch.engine.slides.slide import unravel_plane
from cellseg_batch.engine.slides.zarr_codecs import use_zarrs
from cellseg_batch.engine.storage.atomic_files import remove_tree, sync_file
from cellseg_batch.engine.storage.checksums import note_write
from cellseg_batch.engine.storage.lock import LOCK_SUFFIX, lock_in_turn
from cellseg_batch.engine.storage.paths import zarr_store


class ImageWriter:
    """Writer of a multiscale image, box by box; any number of threads may write boxes that do not overlap.

    Args:
        store: root folder of the zarr hierarchy, created if it does not exist.
        path: path of the image's group inside the hierarchy.
        layout: shape and storage of the image.
    """

    def __init__(self, store: Path, path: str, layout: Layout) -> None:
        self.store = store
        self.path = path
        self.layout = layout
        self._arrays: dict[int, zarr.Array[Any]] = {}

    @property
    def folder(self) -> Path:
        """Folder of the image's group."""
        return self.store / self.path

    def create(self, meaning: PixelMeaning, source: str | None, provenance: dict[str, Any]) -> None:
        """Create the groups, empty arrays and metadata, replacing an existing image.

        Args:
            meaning: meaning of its pixels.
            source: relative path to the segmented image; None if that is no OME-Zarr image.
            provenance: model, settings and versions that made the image, as plain JSON values.

        Raises:
            OutputError: the store cannot be written.
        """
        metadata = image_metadata(self.layout, self.path.rsplit("/", 1)[-1], source, meaning)
        self.create_empty({OUTPUT_MARK: {"kind": meaning.name, **provenance}, **metadata})

    def create_empty(self, attributes: dict[str, Any]) -> None:
        """Create the groups and empty arrays, replacing an existing image.

        Raises:
            OutputError: the store cannot be written.
        """
        layout = self.layout
        with writing_to(self.folder, "a store"):
            remove_tree(self.folder)
            group = zarr.create_group(
                zarr_store(self.store), path=self.path, zarr_format=layout.zarr_format, attributes=attributes
            )
            for level, shape in enumerate(layout.shapes):
                self._arrays[level] = _create_array(group, str(level), shape, layout, level)

    def retype(self, dtype: str) -> None:
        """Create the arrays again, empty, if the type of their pixels is not ``dtype``.

        Raises:
            OutputError: the store cannot be written.
        """
        if dtype == self.layout.dtype:
            return
        with writing_to(self.folder, "a store"):
            group = zarr.open_group(zarr_store(self.store), path=self.path, mode="r", use_consolidated=False)
            attributes = group.attrs.asdict()
        self.layout = replace(self.layout, dtype=dtype)
        self.create_empty(attributes)

    def read(self, level: int, plane: int, box: Box) -> NDArray[Any]:
        """Read the pixels (h, w) of ``box`` of a plane from disk.

        Raises:
            OutputError: the pixels cannot be read.
        """
        with writing_to(self.folder, "a store"):
            return self._read(level, (*self._plane(level, plane), *box.slices()))

    def write(self, level: int, plane: int, box: Box, pixels: NDArray[Any]) -> None:
        """Write ``pixels`` (h, w) to ``box`` of a plane and wait until they are on disk.

        Raises:
            OutputError: the store cannot be written.
        """
        with writing_to(self.folder, "a store"):
            array = self._array(level)
            files = [self.folder / str(level) / key for key in self._files(level, plane, box)]
            for file in files:  # zarr would first read a shard at the edge, and fail if it is damaged
                file.unlink(missing_ok=True)
            if pixels.any():  # pixels without a file read as 0
                index: tuple[Any, ...] = (*self._plane(level, plane), *box.slices())
                # zarr's search for empty chunks costs more than writing them.
                target = array.with_config({"write_empty_chunks": True})
                use_zarrs(target)
                target[index] = pixels
            for file in files:
                sync_file(file)
        note_write(self.path, level, plane, box, pixels.astype(array.dtype, copy=False))

    def build_level(self, level: int, plane: int, box: Box) -> None:
        """Fill ``box`` of a level with the nearest pixels of the next finer level.

        Raises:
            OutputError: the store cannot be read or written.
        """
        finer, coarser = self.layout.shapes[level - 1], self.layout.shapes[level]
        rows = _nearest(np.arange(box.y0, box.y1), finer[-2], coarser[-2])
        columns = _nearest(np.arange(box.x0, box.x1), finer[-1], coarser[-1])
        plane_index = [np.array([i]) for i in self._plane(level, plane)]
        source = tuple(
            int(_nearest(i, big, small)[0]) for i, big, small in zip(plane_index, finer[:-2], coarser[:-2], strict=True)
        )
        with writing_to(self.folder, "a store"):
            index: tuple[Any, ...] = (*source, slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
            window = self._read(level - 1, index)
        self.write(level, plane, box, window[np.ix_(rows - rows[0], columns - columns[0])])

    def _read(self, level: int, index: tuple[Any, ...]) -> NDArray[Any]:
        array = self._array(level)
        use_zarrs(array)
        return np.asarray(array[index])

    def _array(self, level: int) -> zarr.Array[Any]:
        if level not in self._arrays:
            self._arrays[level] = zarr.open_array(zarr_store(self.store), path=f"{self.path}/{level}", mode="r+")
        return self._arrays[level]

    def _plane(self, level: int, plane: int) -> tuple[int, ...]:
        return unravel_plane(plane, self.layout.shapes[level][:-2])

    def _files(self, level: int, plane: int, box: Box) -> Iterator[str]:
        """Names of the files that hold ``box``."""
        chunks, shards = self.layout.storage(level)
        side = shards if self.layout.zarr_format == 3 else chunks
        encode = self._array(level).metadata.encode_chunk_key
        for y in range(box.y0 // side[-2], -(-box.y1 // side[-2])):
            for x in range(box.x0 // side[-1], -(-box.x1 // side[-1])):
                yield encode((*self._plane(level, plane), y, x))


def list_label(store: Path, labels: str, name: str, zarr_format: int) -> None:
    """Add ``name`` to the list of labels in the group ``labels``; the rest of its metadata stays.

    Runs that write other labels of the same image do so in turn.

    Raises:
        OutputError: the store cannot be written.
    """
    with lock_in_turn(_lock_of(store, labels)), writing_to(store / labels, "a store"):
        group = zarr.open_group(zarr_store(store), path=labels, mode="r+", use_consolidated=False)
        metadata: dict[str, Any] = dict(group.attrs)
        holder = metadata.get("ome", {"version": "0.5"}) if zarr_format == 3 else metadata
        listed = list(holder.get("labels", []))
        if name not in listed:
            holder["labels"] = [*listed, name]
            group.attrs.update({"ome": holder} if zarr_format == 3 else holder)


def list_table(store: Path, tables: str, name: str, zarr_format: Literal[2, 3]) -> None:
    """Add ``name`` to the list of tables in the group ``tables``, which is made; the rest of its metadata stays.

    Source: the tables of ngio (fractal-analytics-platform.github.io/fractal-tasks-core/tables).

    Raises:
        OutputError: the store cannot be written.
    """
    with lock_in_turn(_lock_of(store, tables)), writing_to(store / tables, "a store"):
        group = zarr.open_group(
            zarr_store(store), path=tables, mode="a", zarr_format=zarr_format, use_consolidated=False
        )
        metadata: dict[str, Any] = dict(group.attrs)
        listed = metadata.get("tables", [])
        if name not in listed:
            group.attrs["tables"] = [*listed, name]


def consolidate_again(store: Path) -> None:
    """Update a store's consolidated metadata, if it has any, because readers then see nothing else.

    Damaged ones are written anew.

    Runs that share a store do so in turn: each gathers what the runs before it have written.

    Raises:
        OutputError: the store cannot be written.
    """
    with writing_to(store, "a store"), warnings.catch_warnings():
        # zarr warns that consolidated metadata are not part of format 3, but this store has them already.
        warnings.simplefilter("ignore")
        if _is_consolidated(store):
            with lock_in_turn(_lock_of(store, "consolidated")):
                zarr.consolidate_metadata(zarr_store(store))


def _is_consolidated(store: Path) -> bool:
    try:
        return zarr.open_group(zarr_store(store), mode="r").metadata.consolidated_metadata is not None
    except (ValueError, KeyError, TypeError, AttributeError):  # of consolidated metadata that are damaged
        return True


def _lock_of(store: Path, part: str) -> Path:
    """Lock file, beside a store, of metadata that several runs change."""
    return journals_of(store) / f"{part}{LOCK_SUFFIX}"


def _create_array(group: zarr.Group, name: str, shape: tuple[int, ...], layout: Layout, level: int) -> zarr.Array[Any]:
    chunks, shards = layout.storage(level)
    if layout.zarr_format == 3:
        return group.create_array(
            name,
            shape=shape,
            dtype=layout.dtype,
            chunks=chunks,
            shards=shards,
            compressors=[ZstdCodec(level=3), Crc32cCodec()],
            dimension_names=tuple(layout.axes),
            fill_value=0,
        )
    return group.create_array(
        name,
        shape=shape,
        dtype=layout.dtype,
        chunks=chunks,
        compressors=numcodecs.Zstd(level=3),
        chunk_key_encoding={"name": "v2", "separator": "/"},
        fill_value=0,
    )


def _nearest(target: NDArray[np.int64], finer: int, coarser: int) -> NDArray[np.int64]:
    """Nearest source pixels along an axis.

    Args:
        target: indices of pixels on the axis of ``coarser`` px.
        finer, coarser: lengths of the axis at the source and the target level, in px.

    Returns:
        Index on the axis of ``finer`` px nearest to the centre of each target pixel.
    """
    return np.minimum((2 * target + 1) * finer // (2 * coarser), finer - 1)
