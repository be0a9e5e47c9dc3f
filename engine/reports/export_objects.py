"""Export tables of objects to the formats of other programs: CSV, AnnData, SpatialData, ngio, and GeoJSON for QuPath.

All but the table of AnnData and SpatialData, which is made in memory, are written piece by piece and need little of it.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray
from scipy import ndimage

from cellseg_batch.engine.errors import UsageError
from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.objects.columns import (
    BOX,
    CENTROID,
    CENTROID_UM,
    CLASS,
    ID,
    SLIDE,
    TEXT,
    TableField,
    table_fields,
)
from cellseg_batch.engine.objects.table import Provenance, read_batches, read_provenance, read_schema
from cellseg_batch.engine.reports.ngio_table import write_ngio_table
from cellseg_batch.engine.reports.spatialdata_store import SpatialDataStore, Systems, element_names
from cellseg_batch.engine.run.output_paths import OutputPaths, output_paths
from cellseg_batch.engine.slides.discover import find_all_images
from cellseg_batch.engine.slides.ome_zarr import open_written
from cellseg_batch.engine.slides.pixel_size import UM_PER_UNIT
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.storage.atomic_files import refuse_all_but_files, whole_file, whole_folder
from cellseg_batch.engine.storage.paths import RemotePath, printable
from cellseg_batch.kernels.outline import signed_area, trace

if TYPE_CHECKING:
    from anndata import AnnData

FORMATS = ("csv", "anndata", "geojson", "spatialdata", "ngio")
# Location of an image -> paths of its output, with a table.
Tables = dict[str, OutputPaths]
# Side in px of the squares by which objects are grouped: all objects that begin in a square share one read of labels.
_SQUARE = 2048


@dataclass(frozen=True)
class Exported:
    """Result of an export: number of objects and of images, and locations of the images without a table."""

    objects: int
    images: int
    without: list[str]


def export_objects(
    inputs: list[Path], kind: str, out: Path | None, name: str, output: Path | None, axes: str | None
) -> Exported:
    """Write the objects of every image below ``inputs`` to one file or store.

    It has the columns of all tables.  The objects of a table that lacks a column, such as one of a channel that only
    other images have, are empty there; NaN in AnnData and SpatialData.

    Args:
        inputs: the inputs of the run.
        kind: one of `FORMATS`.
        out: the file to write, or the store for spatialdata; None for ngio, whose tables lie beside the labels.
        name, output, axes: as in the settings of the run.

    Raises:
        UsageError: there is no such format or no table, something is in the way, a column has different types in two
            tables, or several images are asked for as GeoJSON.
        SlideError: a table or its labels cannot be read, or the output cannot be written.
    """
    if kind not in FORMATS:
        raise UsageError("`kind`", expected=f"one of {', '.join(FORMATS)}", found=kind, remedy="choose one of them")
    _refuse_out(kind, out)
    slides = [image for image in find_all_images(inputs, axes) if isinstance(image, Slide)]
    outputs = {slide.location: output_paths(slide, name, output) for slide in slides}
    measured = {location: paths for location, paths in outputs.items() if paths.table.is_file()}
    if not measured:
        raise UsageError(
            f"`name={name}`",
            expected="a table of objects",
            found=f"none below {', '.join(map(str, inputs))}",
            remedy="run with `objects` (by another `name` if there are labels without), and name it and `output` here",
        )
    if out is None:
        objects = sum(map(write_ngio_table, measured.values()))
    elif kind == "spatialdata":
        objects = _write_spatialdata(measured, {slide.location: slide.name for slide in slides}, out)
    else:
        write = {"csv": _write_csv, "anndata": _write_anndata, "geojson": _write_geojson}[kind]
        objects = write(measured, out)
    return Exported(objects, len(measured), sorted(set(outputs) - set(measured)))


def _refuse_out(kind: str, out: Path | None) -> None:
    """Refuse an output that the format does not have, or that would replace more than a file.

    Raises:
        UsageError: it is such.
    """
    if (out is None) != (kind == "ngio"):
        raise UsageError(
            f"`kind={kind}`",
            expected="no `out`, as its tables lie beside the labels" if out else "a file or store to write",
            found=str(out) if out else "none",
            remedy="leave `out` out" if out else "name one with `out`",
        )
    if out is None:
        return
    if kind != "spatialdata":
        refuse_all_but_files(out)
    elif isinstance(out, RemotePath) or out.suffix != ".zarr" or out.exists() or out.is_symlink():
        raise UsageError(
            f"`out={out}`",
            expected="a new folder on this machine whose name ends in .zarr",
            found="a URL" if isinstance(out, RemotePath) else "another name" if out.suffix != ".zarr" else "one there",
            remedy="choose another, or remove what is there",
        )


def _write_csv(tables: Tables, out: Path) -> int:
    schema = _common_schema(tables)
    plain = pa.schema((field.name, pa.string() if field.type == TEXT else field.type) for field in schema)
    count = 0
    with whole_file(out) as stream, pa.csv.CSVWriter(stream, plain) as writer:
        for batch in _all_batches(tables, schema):
            writer.write_batch(batch.cast(plain))
            count += len(batch)
    return count


def _write_anndata(tables: Tables, out: Path) -> int:
    data = _anndata(tables)
    with whole_file(out) as stream:
        data.write_h5ad(Path(stream.name))
    return len(data)


def _anndata(tables: Tables) -> AnnData:
    """The objects of all tables, in their order: measurements as ``X``, the other columns as ``obs``.

    Raises:
        UsageError: the library is not installed, or a column has different types in two tables.
    """
    try:
        from anndata import AnnData
    except ImportError:
        raise UsageError(
            "`kind`",
            expected="the package anndata",
            found="none",
            remedy="install it with: pip install 'cellseg-batch[anndata]'",
        ) from None
    import pandas as pd

    schema = _common_schema(tables)
    table = pa.Table.from_batches(_all_batches(tables, schema), schema)
    provenances = [read_provenance(paths.table) for paths in tables.values()]
    channels = dict.fromkeys(channel for provenance in provenances for channel in provenance.channels)
    fields = _fields(schema, tuple(channels))
    figures = [
        field.name
        for field in fields
        if field.column.is_measurement and (not len(table) or table[field.name].null_count < len(table))
    ]
    described = [
        field.name for field in fields if not field.column.is_measurement and not field.column.needs_pixel_size
    ]
    in_um = table[CENTROID_UM[0].name].null_count == 0
    y, x = (table[column.name].to_numpy() for column in (CENTROID_UM if in_um else CENTROID))
    # Text as plain objects: older versions of anndata cannot read pandas' own type of text.
    names = {
        field.name: table[field.name].cast(pa.string()).to_numpy() for field in fields if field.column.type == TEXT
    }
    rows = pd.Index(names["slide"] + ":" + table[ID.name].to_numpy().astype(str).astype(object), dtype=object)
    observed = pd.DataFrame({name: table[name].to_numpy() for name in described if name not in names}, index=rows)
    for name, values in names.items():
        observed[name] = pd.Categorical(values, categories=pd.Index(sorted(set(values) - {None}), dtype=object))
    return AnnData(
        np.stack([table[name].to_numpy() for name in figures], axis=1, dtype=np.float32),
        obs=observed,
        var=pd.DataFrame(index=pd.Index(figures, dtype=object)),
        obsm={"spatial": np.stack([x, y], axis=1)},
        uns={
            "spatial_unit": "micrometer" if in_um else "pixel",
            "cellseg_batch": json.dumps([asdict(provenance) for provenance in provenances]),
        },
    )


def _write_spatialdata(tables: Tables, names: dict[str, str], out: Path) -> int:
    """Write a SpatialData store: labels and shapes of each image, and one table of all.

    Args:
        tables: the tables.
        names: location of an image -> its name, which its elements get.
        out: the store, where there is nothing yet.
    """
    data = _anndata(tables)
    regions: list[str] = []
    with whole_folder(out) as folder:
        store = SpatialDataStore(folder)
        for element, paths in zip(element_names(names[location] for location in tables), tables.values(), strict=True):
            labels, provenance = open_written(paths.store, paths.labels), read_provenance(paths.table)
            if labels.extent("t", 0) > 1:
                raise UsageError(
                    labels.location,
                    expected="labels without time points, as SpatialData has none",
                    found=f"{labels.extent('t', 0)} time points",
                    remedy="export it in another format",
                )
            systems = _systems(labels, provenance, "" if len(tables) == 1 else element)
            store.add_labels(f"{element}_labels", labels, systems)
            with SlideReader(labels, 0, (0,)) as reader:
                outlines = (
                    (int(batch[ID.name][row].as_py()), geometry)
                    for batch in read_batches(paths.table)
                    for row, geometry in _outlines(batch, reader, (1, 1))
                )
                regions += [f"{element}_labels"] * store.add_shapes(f"{element}_shapes", outlines, systems)
        store.add_table(data, regions)
    return len(data)


def _systems(labels: Slide, provenance: Provenance, element: str) -> Systems:
    """Coordinate systems of an image: px of its full resolution, and micrometres from the same corner if known.

    Args:
        labels: its labels.
        provenance: source of its objects.
        element: name of its elements, if its store holds other images, too, which lie elsewhere; else "".
    """
    y, x = provenance.level0_scale
    systems = {element or "global": ("pixel", {"z": 1.0, "y": y, "x": x})}
    side = provenance.pixel_size_um
    if side is not None:
        z = labels.axes.find("z")
        per_unit = UM_PER_UNIT.get(labels.units[z] or "") if z >= 0 else None
        step = 1.0 if per_unit is None else labels.levels[0].scale[z] * per_unit
        systems[f"{element}_micrometer".lstrip("_")] = ("micrometer", {"z": step, "y": side, "x": side})
    return systems


def _write_geojson(tables: Tables, out: Path) -> int:
    if len(tables) > 1:
        raise UsageError(
            "`kind=geojson`",
            expected="one image, as a GeoJSON holds the coordinates of one",
            found=f"{len(tables)} images",
            remedy="export them one by one",
        )
    (paths,) = tables.values()
    provenance = read_provenance(paths.table)
    images = [paths.labels] if provenance.cells is None else [paths.labels, paths.cells]
    count = 0
    with whole_file(out) as file, _compressed(file, out) as stream, ExitStack() as stack:
        readers = [stack.enter_context(SlideReader(open_written(paths.store, image), 0, (0,))) for image in images]
        stream.write(b'{"type": "FeatureCollection", "features": [')
        for batch in read_batches(paths.table):
            for feature in _features(batch, readers, provenance):
                stream.write(b",\n" if count else b"\n")
                stream.write(json.dumps(feature).encode())
                count += 1
        stream.write(b"\n]}\n")
    return count


def _compressed(file: IO[bytes], out: Path) -> AbstractContextManager[IO[bytes] | gzip.GzipFile]:
    """The stream that is written to ``file``, compressed if the name of ``out`` ends in .gz."""
    if out.suffix != ".gz":
        return nullcontext(file)
    return gzip.GzipFile(out.stem, "wb", fileobj=file, mtime=0)


def _common_schema(tables: Tables) -> pa.Schema:
    """The columns of all tables: those of the first, then those that others have besides.

    Raises:
        UsageError: a column has different types in two tables.
    """
    schemas = [read_schema(paths.table) for paths in tables.values()]
    try:
        return pa.unify_schemas(schemas)
    except pa.ArrowException as error:
        raise UsageError(
            "tables of objects",
            expected="columns of the same types in all of them",
            found=str(error),
            cause="tables of different versions",
            remedy="export them one by one, or segment anew with `overwrite`",
        ) from error


def _all_batches(tables: Tables, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Read the rows of all tables, with the columns of ``schema``; those that a table lacks are null.

    Images of one name, as of inputs that were named one by one, are told apart by their locations.
    """
    slides = {location: _slide_of(paths.table) for location, paths in tables.items()}
    times = Counter(slides.values())
    for location, paths in tables.items():
        for batch in read_batches(paths.table):
            columns = {name: batch[name] for name in batch.schema.names}
            if times[slides[location]] > 1:
                columns[SLIDE.name] = pa.array([printable(location)] * len(batch), schema.field(SLIDE.name).type)
            columns |= {field.name: pa.nulls(len(batch), field.type) for field in schema if field.name not in columns}
            yield pa.record_batch([columns[field.name] for field in schema], schema=schema)


