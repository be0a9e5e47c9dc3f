"""Write labels, outlines and a table of objects as a store of SpatialData, without that library.

It pins older versions of dask and ome-zarr than this program runs on. The layout is OME-Zarr with transformations to
coordinate systems for labels, GeoParquet for shapes, and AnnData for the table.

Source: the stores of spatialdata 0.7 (spatialdata.scverse.org): container 0.2, raster images 0.3, shapes 0.3, tables
0.2; GeoParquet 1.1 (geoparquet.org); well-known binary of OGC 06-103r4.
"""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from cellseg_batch.engine.errors import writing_to
from cellseg_batch.engine.slides.label_copy import copy_labels, lay_out_copy
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.slides.writer import ImageWriter
from cellseg_batch.engine.storage.atomic_files import whole_file

if TYPE_CHECKING:
    from anndata import AnnData

# Name of a coordinate system -> unit of its axes, and units per px of the labels along z, y and x.
Systems = Mapping[str, tuple[str, Mapping[str, float]]]
# A Polygon or MultiPolygon, as GeoJSON has it.
Geometry = Mapping[str, Any]

# Column of the table that names the labels of an object, and the one that has its id there.
_REGION, _INSTANCE = "region", "id"
# Number of outlines that are written at a time.
_ROWS = 1 << 16
# Little-endian well-known binary: its marks of a polygon and of a multipolygon.
_POLYGON, _MULTIPOLYGON = 3, 6


def element_names(names: Iterable[str]) -> list[str]:
    """Names of elements of a store, one for each name of an image.

    Elements have letters, digits, dots, hyphens and underscores; what an image has besides is an underscore. Names that
    are the same but for capitals get numbers.
    """
    taken: set[str] = set()
    elements = []
    for name in names:
        plain = "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name).lstrip("_") or "image"
        element = next(e for n in count(1) if (e := plain if n == 1 else f"{plain}_{n}").casefold() not in taken)
        taken.add(element.casefold())
        elements.append(element)
    return elements


