"""Tables of objects in the formats of other programs: CSV, AnnData, and GeoJSON for QuPath.

CSV and GeoJSON are written piece by piece and need little memory; an AnnData file is made in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray
from scipy import ndimage

from cellseg_batch.engine.errors import UsageError
from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.objects.table import read_account, read_batches
from cellseg_batch.engine.run.output_paths import Place, place_output
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.ome_zarr import open_written
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.storage.atomic_files import whole_file
from cellseg_batch.kernels.outline import signed_area, trace

FORMATS = ("csv", "anndata", "geojson")
# Objects whose boxes begin in one square of this side are cut out of one piece of the labels.
_SQUARE = 2048
_NAMES = ("slide", "well", "field")
_PLACES = ("id", "t", "z", "centroid", "bbox", "touches")
_BOX = ("bbox_y0", "bbox_x0", "bbox_y1", "bbox_x1")


@dataclass(frozen=True)
class Exported:
    """What was exported: so many objects of so many images, and images without a table."""

    objects: int
    images: int
    without: list[str]


def export_objects(
    inputs: list[Path], kind: str, out: Path, name: str, output: Path | None, axes: str | None
) -> Exported:
    """Write the objects of every image below ``inputs`` to one file.

    Args:
        inputs: the images, as they were given to the run.
        kind: one of `FORMATS`.
        out: the file.
        name, output, axes: as in the settings of the run.

    Raises:
        UsageError: no such format, no table, tables with different columns, or several images for GeoJSON.
        SlideError: a table or its labels cannot be read, or the file not written.
    """
    if kind not in FORMATS:
        raise UsageError("`kind`", expected=f"one of {', '.join(FORMATS)}", found=kind, remedy="choose one of them")
    slides = [image for path in inputs for image in find_images(path, axes) if isinstance(image, Slide)]
    places = {slide.location: place_output(slide, name, output) for slide in slides}
    found = {location: place for location, place in places.items() if place.objects.is_file()}
    if not found:
        raise UsageError(
            f"`name={name}`",
            expected="a table of objects",
            found=f"none for any of {len(places)} images",
            remedy="run with `objects` first, and with the same `name` and `output`",
        )
    write = {"csv": _write_csv, "anndata": _write_anndata, "geojson": _write_geojson}[kind]
    objects = write(list(found.values()), out)
    return Exported(objects, len(found), sorted(set(places) - set(found)))


def _write_csv(places: list[Place], out: Path) -> int:
    count, writer = 0, None
    with whole_file(out) as stream:
        for batch in _all_batches(places):
            plain = batch.schema
            for index, field in enumerate(batch.schema):
                if field.name in _NAMES:
                    plain = plain.set(index, pa.field(field.name, pa.string()))
            writer = writer or pa.csv.CSVWriter(stream, plain.remove_metadata())
            writer.write_batch(batch.cast(plain.remove_metadata()))
            count += len(batch)
        if writer is not None:
            writer.close()
    return count


def _write_anndata(places: list[Place], out: Path) -> int:
    try:
        from anndata import AnnData
    except ImportError:
        raise UsageError(
            "`kind=anndata`",
            expected="the package anndata",
            found="none",
            remedy="install it with: pip install 'cellseg-batch[anndata]'",
        ) from None
    import pandas as pd

    table = pa.Table.from_batches(_all_batches(places))
    figures = [name for name in _figures(table.schema) if not len(table) or table[name].null_count < len(table)]
    unit = "_um" if table["centroid_y_um"].null_count == 0 else ""
    kept = [name for name in table.column_names if not name.endswith("_um") and name not in figures]
    # Text as plain objects: older versions of anndata cannot read pandas' own type of text.
    names = {name: table[name].cast(pa.string()).to_numpy() for name in _NAMES}
    rows = pd.Index(names["slide"] + ":" + table["id"].to_numpy().astype(str).astype(object), dtype=object)
    observed = pd.DataFrame({name: table[name].to_numpy() for name in kept if name not in _NAMES}, index=rows)
    for name, values in names.items():
        observed[name] = pd.Categorical(values, categories=pd.Index(np.unique(values), dtype=object))
    data = AnnData(
        np.stack([table[name].to_numpy() for name in figures], axis=1, dtype=np.float32),
        obs=observed,
        var=pd.DataFrame(index=pd.Index(figures, dtype=object)),
        obsm={"spatial": np.stack([table[f"centroid_{axis}{unit}"].to_numpy() for axis in "xy"], axis=1)},
        uns={
            "spatial_unit": "micrometer" if unit else "pixel",
            "cellseg_batch": json.dumps([read_account(place.objects) for place in places]),
        },
    )
    with whole_file(out) as stream:
        data.write_h5ad(Path(stream.name))
    return len(table)


def _write_geojson(places: list[Place], out: Path) -> int:
    if len(places) > 1:
        raise UsageError(
            "`kind=geojson`",
            expected="one image, as a GeoJSON holds the coordinates of one",
            found=f"{len(places)} images",
            remedy="export them one by one",
        )
    (place,) = places
    labels = open_written(place.store, place.labels)
    scale = read_account(place.objects)["level0_scale"]
    count = 0
    with whole_file(out) as stream, SlideReader(labels, 0, (0,)) as reader:
        stream.write(b'{"type": "FeatureCollection", "features": [')
        for batch in read_batches(place.objects):
            for feature in _features(batch, reader, scale):
                stream.write(b",\n" if count else b"\n")
                stream.write(json.dumps(feature).encode())
                count += 1
        stream.write(b"\n]}\n")
    return count


def _all_batches(places: list[Place]) -> Iterator[pa.RecordBatch]:
    """The rows of all tables, which have the same columns.

    Raises:
        UsageError: they have not.
    """
    first = None
    for place in places:
        for batch in read_batches(place.objects):
            first = first or batch.schema
            if batch.schema != first:
                changed = sorted(set(batch.schema.names) ^ set(first.names))
                raise UsageError(
                    str(place.objects),
                    expected="the same columns in all tables",
                    found=f"{', '.join(changed)} in some only",
                    cause="images with different channels",
                    remedy="export them one by one",
                )
            yield batch


def _figures(schema: pa.Schema) -> list[str]:
    """Columns that hold a measured figure, not a name or a place."""
    return [name for name in schema.names if name not in _NAMES and not name.startswith(_PLACES)]


def _features(batch: pa.RecordBatch, reader: SlideReader, scale: tuple[float, float]) -> Iterator[dict[str, Any]]:
    """A QuPath detection for each object of a batch, square by square of the labels."""
    ids = batch["id"].to_numpy()
    if not len(ids):
        return
    boxes = np.stack([batch[name].to_numpy() for name in _BOX], axis=1)
    lengths = reader.slide.plane_grid(0)
    planes = np.zeros(len(ids), np.int64)
    if lengths:
        index = tuple(batch[axis].to_numpy() for axis in reader.slide.plane_axes)
        planes = np.ravel_multi_index(index, lengths)
    measured = batch.select(_figures(batch.schema)).to_pylist()
    squares = np.stack([planes, *(boxes[:, :2] // _SQUARE).T])
    order = np.lexsort(squares[::-1])
    starts = np.flatnonzero(np.any(np.diff(squares[:, order], axis=1), axis=0)) + 1
    for group in np.split(order, starts):
        inside = boxes[group]
        hull = Box(*inside[:, :2].min(0).tolist(), *inside[:, 2:].max(0).tolist())
        window = reader.read(int(planes[group[0]]), hull)[0]
        for row in group:
            y0, x0, y1, x1 = boxes[row]
            mask = window[y0 - hull.y0 : y1 - hull.y0, x0 - hull.x0 : x1 - hull.x0] == ids[row]
            yield {
                "type": "Feature",
                "geometry": _geometry(mask, (int(y0), int(x0)), scale),
                "properties": {
                    "objectType": "detection",
                    "name": str(ids[row]),
                    "measurements": {key: value for key, value in measured[row].items() if value is not None},
                },
            }


def _geometry(mask: NDArray[np.bool_], origin: tuple[int, int], scale: tuple[float, float]) -> dict[str, Any]:
    """The object as a (Multi)Polygon in px of the image's full resolution; exact, holes included."""
    rings = trace(mask)
    parts: dict[int, list[list[list[float]]]] = {}
    components = ndimage.label(mask)[0] if len(rings) > 1 else mask.astype(np.int32)
    # Outer rings first: they begin a polygon, to which holes are added.
    for ring, pixel in sorted(rings, key=lambda one: signed_area(one[0]) < 0):
        corners = (ring + origin) * scale
        closed = [[x, y] for y, x in [*corners.tolist(), corners[0].tolist()]]
        parts.setdefault(int(components[pixel]), []).append(closed)
    polygons = list(parts.values())
    if len(polygons) == 1:
        return {"type": "Polygon", "coordinates": polygons[0]}
    return {"type": "MultiPolygon", "coordinates": polygons}
