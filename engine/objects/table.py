"""The objects of a slide as one Parquet file: a row per object, in the order of ids, written piece by piece.

Figures are scikit-image's of the same name (``measure.regionprops``).  Lengths come in px of the segmented level and in
µm, both from the corner of that level; the columns in µm are null where the pixel size is unknown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.objects.moment_files import Objects
from cellseg_batch.engine.storage.atomic_files import whole_file
from cellseg_batch.engine.storage.paths import readable
from cellseg_batch.kernels import moments
from cellseg_batch.kernels import moments_columns as c

METADATA_KEY = b"cellseg-batch"
"""Key of the table's own account in the schema's metadata, as JSON: where its objects come from, and how."""

_NAMES = ("slide", "well", "field")
_BOX = {"bbox_y0": c.TOP, "bbox_x0": c.LEFT, "bbox_y1": c.BOTTOM, "bbox_x1": c.RIGHT}
_LIGHT = ("mean", "min", "max", "std", "sum")


@dataclass(frozen=True)
class Origin:
    """Which image the objects of a table lie in.

    Attributes:
        slide, well, field: names; the last two are "" outside of plates.
        shape: (..., h, w) of the label image.
        plane_axes: which of t and z its leading axes are.
        pixel_size_um: of the label image, None when unknown.
        channels: names of the measured channels.
    """

    slide: str
    well: str
    field: str
    shape: tuple[int, ...]
    plane_axes: str
    pixel_size_um: float | None
    channels: tuple[str, ...]

    def schema(self) -> pa.Schema:
        """Columns and their types; the same for all images with the same channels."""
        text, length = pa.dictionary(pa.int32(), pa.string()), pa.float64()
        columns: dict[str, pa.DataType] = {"id": pa.int64()}
        columns |= dict.fromkeys(_NAMES, text)
        columns |= dict.fromkeys("tz", pa.int32())
        columns |= dict.fromkeys(("centroid_y", "centroid_x", "centroid_y_um", "centroid_x_um"), length)
        columns |= dict.fromkeys(_BOX, pa.int64())
        columns |= dict.fromkeys((f"{name}_um" for name in _BOX), length)
        columns |= {"area": pa.int64(), "area_um2": length}
        for name in ("perimeter", "axis_major", "axis_minor"):
            columns |= dict.fromkeys((name, f"{name}_um"), length)
        columns["eccentricity"] = length
        for channel in self.channels:
            columns |= dict.fromkeys((f"intensity_{figure}_{channel}" for figure in _LIGHT), length)
        columns |= {"mean_probability": length, "touches_border": pa.bool_()}
        return pa.schema(list(columns.items()))


def write_table(path: Path, origin: Origin, pieces: Iterable[Objects], account: dict[str, Any]) -> int:
    """Write the objects of a slide; returns how many there are.

    Args:
        path: of the Parquet file, replaced when the new one is complete.
        origin: the image.
        pieces: the objects in ascending order of ids.
        account: where they come from, as plain JSON values.

    Raises:
        OutputError: it cannot be written.
    """
    schema = origin.schema().with_metadata({METADATA_KEY: json.dumps(account)})
    count = 0
    with whole_file(path) as stream, pq.ParquetWriter(stream, schema, compression="zstd") as writer:
        for piece in pieces:
            writer.write_batch(_batch(origin, piece, schema))
            count += len(piece.ids)
    return count


def read_account(path: Path) -> dict[str, Any]:
    """Where the objects of a table come from.

    Raises:
        ReadError: it is no table of objects.
    """
    with reading_table(path):
        account: dict[str, Any] = json.loads((pq.read_schema(readable(path)).metadata or {})[METADATA_KEY])
    return account


def read_batches(path: Path, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of a table, piece by piece, of which there is at least one.

    Raises:
        ReadError: it is no table of objects.
    """
    with reading_table(path), pq.ParquetFile(readable(path)) as file:
        if file.metadata.num_rows:
            yield from file.iter_batches(columns=columns)
        else:
            yield pa.RecordBatch.from_pylist([], schema=file.read(columns).schema)


@contextmanager
def reading_table(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while a table of objects is read into a ReadError."""
    try:
        yield
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise ReadError(
            str(path),
            expected="a table of objects",
            found=f"{type(error).__name__}: {error}",
            remedy="write it with a run with `objects`",
        ) from error


def _batch(origin: Origin, objects: Objects, schema: pa.Schema) -> pa.RecordBatch:
    figures = _figures(origin, objects)
    arrays = []
    for field in schema:
        values = figures.get(field.name)
        if field.name in _NAMES:
            name = pa.array([getattr(origin, field.name)])
            arrays.append(pa.DictionaryArray.from_arrays(np.zeros(len(objects.ids), np.int32), name))
        elif values is None:
            arrays.append(pa.nulls(len(objects.ids), field.type))
        else:
            arrays.append(pa.array(values).cast(field.type))
    return pa.record_batch(arrays, schema=schema)


def _figures(origin: Origin, objects: Objects) -> dict[str, NDArray[Any]]:
    """Columns by name, but for the names of the image and for what is not known."""
    rows, area = objects.rows, objects.rows[:, c.AREA]
    major, minor, eccentricity = moments.axes(rows)
    lengths = {
        "centroid_y": rows[:, c.TOP] + rows[:, c.SUM_Y] / area,
        "centroid_x": rows[:, c.LEFT] + rows[:, c.SUM_X] / area,
        **{name: rows[:, column] for name, column in _BOX.items()},
        "perimeter": moments.perimeter(rows),
        "axis_major": major,
        "axis_minor": minor,
    }
    found = {"id": objects.ids, **lengths, "area": area, "eccentricity": eccentricity}
    if origin.pixel_size_um is not None:
        found |= {f"{name}_um": values * origin.pixel_size_um for name, values in lengths.items()}
        found["area_um2"] = area * origin.pixel_size_um**2
    for number, channel in enumerate(origin.channels):
        low, high, total, squares = rows[:, c.CHANNELS + c.PER_CHANNEL * number :].T[: c.PER_CHANNEL]
        mean = total / area
        spread = np.sqrt(np.maximum(squares / area - mean**2, 0))
        light = dict(zip(_LIGHT, (mean, low, high, spread, total), strict=True))
        found |= {f"intensity_{figure}_{channel}": values for figure, values in light.items()}
    found["mean_probability"] = rows[:, c.PROBABILITY] / (255 * area)
    *grid, height, width = origin.shape
    place = np.unravel_index(objects.planes, grid) if grid else ()
    found |= {axis: np.zeros(len(area), np.int64) for axis in "tz"} | dict(zip(origin.plane_axes, place, strict=True))
    at_start = (rows[:, c.TOP] == 0) | (rows[:, c.LEFT] == 0)
    found["touches_border"] = at_start | (rows[:, c.BOTTOM] == height) | (rows[:, c.RIGHT] == width)
    return found