def _slide_of(table: Path) -> str | None:
    """Name of the image of a table; None for a table without objects."""
    batch = next(read_batches(table, [SLIDE.name]))
    return batch[SLIDE.name][0].as_py() if len(batch) else None


def _fields(schema: pa.Schema, channels: tuple[str, ...]) -> list[TableField]:
    """The fields that a table has: without classes, or of an earlier version, it may have fewer columns."""
    return [field for field in table_fields(channels, classes=True, cells=True) if field.name in schema.names]


def _features(batch: pa.RecordBatch, readers: list[SlideReader], provenance: Provenance) -> Iterator[dict[str, Any]]:
    """Make a QuPath detection of each object of a batch, or a cell with its nucleus.

    Args:
        batch: rows of the table.
        readers: reader of the labels, and of the cells if there are some.
        provenance: provenance of the table.
    """
    ids = batch[ID.name].to_numpy()
    fields = _fields(batch.schema, provenance.channels)
    measured = batch.select([field.name for field in fields if field.column.is_measurement]).to_pylist()
    classes = batch[CLASS.name].to_pylist() if provenance.classes else [None] * len(ids)
    slide, kind, reaches = readers[0].slide, "detection", [0]
    if provenance.cells is not None:
        kind, reaches = "cell", [0, provenance.cells.reach]
    planes = _planes(batch, slide)
    outlines = (
        _outlines(batch, reader, provenance.level0_scale, reach) for reader, reach in zip(readers, reaches, strict=True)
    )
    for (row, nucleus), *cell in zip(*outlines, strict=True):
        plane = _plane(slide, int(planes[row]))
        yield {
            "type": "Feature",
            "geometry": (cell[0][1] if cell else nucleus) | plane,
            **({"nucleusGeometry": nucleus | plane} if cell else {}),
            "properties": {
                "objectType": kind,
                "name": str(ids[row]),
                **_classification(classes[row], provenance),
                "measurements": {key: value for key, value in measured[row].items() if value is not None},
            },
        }


