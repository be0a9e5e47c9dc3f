"""Write the labels of an image as one OME-TIFF: tiled, with a pyramid, compressed by zstd.

The pyramid is made in a compressed store in a temporary folder, so memory does not grow with the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.errors import ReadError, UsageError, writing_to
from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.objects.table import read_provenance
from cellseg_batch.engine.run.output_paths import OutputPaths, output_paths
from cellseg_batch.engine.slides.discover import find_all_images
from cellseg_batch.engine.slides.image_format import WRITTEN_BY
from cellseg_batch.engine.slides.label_copy import copy_labels, lay_out_copy
from cellseg_batch.engine.slides.ome_zarr import is_zarr_node, open_written
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.slides.writer import ImageWriter
from cellseg_batch.engine.storage.atomic_files import refuse_all_but_files, whole_file
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.engine.storage.paths import printable

# Side of a tile in px.
_TILE = 512
# Pixel types that OME-XML knows.
_TYPES = ("uint8", "uint16", "uint32", "int8", "int16", "int32")
# Offsets of a file of this many bytes need BigTIFF; metadata and tiles that do not shrink leave some room.
_BIG = (1 << 32) - (1 << 26)


@dataclass(frozen=True)
class ExportedLabels:
    """Result of an export.

    Attributes:
        path: the image.
        shapes: shape of each level of the TIFF in px, the segmented one first.
        pixel_size_um: µm per px of that level; None if unknown.
    """

    path: str
    shapes: tuple[tuple[int, ...], ...]
    pixel_size_um: float | None


def export_labels(inputs: list[Path], out: Path, name: str, output: Path | None, axes: str | None) -> ExportedLabels:
    """Write the labels of the image in ``inputs`` to one OME-TIFF, with their ids, classes or mask as they are.

    Args:
        inputs: the inputs of the run.
        out: the file to write.
        name, output, axes: as in the settings of the run.

    Raises:
        UsageError: there is not one image with labels, or the file would replace more than a file.
        SlideError: the labels are unfinished, cannot be read or have ids too large for OME-TIFF, or the file cannot be
            written.
    """
    refuse_all_but_files(out)
    slides = [image for image in find_all_images(inputs, axes) if isinstance(image, Slide)]
    labelled = [(slide, output_paths(slide, name, output)) for slide in slides]
    labelled = [(slide, paths) for slide, paths in labelled if is_zarr_node(paths.labels_folder)]
    if len(labelled) != 1:
        raise UsageError(
            f"`name={name}`",
            expected="one image with labels",
            found=f"{len(labelled) or 'none'} below {', '.join(map(str, inputs))}",
            remedy="export them one by one" if labelled else "run first, and with the same `name` and `output`",
        )
    ((slide, paths),) = labelled
    labels = _finished_labels(paths)
    side = read_provenance(paths.table).pixel_size_um if paths.table.is_file() else labels.pixel_size_um(0)
    with TemporaryDirectory(prefix="cellseg-labels-") as folder:
        writer = ImageWriter(Path(folder), "labels", lay_out_copy(labels))
        writer.create_empty({})
        copy_labels(labels, writer)
        _write_tiff(out, writer, printable(slide.name), side)
    return ExportedLabels(slide.location, writer.layout.shapes, side)


def _finished_labels(paths: OutputPaths) -> Slide:
    """Open labels that can be written as OME-TIFF.

    Raises:
        ReadError: they are unfinished or have ids too large.
    """
    journal, labels = Journal(paths.journal), open_written(paths.store, paths.labels)
    if journal.is_begun and not journal.is_finished:
        raise ReadError(
            labels.location,
            expected="finished labels",
            found="those of a run that has not ended",
            remedy="run the same command again, which goes on",
        )
    if labels.dtype not in _TYPES:
        raise ReadError(
            labels.location,
            expected=f"labels of a type of OME-TIFF ({', '.join(_TYPES)})",
            found=labels.dtype,
            remedy="read them as OME-Zarr",
        )
    return labels


def _write_tiff(out: Path, writer: ImageWriter, name: str, pixel_size_um: float | None) -> None:
    import tifffile

    layout = writer.layout
    metadata: dict[str, Any] = {"axes": layout.axes.upper(), "Name": name}
    if pixel_size_um is not None:
        for axis in "XY":
            metadata |= {f"PhysicalSize{axis}": pixel_size_um, f"PhysicalSize{axis}Unit": "µm"}
    pixel_bytes = np.dtype(layout.dtype).itemsize
    is_big = sum(map(math.prod, layout.shapes)) * pixel_bytes > _BIG
    with (
        whole_file(out) as stream,
        writing_to(out, "a file"),
        tifffile.TiffWriter(stream.name, bigtiff=is_big, ome=True) as tiff,
    ):
        for level, shape in enumerate(layout.shapes):
            tiff.write(
                _tiles(writer, level),
                shape=shape,
                dtype=layout.dtype,
                tile=(_TILE, _TILE),
                compression="zstd",
                photometric="minisblack",
                metadata=None if level else metadata,
                software=WRITTEN_BY,
                subifds=None if level else len(layout.shapes) - 1,
                subfiletype=1 if level else 0,
            )


def _tiles(writer: ImageWriter, level: int) -> Iterator[NDArray[Any]]:
    """The tiles of a level, plane by plane, row by row; those at the ends are smaller."""
    *planes, height, width = writer.layout.shapes[level]
    for plane in range(math.prod(planes)):
        for y in range(0, height, _TILE):
            for x in range(0, width, _TILE):
                yield writer.read(level, plane, Box(y, x, min(y + _TILE, height), min(x + _TILE, width)))
