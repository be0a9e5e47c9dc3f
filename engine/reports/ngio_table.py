"""Write the table of an image's objects among the tables of its group, as ngio and Fractal read them.

Source: feature tables, version 1, with the Parquet backend (biovisioncenter.github.io/ngio, table specifications).
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from cellseg_batch.engine.errors import OutputError, writing_to
from cellseg_batch.engine.objects.columns import ID, TEXT
from cellseg_batch.engine.objects.table import read_batches, read_schema
from cellseg_batch.engine.run.output_paths import OutputPaths
from cellseg_batch.engine.slides.ome_zarr import OUTPUT_MARK
from cellseg_batch.engine.slides.writer import consolidate_again, list_table
from cellseg_batch.engine.storage.atomic_files import whole_file
from cellseg_batch.engine.storage.paths import zarr_store

# Column of the ids, by which ngio finds the labels of a row.
_INDEX = "label"


def write_ngio_table(paths: OutputPaths) -> int:
    """Write ``tables/<name>`` beside ``labels/<name>``, replacing what an earlier call wrote; returns its rows.

    Raises:
        ReadError: the table of objects cannot be read.
        OutputError: there is a table of that name of something else, or it cannot be written.
    """
    tables = "/".join(part for part in (paths.image, "tables") if part)
    folder = paths.store / tables / paths.name
    schema = pa.schema(
        pa.field(
            _INDEX if field.name == ID.name else field.name, pa.string() if field.type == TEXT else field.type
        ).with_metadata(field.metadata)
        for field in read_schema(paths.table)
    )
    with writing_to(folder, "a store"):
        group = zarr.open_group(
            zarr_store(paths.store),
            path=f"{tables}/{paths.name}",
            mode="a",
            zarr_format=paths.zarr_format,
            use_consolidated=False,
        )
        if group.attrs and OUTPUT_MARK not in group.attrs:
            raise OutputError(
                str(folder),
                expected="no table of that name, or one of cellseg-batch",
                found="one of something else",
                remedy="rename or remove it, or segment with another `name`",
            )
    count = 0
    with whole_file(folder / "table.parquet") as stream, pq.ParquetWriter(stream, schema, compression="zstd") as writer:
        for batch in read_batches(paths.table):
            writer.write_batch(batch.rename_columns(schema.names).cast(schema))
            count += len(batch)
    attributes: dict[str, Any] = {
        "type": "feature_table",
        "table_version": "1",
        "backend": "parquet",
        "index_key": _INDEX,
        "index_type": "int",
        "instance_key": _INDEX,
        "region": {"path": f"../labels/{paths.name}"},
        OUTPUT_MARK: {"kind": "objects"},
    }
    with writing_to(folder, "a store"):
        group.attrs.update(attributes)
    list_table(paths.store, tables, paths.name, paths.zarr_format)
    consolidate_again(paths.store)
    return count