def _outlines(
    batch: pa.RecordBatch, reader: SlideReader, scale: tuple[float, float], reach: int = 0
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, outline) of each object of a batch, as `_geometry`, reading the labels square by square.

    Args:
        batch: rows of the table.
        reader: reader of the labels, or of the cells.
        scale: (y, x) px of the full resolution per px of the labels.
        reach: how many px the outline may extend beyond the object's box.
    """
    ids = batch[ID.name].to_numpy()
    if not len(ids):
        return
    boxes = np.stack([batch[column.name].to_numpy() for column in BOX], axis=1)
    planes = _planes(batch, reader.slide)
    squares = np.stack([planes, *(boxes[:, :2] // _SQUARE).T])
    order = np.lexsort(squares[::-1])
    starts = np.flatnonzero(np.any(np.diff(squares[:, order], axis=1), axis=0)) + 1
    whole = Box(0, 0, *reader.slide.plane_shape(0))
    for group in np.split(order, starts):
        inside = boxes[group]
        hull = Box(*inside[:, :2].min(0).tolist(), *inside[:, 2:].max(0).tolist()).grown(reach).within(whole)
        window = reader.read(int(planes[group[0]]), hull)[0]
        for row in group.tolist():
            box = Box(*boxes[row].tolist()).grown(reach).within(whole)
            yield row, _geometry(window[box.seen_from(hull).slices()] == ids[row], (box.y0, box.x0), scale)


def _planes(batch: pa.RecordBatch, labels: Slide) -> NDArray[np.int64]:
    """Number (n,) of the t/z plane of each object of a batch."""
    lengths = labels.plane_grid(0)
    if not lengths or not len(batch):
        return np.zeros(len(batch), np.int64)
    index = tuple(batch[axis].to_numpy() for axis in labels.plane_axes)
    planes: NDArray[np.int64] = np.ravel_multi_index(index, lengths)
    return planes


def _classification(name: str | None, provenance: Provenance) -> dict[str, Any]:
    """QuPath's property of a detection that says of which class it is; none for an object without one."""
    if name is None:
        return {}
    return {"classification": {"name": name, "color": list(bytes.fromhex(provenance.classes[name][1:]))}}