class SpatialDataStore:
    """Writer of a store; a method raises OutputError if it cannot write.

    Args:
        folder: an empty folder on this machine.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._labels: list[str] = []
        with writing_to(folder, "a store"):
            root = zarr.create_group(str(folder), attributes={"spatialdata_attrs": {"version": "0.2"}})
            self._groups = {kind: root.create_group(kind) for kind in ("labels", "shapes", "tables")}

    def add_labels(self, name: str, labels: Slide, systems: Systems) -> None:
        """Copy a label image as the element ``name``.

        Raises:
            ReadError: the labels cannot be read.
        """
        layout = lay_out_copy(labels)
        shapes = layout.shapes
        scales = [[a / b for a, b in zip(shapes[0], shape, strict=True)] for shape in shapes]
        multiscale = {
            "name": name,
            "axes": [{"name": axis, "type": "space"} for axis in layout.axes],
            "datasets": [
                {"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]}
                for level, scale in enumerate(scales)
            ],
            "coordinateTransformations": _transformations(layout.axes, systems),
        }
        writer = ImageWriter(self._folder, f"labels/{name}", layout)
        writer.create_empty(
            {
                "ome": {"version": "0.5-dev-spatialdata", "multiscales": [multiscale]},
                "spatialdata_attrs": {"version": "0.3"},
            }
        )
        copy_labels(labels, writer)
        with writing_to(self._folder, "a store"):
            self._labels.append(name)
            self._groups["labels"].attrs["ome"] = {"labels": self._labels}

    def add_shapes(self, name: str, outlines: Iterable[tuple[int, Geometry]], systems: Systems) -> int:
        """Write outlines as the element ``name``, unless there are none, as SpatialData has no empty shapes.

        Args:
            name: name of the element.
            outlines: id of each object, which is its index, and its outline in px of the labels.
            systems: the coordinate systems.

        Returns:
            Number of outlines.
        """
        remaining = iter(outlines)
        first = next(remaining, None)
        if first is None:
            return 0
        with writing_to(self._folder, "a store"):
            group = self._groups["shapes"].create_group(
                name,
                attributes={
                    "encoding-type": "ngff:shapes",
                    "axes": ["x", "y"],
                    "coordinateTransformations": _transformations("xy", systems),
                    "spatialdata_attrs": {"version": "0.3"},
                },
            )
        total, remaining, schema = 0, chain([first], remaining), _shapes_schema()
        with (
            whole_file(self._folder / group.path / "shapes.parquet") as stream,
            pq.ParquetWriter(stream, schema, compression="zstd") as writer,
        ):
            while rows := list(islice(remaining, _ROWS)):
                ids, geometries = zip(*rows, strict=True)
                binary = pa.array(map(_well_known_binary, geometries), pa.binary())
                writer.write_batch(pa.record_batch([binary, pa.array(ids, pa.int64())], schema=schema))
                total += len(rows)
        return total

    def add_table(self, table: AnnData, regions: Sequence[str]) -> None:
        """Write the table of all objects as the element ``table``, which is given its link to the labels.

        Args:
            table: the objects, with a column ``id``; without any, it annotates no labels.
            regions: name of the labels of each object.
        """
        import pandas as pd
        from anndata.io import write_elem

        annotated = list(dict.fromkeys(regions))
        keys = {"region": annotated, "region_key": _REGION, "instance_key": _INSTANCE} if annotated else {}
        table.obs[_REGION] = pd.Categorical(regions, categories=pd.Index(annotated, dtype=object))
        if keys:
            table.uns["spatialdata_attrs"] = keys
        with writing_to(self._folder, "a store"), warnings.catch_warnings():
            # Chunks in shards or not: both can be read.
            warnings.filterwarnings("ignore", "zarr v3 autosharding")
            write_elem(self._groups["tables"], "table", table)
            kinds = {"spatialdata-encoding-type": "ngff:regions_table", "version": "0.2"}
            nothing = {"region": None, "region_key": None, "instance_key": None}
            self._groups["tables"]["table"].attrs.update({**kinds, **nothing, **keys})


def _shapes_schema() -> pa.Schema:
    """Columns of a GeoParquet file of outlines, of which pandas takes the ids as index."""
    import pandas as pd

    empty = pd.DataFrame({"geometry": []}, index=pd.Index([], name=_INSTANCE, dtype=np.int64))
    columns = {"geometry": {"encoding": "WKB", "geometry_types": list[str](), "crs": None}}
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": columns}
    metadata = {**pa.Schema.from_pandas(empty).metadata, b"geo": json.dumps(geo)}
    return pa.schema([("geometry", pa.binary()), (_INSTANCE, pa.int64())], metadata=metadata)


def _transformations(axes: str, systems: Systems) -> list[dict[str, Any]]:
    """The scale from px to each coordinate system, as spatialdata writes it."""

    def space(name: str, unit: str) -> dict[str, Any]:
        return {"name": name, "axes": [{"name": axis, "type": "space", "unit": unit} for axis in axes]}

    return [
        {
            "type": "scale",
            "scale": [scale[axis] for axis in axes],
            "input": space(axes, "pixel"),
            "output": space(name, unit),
        }
        for name, (unit, scale) in systems.items()
    ]


def _well_known_binary(geometry: Geometry) -> bytes:
    polygons = geometry["coordinates"]
    if geometry["type"] == "Polygon":
        return _polygon(polygons)
    return struct.pack("<BII", 1, _MULTIPOLYGON, len(polygons)) + b"".join(map(_polygon, polygons))


def _polygon(rings: Sequence[Sequence[Sequence[float]]]) -> bytes:
    points = (struct.pack("<I", len(ring)) + np.array(ring, "<f8").tobytes() for ring in rings)
    return struct.pack("<BII", 1, _POLYGON, len(rings)) + b"".join(points)
