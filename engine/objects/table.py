"""Write and read the objects of a slide as one Parquet file: a row per object, in the order of ids, piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.objects.cells import CellRule
from cellseg_batch.engine.objects.columns import Measured, Origin, table_fields, table_schema
from cellseg_batch.engine.objects.moment_files import Objects
from cellseg_batch.engine.storage.atomic_files import whole_file
from cellseg_batch.engine.storage.paths import printable, readable

METADATA_KEY = b"cellseg-batch"
"""Key in the schema's metadata of the table's `Provenance`, which is stored as JSON."""


@dataclass(frozen=True)
class ChannelQuality:
    """Sharpness and exposure of a channel.

    Attributes:
        focus: variance of the Laplacian divided by the squared mean; None if undefined, as in a black image.
        saturation: share of pixels at the end of the camera's scale.
    """

    focus: float | None
    saturation: float


@dataclass(frozen=True)
class Provenance:
    """Source of the objects of a table, and figures of the whole image.

    Attributes:
        image: location of the image.
        labels: folder of the labels.
        shape: shape (..., h, w) of the label image.
        pixel_size_um: µm per px of the label image; None if unknown.
        level0_scale: px of the full resolution per px of the label image, along y and x.
        labelled_fraction: share of pixels that belong to an object.
        segmented_channels: names of the channels that the model saw.
        quality: name of each measured channel -> its quality.
        provenance: provenance of the labels, from the attributes of their group: model, settings, versions.
        classes: name of each class that objects may have -> its colour, ``#rrggbb``.
        class_fractions: name of each class -> share of pixels that belong to an object and are of it.
        cells: rule by which the objects were expanded into cells; None if they have none.
        cell_fraction: share of pixels that belong to a cell.
    """

    image: str
    labels: str
    shape: tuple[int, ...]
    pixel_size_um: float | None
    level0_scale: tuple[float, float]
    labelled_fraction: float
    segmented_channels: tuple[str, ...]
    quality: dict[str, ChannelQuality]
    provenance: dict[str, Any]
    classes: dict[str, str] = field(default_factory=dict)
    class_fractions: dict[str, float] = field(default_factory=dict)
    cells: CellRule | None = None
    cell_fraction: float = 0.0

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the measured channels, in the order of their columns."""
        return tuple(self.quality)


def write_table(path: Path, origin: Origin, pieces: Iterable[Objects], provenance: Provenance) -> int:
    """Write the objects of a slide; returns their number.

    Args:
        path: path of the Parquet file; an existing file is replaced when the new file is complete.
        origin: the image.
        pieces: the objects in ascending order of ids.
        provenance: source of the objects.

    Raises:
        OutputError: the file cannot be written.
    """
    origin = replace(origin, slide=printable(origin.slide))
    schema = table_schema(origin).with_metadata({METADATA_KEY: json.dumps(asdict(provenance))})
    count = 0
    with whole_file(path) as stream, pq.ParquetWriter(stream, schema, compression="zstd") as writer:
        for piece in pieces:
            writer.write_batch(_batch(origin, piece, schema))
            count += len(piece.ids)
    return count


def read_provenance(path: Path) -> Provenance:
    """Read the provenance of a table.

    Raises:
        ReadError: the file is no table of objects.
    """
    schema = read_schema(path)
    with reading_table(path):
        content = json.loads(schema.metadata[METADATA_KEY])
        quality = {name: ChannelQuality(**figures) for name, figures in content["quality"].items()}
        return Provenance(
            image=content["image"],
            labels=content["labels"],
            shape=tuple(content["shape"]),
            pixel_size_um=content["pixel_size_um"],
            level0_scale=tuple(content["level0_scale"]),
            labelled_fraction=content["labelled_fraction"],
            segmented_channels=tuple(content["segmented_channels"]),
            quality=quality,
            provenance=content["provenance"],
            classes=content["classes"],
            class_fractions=content["class_fractions"],
            cells=content["cells"] and CellRule(**content["cells"]),
            cell_fraction=content["cell_fraction"],
        )


def read_schema(path: Path) -> pa.Schema:
    """Read the columns of a table.

    Raises:
        ReadError: the file is no table of objects.
    """
    with reading_table(path), _opened(path) as stream:
        schema = pq.read_schema(stream)
        if METADATA_KEY not in (schema.metadata or {}):
            raise ValueError("a Parquet file of something else")
        return schema


def read_batches(path: Path, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Read the rows of a table piece by piece; a table without rows gives one empty piece.

    Args:
        path: path of the Parquet file.
        columns: names of the columns to read; None reads all.

    Raises:
        ReadError: the file is no table of objects.
    """
    with reading_table(path), _opened(path) as stream, pq.ParquetFile(stream) as file:
        if file.metadata.num_rows:
            yield from file.iter_batches(columns=columns)
        else:
            yield pa.RecordBatch.from_pylist([], schema=file.read(columns).schema)


def _opened(path: Path) -> BinaryIO:
    """The table as an open file: pyarrow cannot open paths that are no UTF-8."""
    source = readable(path)
    return source.open("rb") if isinstance(source, Path) else source


@contextmanager
def reading_table(path: Path) -> Iterator[None]:
    """Turn every error of reading a table of objects into a `ReadError`."""
    try:
        yield
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise ReadError(
            str(path),
            expected="a table of objects",
            found="a folder" if path.is_dir() else f"{type(error).__name__}: {error}",
            remedy="name the file objects.parquet of a run with `objects`",
        ) from error


def _batch(origin: Origin, objects: Objects, schema: pa.Schema) -> pa.RecordBatch:
    by_channel = [Measured(origin, objects, channel) for channel in range(max(1, len(origin.channels)))]
    fields = table_fields(origin.channels, bool(origin.classes), origin.cells)
    with np.errstate(over="ignore", invalid="ignore"):  # figures of infinite pixels are infinite or NaN
        columns = [one.column.values(by_channel[one.channel]) for one in fields]
    return pa.record_batch(columns, schema=schema)