def _plane(labels: Slide, plane: int) -> dict[str, Any]:
    """QuPath's member of a geometry that says in which t/z plane it lies, of every channel; none for a single plane."""
    index = labels.plane_index(0, plane)
    return {"plane": {"c": -1, "z": index.get("z", 0), "t": index.get("t", 0)}} if index else {}


def _geometry(mask: NDArray[np.bool_], origin: tuple[int, int], scale: tuple[float, float]) -> dict[str, Any]:
    """Outline an object as a (Multi)Polygon in px of the image's full resolution: exact, holes included.

    Args:
        mask: (h, w) pixels of the object in its bounding box.
        origin: (y, x) of the box in px of the labels.
        scale: (y, x) px of the full resolution per px of the labels.
    """
    rings = trace(mask)
    parts: dict[int, list[list[list[float]]]] = {}
    components = ndimage.label(mask)[0] if len(rings) > 1 else mask.astype(np.int32)
    # Outer rings come first: each begins a polygon, to which its holes are added.
    for ring, pixel in sorted(rings, key=lambda ring: signed_area(ring[0]) < 0):
        corners = (ring + origin) * scale
        closed = [[x, y] for y, x in [*corners.tolist(), corners[0].tolist()]]
        parts.setdefault(int(components[pixel]), []).append(closed)
    polygons = list(parts.values())
    if len(polygons) == 1:
        return {"type": "Polygon", "coordinates": polygons[0]}
    return {"type": "MultiPolygon", "coordinates": polygons}
